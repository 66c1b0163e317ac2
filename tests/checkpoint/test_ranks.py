"""Saving and resuming with real ranks: bit-equal at the same number of them, within rounding at another."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from dpo_ds.checkpoint.manifest import open_folder
from dpo_ds.checkpoint.shards import KINDS, Shards
from dpo_ds.demo.tiny import random_model, tiny_config
from tests.ranks import ROOT
from tests.small_jobs import exact, make_world, run, start, status, steps, wait_for, wait_for_step, weights
from tests.tiny import VOCAB

pytestmark = pytest.mark.distributed

STEPS, AT = 24, 4
# More than three epochs, several micro-batches a step, evaluation in between, warm-up.
KEYS = {
    "train__max_steps": STEPS, "checkpoint__every": 2, "checkpoint__keep": 99, "train__eval_every": 3,
    "train__warmup_steps": 6, "train__micro_batch_tokens": 400,
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("checkpoints"), layers=1)


@pytest.fixture(scope="module")
def whole(forks, world):
    """The run that was never stopped: 24 steps on two ranks, every second saved."""
    codes, output = run(forks, world, "whole", **KEYS, data__eval=world / "eval.jsonl")
    assert codes == [0, 0], output
    return world / "whole"


def copy_until(source: Path, target: Path, step: int) -> None:
    """`target` becomes what `source` was when the process died right after saving `step`."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("final", "tensorboard"))
    for path in (target / "checkpoints").glob("step-*"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    (target / "checkpoints" / "latest").write_text(f"step-{step:08d}\n")


def test_resumed_at_the_same_number_of_ranks_every_bit_is_the_same(forks, world, whole):
    copy_until(whole, world / "again", 8)
    codes, output = run(forks, world, "again", **KEYS, data__eval=world / "eval.jsonl")
    assert codes == [0, 0] and "resumed from" in output and "step-00000008" in output, output
    assert len(exact(whole)) == STEPS and exact(world / "again") == exact(whole)
    logs = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (whole, world / "again")]
    evaluations = [[line["eval_loss"] for line in map(json.loads, log) if "eval_loss" in line] for log in logs]
    assert len(evaluations[0]) == 8 and evaluations[0] == evaluations[1]
    assert weights(world / "again") == weights(whole)


def test_with_a_cached_reference_too(forks, world):
    keys = {"model.path": world / "model", "data.train": world / "train.jsonl", "reference.cache": world / "cached"}
    argv = [text for key, value in keys.items() for text in (f"--{key}", value)]
    argv = ["precompute", *argv, "--deepspeed.config", ROOT / "ds_configs/zero3_cpu.json"]
    codes, output = forks.run(argv, 2, world / "precompute.logs", DPO_DS_CACHE=str(world / "cache"))
    assert codes == [0, 0], output
    cached = KEYS | {"train__max_steps": 8, "reference__kind": "cached", "reference__cache": world / "cached"}
    assert run(forks, world, "cached-whole", **cached)[0] == [0, 0]
    copy_until(world / "cached-whole", world / "cached-again", 4)
    codes, output = run(forks, world, "cached-again", **cached)
    assert codes == [0, 0] and "step-00000004" in output, output
    assert exact(world / "cached-again") == exact(world / "cached-whole")
    assert weights(world / "cached-again") == weights(world / "cached-whole")


@pytest.mark.parametrize("path", [(2, 1, 2), (1, 3, 2)], ids=str)
def test_another_number_of_ranks_goes_on_within_rounding(forks, world, whole, path):
    """4 steps on a number of ranks, 10 on another, 10 on a third, each from the checkpoint of the one before."""
    before = whole
    for stage, ranks in enumerate(path):
        out = f"{'-'.join(map(str, path))}-{stage}"
        if stage == 0 and ranks == 2:
            continue  # `whole` itself
        if stage:
            copy_until(before, world / out, (0, AT, AT + 10)[stage])
        until = (AT, AT + 10, STEPS)[stage]
        codes, output = run(forks, world, out, ranks, **KEYS | {"train__max_steps": until})
        assert codes == [0] * ranks, output
        if stage:
            assert f"saved by {path[stage - 1]} ranks, this run has {ranks}: resharding" in output
        before = world / out
    ours, theirs = steps(before), steps(whole)
    assert [line["tokens"] for line in ours] == [line["tokens"] for line in theirs], (
        "the same samples in the same order"
    )
    errors = [abs(a["loss"] / b["loss"] - 1) for a, b in zip(ours, theirs, strict=True)]
    print(f"relative difference of losses, {path}: {max(errors):.1e}")
    assert max(errors) < 1e-5


OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
SMALL_GROUPS = {
    "zero_optimization": {"sub_group_size": 3000}
}  # several sub-groups, cut elsewhere for every number of ranks
BF16 = {"bf16": {"enabled": True}}


@pytest.mark.parametrize("precision", [{}, BF16], ids=["fp32", "bf16"])
def test_resharding_moves_every_bit(forks, tmp_path, precision):
    """Weights, both moments and Adam's step: through other numbers of ranks, other sub-groups, offload or none."""
    model = tmp_path / "model"
    random_model(tiny_config("qwen2", VOCAB, hidden=32, tie_word_embeddings=True)).save_pretrained(model)
    source, seen = "new", []
    for ranks, settings in ((2, SMALL_GROUPS), (3, OFFLOAD), (1, {}), (4, OFFLOAD | SMALL_GROUPS)):
        target = tmp_path / str(ranks)
        argv = [model, json.dumps(settings | precision), source, target]
        codes, output = forks.run(argv, ranks, tmp_path / "logs", module="tests.workers.reshard")
        assert codes == [0] * ranks, output
        source = target / "checkpoints" / "step-00000002"
        checkpoint, problem = open_folder(source)
        assert checkpoint and not checkpoint.damage(), problem
        shards = Shards(checkpoint)
        seen.append(
            {
                (name, kind): torch.cat(list(shards.read(name, kind, 0, place.shape.numel())))
                for name, place in shards.slices.items()
                for kind in KINDS
            }
        )
        assert shards.step_count == 2
        assert [(group["weight_decay"], group["lr"]) for group in shards.hyper_parameters] == [(0.1, 0.01), (0, 0.01)]
    assert all(values.dtype == torch.float32 for values in seen[0].values())
    assert all(values.any() for (_, kind), values in seen[0].items() if kind == "exp_avg"), (
        "no moment is trivially equal"
    )
    for later in seen[1:]:
        assert later.keys() == seen[0].keys()
        assert [name for name in later if not torch.equal(later[name], seen[0][name])] == []


def test_a_full_disk_is_told_and_training_goes_on(forks, world, small_disk):
    """Room for one checkpoint and a half: the first save succeeds, the others do not, the run ends well."""
    (world / "full").mkdir()
    (world / "full" / "checkpoints").symlink_to(small_disk)
    keys = {"train__max_steps": 6, "checkpoint__every": 2}
    codes, output = run(forks, world, "full", **keys)
    assert codes == [0, 0], output
    told = [line for line in output.splitlines() if "NOT saved" in line]
    assert len(told) == 2 and "checkpoint of step 4 NOT saved: it needs " in told[0], output
    assert "are free in" in told[0] and told[0].endswith("; that of step 2 stays")
    assert sorted(path.name for path in small_disk.iterdir()) == ["latest", "step-00000002"]
    assert status(world / "full")["state"] == "done" and len(steps(world / "full")) == 6
    resumed, output = run(forks, world, "full", **keys | {"checkpoint__every": 0})
    assert resumed == [0, 0] and "step-00000002" in output


def test_a_disk_that_fills_up_beside_training_is_told_at_a_later_step(forks, world, small_disk):
    """Others take the room while the first save is written; then they go, and the second one succeeds."""
    (world / "filled").mkdir()
    (world / "filled" / "checkpoints").symlink_to(small_disk)
    keys = {"train__max_steps": 12, "checkpoint__every": 6}
    ranks = start(forks, world, "filled", env={"DPO_DS_SLOW_DISK": "0.005"}, **keys)
    wait_for(small_disk / "step-00000006.tmp" / "zero_pp_rank_1_mp_rank_00_model_states.pt")
    subprocess.run(["dd", "if=/dev/zero", f"of={small_disk / 'others'}", "bs=4k"], capture_output=True)
    wait_for_step(world / "filled", 10)
    (small_disk / "others").unlink()
    codes, output = ranks.codes(), ranks.output()
    assert codes == [0, 0], output
    (told,) = [line for line in output.splitlines() if "NOT saved" in line]
    assert re.match(r"checkpoint of step 6 NOT saved: rank [01]: No space left on device; it needs \d+ bytes, ", told)
    assert told.endswith("; there is none yet")
    assert sorted(path.name for path in small_disk.iterdir()) == ["latest", "step-00000012"]


def test_without_a_copy_training_waits_and_comes_to_the_same(forks, world, whole):
    codes, output = run(
        forks, world, "waiting", **KEYS, data__eval=world / "eval.jsonl", checkpoint__asynchronous=False
    )
    assert codes == [0, 0] and "checkpoint.asynchronous" not in output, output
    assert exact(world / "waiting") == exact(whole)
    for step in (2, STEPS):
        name = Path("checkpoints") / f"step-{step:08d}"
        ours, theirs = (Shards(open_folder(folder / name)[0]) for folder in (world / "waiting", whole))
        for parameter, place in theirs.slices.items():
            for kind in KINDS:
                pieces = [torch.cat(list(s.read(parameter, kind, 0, place.shape.numel()))) for s in (ours, theirs)]
                assert torch.equal(*pieces), f"{parameter} {kind} of step {step}"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 700 KB; a checkpoint has 420."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", folder], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"no right to mount a small file system: {mount.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)
