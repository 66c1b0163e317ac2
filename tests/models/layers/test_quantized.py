"""model.quantize 4bit: training on packed weights is training on the same weights unpacked, under ZeRO-3."""

import math
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_ds.commands import cli
from dpo_ds.config import ModelSection, PrecomputeConfig
from dpo_ds.config.deepspeed import Machine
from dpo_ds.errors import ConfigError, ModelError
from dpo_ds.memory import allocations
from dpo_ds.memory.trace import Pass, parameters
from dpo_ds.models import checks
from dpo_ds.models.layers import quantized
from tests import small_jobs
from tests.small_jobs import steps

KEYS = {
    "model__quantize": "4bit", "model__lora__r": 4, "reference__kind": "adapter", "train__max_steps": 4,
    "train__learning_rate": 0.01,
}  # fmt: skip
has_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return small_jobs.make_world(tmp_path_factory.mktemp("quantized"))


@has_bitsandbytes
@pytest.mark.distributed
def test_it_trains_and_merges_as_the_same_weights_unpacked_do(forks, world, capsys):
    unpacked = AutoModelForCausalLM.from_pretrained(world / "model")
    with torch.no_grad():
        for layer in quantized.layers_to_quantize(unpacked).values():
            before = layer.weight.clone()
            layer.weight.copy_(quantized.through_4_bits(layer.weight, layer))
            error = (layer.weight - before).norm() / before.norm()
            assert 0.02 < error < 0.4, "another model, and not a wholly different one"
    unpacked.save_pretrained(world / "unpacked")
    AutoTokenizer.from_pretrained(world / "model").save_pretrained(world / "unpacked")
    whole = KEYS | {"model__quantize": "null", "model__path": world / "unpacked"}
    for out, keys in (("packed", KEYS), ("whole", whole)):
        codes, output = run(forks, world, out, **keys)
        assert codes == [0, 0], output
        assert ("in 4 bits (NF4)" in output) == (out == "packed")
        folder = world / out
        argv = ["export", folder, "--to", f"{folder}-merged", "--merge", "true"]
        codes, output = run(forks, world, "export", ranks=1, argv=argv)
        assert codes == [0], output
    assert "weights in 4 bits (NF4" in (world / "packed/final/README.md").read_text()
    packed, whole = ([line["loss"] for line in steps(world / out)] for out in ("packed", "whole"))
    assert packed[0] == pytest.approx(math.log(2), abs=1e-6) and packed[-1] < packed[0] - 0.01
    assert packed == pytest.approx(whole, abs=1e-5)
    check_its_cache(forks, world, packed, capsys)
    for file in ("packed/final/adapter_model.safetensors", "packed-merged/model.safetensors"):
        ours, theirs = (load_file(world / name) for name in (file, file.replace("packed", "whole", 1)))
        assert ours.keys() == theirs.keys()
        assert all(torch.allclose(ours[name], theirs[name], atol=2e-5) for name in ours), file


def check_its_cache(forks, world, losses, capsys):
    """Computed by a replica, it is the reference of a run on quantised weights, and of no other."""
    cache = {"reference__cache": world / "logps"}
    codes, output = run(forks, world, "filling", ranks=1, argv=precompute_command(world, world / "logps"))
    assert codes == [0], output
    cached = KEYS | cache | {"reference__kind": "cached", "train__max_steps": 2}
    codes, output = run(forks, world, "cached", ranks=1, **cached)
    assert codes == [0] and "pairs recomputed, within" in output, output
    assert [line["loss"] for line in steps(world / "cached")] == pytest.approx(losses[:2], abs=1e-5)
    assert cli.main(small_jobs.train_command(world, "other", **cached | {"model__quantize": "null"})) == 2
    assert "computed with model.quantize 4bit, this run has none" in capsys.readouterr().err


@has_bitsandbytes
def test_packed_codes_that_look_like_nan_are_not_blamed_for_one(world, monkeypatch):
    """0xf in every place, NF4's 1.0, is a NaN of bf16."""
    settings = quantized.settings(torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(world / "model", dtype=torch.bfloat16, quantization_config=settings)
    model.model.layers[0].mlp.up_proj.weight.data.view(torch.uint8).fill_(0xFF)
    assert model.model.layers[0].mlp.up_proj.weight.isnan().all()
    model.model.norm.weight.data[0] = math.inf
    monkeypatch.setattr(checks.collectives, "gather_objects", lambda own: [own])
    assert "its weights model.norm.weight hold" in checks._not_finite(SimpleNamespace(causal_lm=model))


def precompute_command(world, cache) -> list[str]:
    keys = {"model.path": world / "model", "data.train": world / "train.jsonl", "deepspeed.config": "none"}
    keys |= {"model.quantize": "4bit", "reference.cache": cache}
    return ["precompute", *(str(word) for key, value in keys.items() for word in (f"--{key}", value))]


def run(forks, world, out, ranks=2, argv=None, **keys):
    argv = argv or small_jobs.train_command(world, out, **keys)
    logs, cache = world / f"{out}.logs", str(world / "cache")
    return forks.run(argv, ranks, logs, module="tests.workers.quantized", DPO_DS_CACHE=cache)


@pytest.mark.parametrize(
    ("command", "keys", "parts"),
    [
        ("train", {}, ["--model.quantize 4bit needs a CUDA GPU", "leave it out"]),
        ("train", {"model__lora__r": 0, "reference__kind": "none"}, ["model.lora.r"]),
        ("train", {"reference__kind": "live"}, ["reference.kind live", "reference.kind adapter"]),
        ("train", {"model__from_config": "true"}, ["not from_config"]),
        ("train", {"deepspeed__config": "none"}, ["deepspeed.config none"]),
        ("reward", {}, ["only sft, train and precompute can"]),
    ],
)
def test_mistakes_are_one_line(world, command, keys, parts, capsys):
    given = {name: value for name, value in KEYS.items() if command == "train" or "reference" not in name}
    assert cli.main(list(map(str, small_jobs.train_command(world, "mistaken", command, **given | keys)))) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert [part for part in parts if part not in line] == [], line


def test_a_cache_is_not_filled_without_cuda(world, capsys):
    assert cli.main(precompute_command(world, world / "none")) == 2
    assert "--model.quantize 4bit needs a CUDA GPU" in capsys.readouterr().err


def test_what_a_gpu_alone_is_told(monkeypatch):
    section, machine = ModelSection(path="m", quantize="4bit"), Machine(1, "cuda", True)
    quantized_already = SimpleNamespace(quantization_config={"quant_method": "gptq"})
    with pytest.raises(ModelError, match="m holds quantised weights already"):
        quantized.check_quantize(section, machine, quantized_already)
    filled = {"zero_optimization": {"zero_quantized_weights": True}}
    with pytest.raises(ConfigError, match=r"ds\.json: zero_optimization\.zero_quantized_weights rounds"):
        quantized.check_gathering(section, filled, "ds.json")
    quantized.check_gathering(ModelSection(path="m"), filled, "ds.json")
    monkeypatch.setattr(quantized, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'dpo-ds\[quantize\]'"):
        quantized.check_quantize(section, machine, SimpleNamespace())


def test_memory_counts_half_a_byte_a_weight(world):
    """Of a Llama of width 32 with two layers, whose keys and values have half as many heads: two weights to a byte."""
    config = AutoModelForCausalLM.from_pretrained(world / "model").config
    found = parameters(config, Pass((), 0, torch.bfloat16, quantized=True, training=False))
    packed = [p for p in found if p.packed]
    assert sum(p.packed for p in packed) == 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 96)
    assert all(2 * p.numel == p.packed / 2 for p in packed), "bytes of bf16 numbers"
    assert quantized.BITS == pytest.approx(4.127, abs=1e-3)  # QLoRA, section 3: 0.127 bits a parameter
    sections = {"model": {"path": "m", "quantize": "4bit"}, "data": {"train": "d"}, "reference": {"cache": "c"}}
    run = PrecomputeConfig.model_validate(sections | {"deepspeed": {"config": "none"}})
    state = allocations.expected(run, config, Machine(1, "cuda", True), 1, None, None).state
    others, weights = sum(p.numel for p in found if not p.packed), sum(p.packed for p in packed)
    assert list(state.values()) == [weights // 2 + 2 * others, int(weights * (1 / 64 + 4 / 64 / 256))]
