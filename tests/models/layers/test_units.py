"""Decoder layers as units of ZeRO-3: found in the model, and exact in all that is built on them."""

import json

import pytest
import torch
from torch import nn

from dpo_ds.demo.tiny import random_model, tiny_config
from dpo_ds.models.layers.units import UnitLinear, decoder_layers, make_units
from tests.ranks import run_worker
from tests.tiny import VOCAB

CASES = {
    "llama": {"family": "llama"},
    "checkpointed": {"family": "qwen3", "checkpointing": True, "changes": {"tie_word_embeddings": True}},
    "adapters": {"family": "llama", "lora": True, "checkpointing": True},
    "windows": {"family": "gemma2", "changes": {"sliding_window": 5}},
    "gpt2": {"family": "gpt2"},
    "experts": {"family": "qwen3_moe"},
    "offloaded": {"family": "llama", "zero": dict.fromkeys(("offload_param", "offload_optimizer"), {"device": "cpu"})},
}


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What one launch saw of every case."""
    folder = tmp_path_factory.mktemp("layers")
    run_worker("layers.py", 2, folder, str(folder / "out.json"), *map(json.dumps, CASES.values()))
    return dict(zip(CASES, json.loads((folder / "out.json").read_text()), strict=True))


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_layers_as_units_give_autograds_own_gradients(seen, case):
    """To the last bit. Module by module the last bits are others where a layer's input is used three times (RMSNorm
    twice, the residual): DeepSpeed's hooks group the sum of their gradients otherwise."""
    found = seen[case]
    assert found["leaves"] == [[3, 3], [0, 0]]  # policy and reference of three layers
    assert found["inexact"] == [] and found["gradients"] > 20
    assert all("lora_A" in name for name in found["still"])  # whose B is zero in the first step
    units, modules = found["losses"]
    assert units[:2] == modules[:2] and len(units) == 9
    assert units == pytest.approx(modules, rel=1e-5)
    assert found["apart"] < 1e-4
    if case == "gpt2":  # LayerNorm is one operator
        assert units == modules and found["apart"] == 0


@pytest.mark.parametrize("is_trained", [True, False])
def test_a_linear_of_a_unit_keeps_its_input_for_a_trained_weight_alone(is_trained):
    """An adapter's run would keep the inputs of all products, which only their weights' gradients need."""
    linear, x = UnitLinear(4, 3).double(), torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    linear.requires_grad_(is_trained)
    y = linear(x)
    assert [kept is not None for kept in y.grad_fn.saved_tensors] == [is_trained, True]
    wanted = (x, *linear.parameters()) if is_trained else (x,)
    plain = torch.nn.functional.linear(x, linear.weight, linear.bias)
    expected = torch.autograd.grad(plain.square().sum(), wanted)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), wanted), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_finds_the_layers(family):
    model = random_model(tiny_config(family, VOCAB, layers=3))
    assert len(decoder_layers(model)) == 3
    assert len({type(layer) for layer in decoder_layers(model)}) == 1


def test_experts_of_a_layer_are_no_layers():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(8))

    model = nn.Sequential(nn.ModuleList(Layer() for _ in range(2)))
    assert [type(layer) for layer in decoder_layers(model)] == [Layer, Layer]


def test_layers_that_share_weights_stay_apart():
    shared = nn.Linear(2, 2)
    between = nn.Sequential(nn.ModuleList([nn.Sequential(shared), nn.Sequential(shared)]))
    assert "share weights" in make_units(between, {})
    outside = nn.Sequential(shared, nn.ModuleList([nn.Sequential(shared)]))
    assert "share weights" in make_units(outside, {})
    assert make_units(nn.Sequential(shared), {}) == "it has no list of decoder layers"
    assert make_units(between, {"leaf_module": {"classes": []}}) == ""  # the user's own word
