"""Jobs whose ranks compute rows together (train.sequence_parallel): the same as ranks with rows of their own."""

import json
from types import SimpleNamespace

import pytest

from dpo_ds.commands.preflight import check_sequence
from dpo_ds.demo.tiny import random_model, save_tiny_model, special_ids, tiny_config, train_tokenizer
from dpo_ds.errors import ConfigError
from tests.ranks import ROOT
from tests.small_jobs import make_world, run, steps, train_command

pytestmark = pytest.mark.distributed
STEPS = {"train__max_steps": 3, "train__learning_rate": 1e-4}
TOGETHER = {"train__sequence_parallel": 2}
WAYS = {
    "preferences": ("train", {"loss__name": "[dpo, aot]", "data__eval": "eval.jsonl"}),
    "discounted and weighted": ("train", {"loss__ld_alpha": 0.3, "loss__wpo": True}),
    "parked": ("train", {"train__activation_memory": "offload"}),
    "adapters": ("train", {"model__lora__r": 4, "reference__kind": "adapter"}),
    "labels": ("train", {"data__train": "labels.jsonl", "loss__name": "kto"}),
    "compiled": ("train", {"train__activation_memory": "selective"}),
    "routers": ("train", {"model__path": "experts", "model__router_aux_loss": 2.0}),
    "supervised": ("sft", {}),
    "rewards": ("reward", {"data__eval": "eval.jsonl"}),
}
MEANS = ("loss", "grad_norm", "rewards/margins", "router_aux_loss", "eval_loss", "tokens", "pairs", "eval_pairs")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = make_world(tmp_path_factory.mktemp("sequences"))
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    with (folder / "labels.jsonl").open("w") as labels:
        for number, row in enumerate(rows):
            side = ("chosen", "rejected")[number % 2]
            row = {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
            print(json.dumps(row), file=labels)
    tokenizer = train_tokenizer([row["prompt"] + row["chosen"] for row in rows], vocab_size=300)
    config = tiny_config("qwen3_moe", len(tokenizer), hidden=32, **special_ids(tokenizer))
    save_tiny_model(folder / "experts", tokenizer, random_model(config))
    return folder


def job(forks, world, out: str, command: str = "train", ranks: int = 2, **settings):
    files = {key: world / value for key, value in settings.items() if str(value) in ("experts", "labels.jsonl")}
    files |= {key: world / value for key, value in settings.items() if key == "data__eval"}
    argv = train_command(world, out, command, **{**STEPS, **settings, **files})
    env = {"DPO_DS_CACHE": str(world / "cache"), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    return forks.run(argv, ranks, world / f"{out}.logs", **env)


def told(folder) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: line[key] for key in MEANS if key in line} for line in map(json.loads, lines)]


@pytest.mark.parametrize("way", WAYS)
def test_together_as_alone(forks, world, way):
    command, keys = WAYS[way]
    compiled = {"model__compile": True} if "compiled" in way else {}
    for out, more in ((f"{way} apart", {}), (f"{way} together", TOGETHER | compiled)):
        codes, output = job(forks, world, out, command, **keys, **more)
        assert codes == [0, 0] and "cannot be compiled" not in output, output
    apart, together = (told(world / f"{way} {how}") for how in ("apart", "together"))
    assert len(apart) >= 3 and len(apart) == len(together)
    for ours, theirs in zip(together, apart, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-5, abs=2e-6)


def precompute(forks, world, cache: str, ranks: int = 2, **settings):
    settings = {"deepspeed.config": ROOT / "ds_configs/zero3_cpu.json", **settings}
    keys = {"model.path": world / "model", "data.train": world / "train.jsonl", "reference.cache": world / cache}
    words = [text for key, value in (keys | settings).items() for text in (f"--{key}", str(value))]
    return forks.run(["precompute", *words], ranks, world / "precompute.logs", DPO_DS_CACHE=str(world / "cache"))


def test_one_cache_serves_both(forks, world):
    """Filled by ranks apart or together, it has the same bytes."""
    how = {"precompute.shard_rows": 16, "precompute.micro_batch_tokens": 700}
    for cache, ranks, more in (("cached", 2, {}), ("cached-together", 4, {"precompute.sequence_parallel": 2})):
        codes, output = precompute(forks, world, cache, ranks, **how, **more)
        assert codes == [0] * ranks, output
    shards = [sorted((world / cache).glob("shard-*")) for cache in ("cached", "cached-together")]
    assert len(shards[0]) == len(shards[1]) > 3
    assert [path.read_bytes() for path in shards[0]] == [path.read_bytes() for path in shards[1]]
    codes, output = precompute(forks, world, "none", **{"precompute.sequence_parallel": 2, "deepspeed.config": "none"})
    assert codes[0] == 2 and "replicas work alone; give a file to --deepspeed.config" in output, output
    keys = {"reference__kind": "cached", "reference__cache": world / "cached"}
    for out, more in (("cached apart", {}), ("cached together", TOGETHER)):
        codes, output = job(forks, world, out, **keys, **more)
        assert codes == [0, 0] and "8 pairs recomputed, within" in output, output
    for ours, theirs in zip(told(world / "cached together"), told(world / "cached apart"), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-5, abs=2e-6)


@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 1)])
def test_a_run_goes_on_with_another_number(forks, world, first, then):
    out, keys = f"from {first}", {"checkpoint__every": 2, "train__max_steps": 4}
    codes, output = run(forks, world, "whole", **{**STEPS, **keys})
    assert codes == [0, 0], output
    for size, last in ((first, 2), (then, 4)):
        now = {**STEPS, **keys, "train__max_steps": last, "train__sequence_parallel": size}
        codes, output = run(forks, world, out, **now)
        assert codes == [0, 0], output
    assert "resumed from" in output
    for ours, theirs in zip(steps(world / out), steps(world / "whole"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"train__sequence_parallel": 3}, "--train.sequence_parallel 3: the run has 2 ranks; take one of 1, 2"),
        ({"train__sequence_parallel": 2, "train__layout": "padded"}, "it needs train.layout packed"),
        (
            {"train__sequence_parallel": 2, "model__path": "odd"},
            "--train.sequence_parallel 2: its 3 attention heads cannot be dealt out to 2 ranks; take 1",
        ),
    ],
)
def test_what_cannot_be_spread_is_one_line(forks, world, keys, line):
    if not (world / "odd").exists():
        tokenizer = train_tokenizer(["odd"], vocab_size=300)
        config = tiny_config("llama", len(tokenizer), hidden=48, num_attention_heads=3, num_key_value_heads=1)
        save_tiny_model(world / "odd", tokenizer, random_model(config))
    keys = {key: world / value if key == "model__path" else value for key, value in keys.items()}
    codes, output = run(forks, world, "refused", **keys)
    assert codes[0] == 2 and line in output and output.count("dpo-ds: error") == 1, output


def test_a_reference_of_other_heads_is_refused_before_it_is_loaded():
    config, launch = SimpleNamespace(num_attention_heads=3, num_key_value_heads=3), SimpleNamespace(world_size=2)
    line = "--train.sequence_parallel 2 --reference.path: its 3 attention heads cannot be dealt out to 2 ranks; take 1"
    with pytest.raises(ConfigError, match=f"^{line}$"):
        check_sequence("train", 2, config, launch, "reference.path")
