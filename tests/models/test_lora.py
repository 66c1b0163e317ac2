"""LoRA end to end on two ranks under ZeRO-3: three kinds of reference, resume, the adapter folder; and its config."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dpo_ds.demo.corpus import preference_rows, write_jsonl
from dpo_ds.demo.tiny import save_tiny_model, tiny_llama, train_tokenizer

pytestmark = pytest.mark.distributed
EXACT = ("loss", "rewards/margins", "logps/chosen", "grad_norm")


@pytest.fixture(scope="module")
def world(tmp_path_factory, forks):
    """`run(out, ranks, **settings)` trains with adapters on two layers' linear layers; settings have __ for a dot."""
    folder = tmp_path_factory.mktemp("lora")
    rows = list(preference_rows(40, seed=4))
    write_jsonl(folder / "train.jsonl", rows)
    tokenizer = train_tokenizer([row["prompt"] + row["chosen"] for row in rows], vocab_size=400)
    save_tiny_model(folder / "model", tokenizer, tiny_llama(tokenizer, hidden=32, layers=2))

    def run(out="out", ranks=2, command="train", **settings):
        keys = {"deepspeed.config": "ds_configs/zero3_cpu.json"}
        if command != "evaluate":
            keys |= {"model.path": folder / "model", "data.train": folder / "train.jsonl"}
        if command == "train":
            keys |= {
                "model.lora.r": 4, "train.global_batch_size": 8, "train.micro_batch_tokens": 600,
                "train.learning_rate": 1e-2, "train.schedule": "constant", "train.max_steps": 4,
                "output_dir": folder / out,
            }  # fmt: skip
        keys |= {key.replace("__", "."): value for key, value in settings.items()}
        argv = [command, *(text for key, value in keys.items() for text in (f"--{key}", str(value)))]
        return forks.run(argv, ranks, folder / "logs", DPO_DS_CACHE=str(folder / "derived"))

    return type("World", (), {"folder": folder, "run": staticmethod(run)})


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def adapted(world):
    codes, output = world.run("adapter", reference__kind="adapter", checkpoint__every=2)
    assert codes == [0, 0], output
    return world.folder / "adapter"


def test_the_first_step_is_the_reference_and_it_learns(adapted):
    first, *_, last = lines(adapted)
    assert first["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert first["rewards/margins"] == 0 and first["grad_norm"] > 0
    assert last["loss"] < first["loss"]


@pytest.mark.parametrize("kind", ["live", "cached"])
def test_every_kind_of_reference_gives_the_same_run(world, adapted, kind):
    settings = {"reference__kind": kind}
    if kind == "cached":
        settings["reference__cache"] = world.folder / "cache"
        filling = {"command": "precompute", "reference__cache": world.folder / "cache", "precompute__shard_rows": 16}
        assert world.run(**filling)[0] == [0, 0]
    codes, output = world.run(kind, **settings)
    assert codes == [0, 0], output
    for a, b in zip(lines(adapted), lines(world.folder / kind), strict=True):
        assert [a[key] for key in EXACT] == pytest.approx([b[key] for key in EXACT], abs=1e-4, rel=1e-5)


def test_final_holds_the_adapters_that_were_trained(world, adapted):
    final = adapted / "final"
    assert not list(final.glob("model*.safetensors")) and not (final / "config.json").exists()
    saved = load_file(final / "adapter_model.safetensors")
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert len(saved) == 2 * 2 * len(layers), "A and B, two layers"
    assert saved["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"].shape == (4, 32)
    assert all(tensor.abs().max() > 0 for tensor in saved.values()), "B started at zero"
    config = json.loads((final / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert config["base_model_name_or_path"] == str(world.folder / "model")
    base = AutoModelForCausalLM.from_pretrained(world.folder / "model")
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        plain = base(ids).logits
        by_peft = PeftModel.from_pretrained(base, final)(ids).logits
        by_transformers = AutoModelForCausalLM.from_pretrained(final)(ids).logits
    assert torch.equal(by_peft, by_transformers)
    assert (by_peft - plain).abs().max() > 1e-3


def test_the_adapters_folder_is_a_model_for_other_commands(world, adapted):
    """train goes on from there without adapters; evaluate measures it against its base."""
    final = adapted / "final"
    keys = {"model__path": final, "model__lora__r": 0, "train__max_steps": 1}
    codes, output = world.run("on", **keys)
    assert codes == [0, 0], output
    merged = [line for line in output.splitlines() if "merged into" in line]
    assert len(merged) == 1 and f"{final}: an adapter of {(world.folder / 'model').resolve()}; merged into" in merged[0]
    assert lines(world.folder / "on")[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert (world.folder / "on/final/model.safetensors").is_file()
    codes, output = world.run(
        command="evaluate", evaluate__policy=final, evaluate__against=world.folder / "model", evaluate__n=0,
        data__eval=world.folder / "train.jsonl", output_dir=world.folder / "measured",
    )  # fmt: skip
    assert codes == [0, 0], output
    report = json.loads((world.folder / "measured/evaluation.json").read_text())
    assert report["policies"][0]["pairs"]["rewards/margins"]["mean"] > 0, "the adapters have learnt these pairs"


def test_a_checkpoint_exports_to_the_same_adapters(world, adapted, forks):
    argv = ["export", adapted, "--to", world.folder / "exported"]
    codes, output = forks.run(argv, 1, world.folder / "logs")
    assert codes == [0], output
    final, exported = adapted / "final", world.folder / "exported"
    for name in ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json"):
        assert (final / name).read_bytes() == (exported / name).read_bytes()


def test_base_weights_and_adapters_are_sharded_and_adam_has_the_adapters_alone(world, forks):
    found = world.folder / "shards.json"
    argv = [world.folder / "model", found]
    codes, output = forks.run(argv, 2, world.folder / "logs", module="tests.workers.lora_shards")
    assert codes == [0, 0], output
    found = json.loads(found.read_text())
    assert found["whole"] == [] and found["trained"] == 28 and found["frozen"] > 14
    assert found["adam_elements"] == found["trained_elements"] // 2


def test_resuming_is_bit_exact_and_the_checkpoint_holds_the_adapters_alone(world, adapted):
    assert world.run("halves", reference__kind="adapter", train__max_steps=2)[0] == [0, 0]
    codes, output = world.run("halves", reference__kind="adapter", checkpoint__every=2)
    assert codes == [0, 0] and "resumed from" in output, output
    once, twice = lines(adapted), lines(world.folder / "halves")
    assert [[line[key] for key in EXACT] for line in twice] == [[line[key] for key in EXACT] for line in once]
    weights = [(out / "final" / "adapter_model.safetensors").read_bytes() for out in (adapted, world.folder / "halves")]
    assert weights[0] == weights[1]
    step = adapted / "checkpoints" / "step-00000004"
    adapters = sum(tensor.numel() for tensor in load_file(adapted / "final" / "adapter_model.safetensors").values())
    optimizer = sum(path.stat().st_size for path in step.glob("*optim_states.pt"))
    assert 12 * adapters < optimizer < 12 * adapters + 200_000, "fp32 weights and two moments"


def test_one_rank_with_recomputed_layers_gives_what_two_give(world, adapted):
    codes, output = world.run(
        "one", 1, reference__kind="adapter", train__activation_checkpointing="true", train__layout="padded"
    )
    assert codes == [0], output
    for a, b in zip(lines(adapted), lines(world.folder / "one"), strict=True):
        assert [a[key] for key in EXACT] == pytest.approx([b[key] for key in EXACT], abs=1e-4, rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"model__lora__r": 0}, ["reference.kind adapter", "--model.lora.r"]),
        ({"reference__path": "elsewhere"}, ["reference.kind adapter", "leave out reference.path"]),
        ({"model__lora__target_modules": "[lm_head]"}, ["head", "target modules"]),
        ({"model__lora__target_modules": "[q_projj]"}, ["--model.lora.target_modules", "q_proj"]),
    ],
)
def test_mistakes_are_one_line(world, settings, parts):
    codes, output = world.run("mistaken", 1, **{"reference__kind": "adapter"} | settings)
    line = next(line for line in output.splitlines() if line.startswith("dpo-ds: error: "))
    assert codes == [2] and [part for part in parts if part not in line] == [], output
