"""What layers keep for backward: the same gradients whatever it is, and less of it."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from dpo_ds.batch import packed_batch, padded_batch
from dpo_ds.config import LoraSection
from dpo_ds.demo.tiny import FAMILIES, random_model, tiny_config
from dpo_ds.errors import ModelError
from dpo_ds.memory.trace import PeakMemory
from dpo_ds.models import lora
from dpo_ds.models.attention import use_packed_attention
from dpo_ds.models.causal_lm import LogProbModel
from dpo_ds.models.checks import settle_activations
from dpo_ds.models.engine import Replica
from dpo_ds.models.layers import activations
from dpo_ds.models.layers.activations import save_activation_memory, take_tiles_away, tiles_of
from dpo_ds.models.loading import switch_dropout_off
from tests.families import pairs, tiny_config_of
from tests.tiny import VOCAB, random_pairs


def model_of(family: str, how: str, **changes) -> LogProbModel:
    config = tiny_config(family, VOCAB, hidden=32, **changes)
    switch_dropout_off(config)
    causal_lm = random_model(config).train()
    assert use_packed_attention(causal_lm) is None
    save_activation_memory(causal_lm, how)
    return LogProbModel(causal_lm)


def gradients(model: LogProbModel, batch) -> list[torch.Tensor]:
    model.zero_grad()
    model(batch).square().sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("family", FAMILIES)
def test_all_ways_give_the_same_gradients(family):
    batch = packed_batch(random_pairs(5))
    expected = gradients(model_of(family, "none"), batch)
    for how in ("selective", "checkpoint", "offload"):
        model = model_of(family, how)
        with tiles_of(model.causal_lm, 7) as are_there:
            found = gradients(model, batch)
        assert are_there == (how == "offload" and family not in ("qwen3_moe", "gpt2"))
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["selective", "checkpoint", "offload"])
def test_adapters_drop_the_same_inputs_when_they_are_computed_again(how):
    """By a step along random directions: a gradient of other masks than the forward's is far off."""
    batch, found = packed_batch(random_pairs(5)), model_of("llama", "none")
    lora.add_adapters(found.causal_lm, LoraSection(r=4, dropout=0.5), 0, "CAUSAL_LM")
    save_activation_memory(found.causal_lm, how)
    generator = torch.Generator().manual_seed(0)
    trained = [p for p in found.train().parameters() if p.requires_grad]
    for p in trained:  # B too, which begins at 0
        torch.nn.init.normal_(p, std=0.1, generator=generator)
    along = [torch.randn(p.shape, generator=generator) for p in trained]

    def value(distance: float) -> torch.Tensor:
        for p, direction in zip(trained, along, strict=True):
            p.data.add_(direction, alpha=distance)
        torch.manual_seed(1)
        return found(batch).square().sum()

    with tiles_of(found.causal_lm, 7):
        value(0).backward()
        slope = sum((p.grad * direction).sum() for p, direction in zip(trained, along, strict=True)).item()
        ahead, behind = value(1e-3).item(), value(-2e-3).item()
    assert slope == pytest.approx((ahead - behind) / 2e-3, rel=0.05)


@pytest.mark.parametrize("family", ["bloom", "mpt"])
def test_an_mlp_that_is_given_the_residual_too(family):
    batch, found = padded_batch(pairs()), []
    for how in ("none", "offload"):
        config = tiny_config_of(family)
        switch_dropout_off(config)
        causal_lm = random_model(config).train()
        save_activation_memory(causal_lm, how)
        with tiles_of(causal_lm, 3) as are_there:
            found.append(gradients(LogProbModel(causal_lm), batch))
    assert are_there
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "changes"), [("olmo", {"clip_qkv": 8.0}), ("olmo", {}), ("llama", {})])
def test_what_is_kept_must_stay_as_it_was(family, changes):
    """OLMo clips queries, keys and values where they lie: a backward would take the clipped for the product's own."""
    config = tiny_config_of(family)
    config.update(changes)
    switch_dropout_off(config)
    causal_lm = random_model(config).train()
    assert use_packed_attention(causal_lm) is None
    save_activation_memory(causal_lm, "selective")
    model = Replica(LogProbModel(causal_lm), torch.device("cpu"))
    if not changes:
        assert settle_activations(model) == []
        return
    with pytest.raises(ModelError, match=r"OlmoForCausalLM changes in place \(aten::clamp_\) .*; take checkpoint"):
        settle_activations(model)


@pytest.mark.parametrize("how", ["selective", "checkpoint", "offload"])
def test_layers_that_cannot_be_computed_again(how):
    model = random_model(tiny_config_of("jetmoe"))
    with pytest.raises(ModelError, match=f"--train.activation_memory {how}: JetMoeForCausalLM does not support"):
        save_activation_memory(model, how)


def peak(how: str) -> int:
    pairs = random_pairs(40)
    model = model_of("llama", how, num_hidden_layers=6, intermediate_size=512)
    with tiles_of(model.causal_lm, 32), PeakMemory([]) as meter:
        gradients(model, packed_batch(pairs))  # the first leaves gradients
        meter.begin("step")
        before = meter.live
        gradients(model, packed_batch(pairs))
        return meter.peaks["step"] - before


def test_less_is_kept():
    whole, inputs, tiled = (peak(how) for how in ("none", "checkpoint", "offload"))
    assert inputs < whole / 2 and tiled < inputs * 0.7, (whole, inputs, tiled)


def test_selective_keeps_attention_and_the_products_that_do_not_widen():
    width, of_keys, inner, layers = 32, 16, 96, 3
    batch = packed_batch(random_pairs(4))
    saved = {}
    for how in ("checkpoint", "selective"):
        model = model_of("llama", how, num_hidden_layers=layers, intermediate_size=inner)
        with PeakMemory([]) as meter:
            logps = model(batch)
            saved[how] = meter.live
        del logps
    products = 3 * width + 2 * of_keys  # query, behind attention, the MLP's last; key, value
    bytes_of_numbers = 4 * batch.num_tokens * layers
    more = saved["selective"] - saved["checkpoint"] - bytes_of_numbers * products
    assert bytes_of_numbers * width <= more <= 1.5 * bytes_of_numbers * width, "attention's result, log-sums"


def test_an_mlp_that_looks_at_other_tokens_can_do_without_tiles():
    model = model_of("llama", "offload")
    batch, plain = packed_batch(random_pairs(3)), model_of("llama", "none")
    take_tiles_away(model.causal_lm)
    with tiles_of(model.causal_lm, 2) as are_there:
        assert not are_there
        torch.testing.assert_close(model(batch), plain(batch))


class Copying(activations.Parked):
    """Stands for a GPU: what is parked is another tensor, and the one on the device is let go."""

    made = []

    def __init__(self, hidden, before, stream):
        super().__init__(hidden, before, stream)
        Copying.made.append(self)

    def _stay(self, hidden):
        return hidden.detach().clone()

    def fetch(self):
        if self._back is None:
            self._back = self._host.clone()
            self.order = len([one for one in Copying.made if hasattr(one, "order")])


def test_inputs_come_back_one_layer_ahead():
    """The last layer's first, and with each the one before it."""
    Copying.made = []
    parking, layers = activations._Parking(Copying), [nn.Linear(4, 4) for _ in range(3)]
    plain, x = copy.deepcopy(layers), torch.randn(5, 4)
    hidden = x
    for layer in layers:
        hidden = parking.run(partial(lambda layer, h: torch.tanh(layer(h)), layer), hidden)
        assert Copying.made[-1]._hidden is None, "it would stay on the device"
    hidden.sum().backward()
    expected = x
    for layer in plain:
        expected = torch.tanh(layer(expected))
    expected.sum().backward()
    assert [one.order for one in Copying.made] == [2, 1, 0]
    for ours, theirs in zip(layers, plain, strict=True):
        torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
