"""Signals, time limits, dead and hanging ranks, on real jobs."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from dpo_ds.checkpoint.manifest import open_folder
from dpo_ds.cluster import stopping
from dpo_ds.cluster.launch import free_port
from dpo_ds.cluster.stopping import StopFlag, check_end, deadline
from dpo_ds.config import CheckpointSection
from dpo_ds.errors import ConfigError
from tests.ranks import ROOT
from tests.small_jobs import exact, make_world, run, start, status, steps, train_command, wait_for_step, weights

STEPS = 30
KEYS = {"train__max_steps": STEPS, "train__schedule": "linear", "train__warmup_steps": 5}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("stopping"), hidden=16, layers=1)


@pytest.fixture(scope="module")
def whole(forks, world):
    codes, output = run(forks, world, "whole", **KEYS)
    assert codes == [0, 0], output
    assert not list((world / "whole" / "pids").iterdir()), "pids of ranks that have ended"
    return world / "whole"


@pytest.mark.distributed
@pytest.mark.parametrize("signum, rank", [(signal.SIGTERM, 0), (signal.SIGUSR1, 1)], ids=["TERM to 0", "USR1 to 1"])
def test_a_signal_to_any_rank_saves_and_the_run_goes_on_as_if_nothing_had_been(forks, world, whole, signum, rank):
    out = world / f"signalled-{rank}"
    ranks = start(forks, world, out.name, **KEYS)
    wait_for_step(out, 3)
    pids = {path.name.rpartition("-")[2]: int(path.read_text()) for path in (out / "pids").iterdir()}
    assert pids == {str(number): pid for number, pid in enumerate(ranks.pids)}
    os.kill(ranks.pids[rank], signum)
    os.kill(ranks.pids[rank], signum)  # ignored, as a launcher's second one must be
    assert ranks.codes() == [75, 75], ranks.output()
    said = status(out)
    done = said["step"]
    assert said == {"state": "stopped", "reason": f"{signum.name} received", "step": done, "exit_code": 75}
    assert 3 <= done < STEPS and [line["step"] for line in steps(out)] == list(range(1, done + 1))
    assert (out / "checkpoints" / "latest").read_text() == f"step-{done:08d}\n" and not (out / "final").exists()
    codes, output = run(forks, world, out.name, **KEYS)
    assert codes == [0, 0] and f"step-{done:08d}" in output, output
    assert exact(out) == exact(whole) and weights(out) == weights(whole)


@pytest.mark.distributed
def test_a_signal_within_an_evaluation_saves_at_once_and_the_evaluation_is_made_up_for(forks, world):
    long = world / "long.jsonl"
    long.write_text((world / "eval.jsonl").read_text() * 40)  # 100 batches
    keys = {"train__max_steps": 3, "train__eval_every": 2, "data__eval": long}
    out = world / "evaluating"
    ranks = start(forks, world, out.name, **keys)
    wait_for_step(out, 2)
    os.kill(ranks.pids[1], signal.SIGUSR1)
    assert ranks.codes() == [75, 75], ranks.output()
    before = (out / "metrics.jsonl").read_text()
    assert status(out)["step"] == 2 and before.count("\n") == 2 and "eval_loss" not in before
    codes, output = run(forks, world, out.name, **keys)
    assert codes == [0, 0], output
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], "eval_loss" in line) for line in lines] == [
        (1, False),
        (2, False),
        (2, True),
        (3, False),
        (3, True),
    ]


@pytest.mark.distributed
def test_a_time_limit_stops_unasked(forks, world):
    env = {"SLURM_JOB_END_TIME": str(int(time.time()) + 100)}
    codes, output = run(forks, world, "limited", env=env, **KEYS, checkpoint__save_before_end_seconds=200)
    assert codes == [75, 75], output
    assert status(world / "limited")["reason"] == "the time limit is near"


@pytest.mark.distributed
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_ends_the_job_by_name(forks, world, victim):
    out = world / f"killed-{victim}"
    ranks = start(forks, world, out.name, **KEYS)
    wait_for_step(out, 3)
    killed = time.monotonic()
    os.kill(ranks.pids[victim], signal.SIGKILL)
    codes = ranks.codes()
    assert time.monotonic() - killed < 10
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 1, ranks.output()
    said = status(out)
    assert (said["state"], said["exit_code"]) == ("failed", 1) and said["step"] >= 3
    assert said["reason"].startswith(f"rank {victim} died at step ") and said["reason"] in ranks.output()


@pytest.mark.distributed
def test_a_rank_that_freezes_ends_the_job_by_name_within_the_time_out(forks, world):
    out = world / "frozen"
    ranks = start(forks, world, out.name, env={"DPO_DS_PEER_SECONDS": "2"}, **KEYS)
    wait_for_step(out, 3)
    os.kill(ranks.pids[1], signal.SIGSTOP)
    threading.Timer(6, os.kill, (ranks.pids[1], signal.SIGKILL)).start()  # nobody else ends a stopped process here
    assert ranks.codes() == [1, -signal.SIGKILL], ranks.output()
    assert status(out)["reason"].startswith("rank 1 gave no sign of life for 2 s at step ")


@pytest.mark.distributed
def test_a_rank_that_hangs_or_fails_alone_is_named(forks, tmp_path):
    env = {"DPO_DS_HANG_SECONDS": "2"}
    codes, output = forks.run(["hang"], 3, tmp_path, module="tests.workers.peers", **env)
    assert codes == [1, 1, 1] and "rank 1 hangs at step 7: no rank got on for 2 s" in output, output
    codes, output = forks.run(["fail"], 3, tmp_path, module="tests.workers.peers")
    assert codes == [1, 1, 1] and "rank 1 failed at step 7: KeyError: 'lost'; this job ends" in output, output
    codes, output = forks.run(["end"], 3, tmp_path, module="tests.workers.peers", DPO_DS_HANG_SECONDS="1")
    assert codes == [0, 0, 0] and output == "", output


COMMANDS = {
    "sample": {"sample__n": 16, "sample__max_new_tokens": 120, "sample__shard_rows": 1, "sample__batch_size": 16},
    "precompute": {"precompute__shard_rows": 1, "precompute__micro_batch_tokens": 600},
    "evaluate": {"evaluate__n": 64, "evaluate__max_new_tokens": 120, "evaluate__batch_size": 8},
}


def start_command(forks, world: Path, command: str, out: Path):
    """A command that has no step, on two ranks, under way: a shard is there, or the first model begins to speak."""
    own = {"sample": {"model.path": world / "model", "sample.prompts": world / "train.jsonl", "sample.to": out}}
    long = world / "many.jsonl"
    rows = [json.loads(line) for line in (world / "train.jsonl").read_text().splitlines()]
    different = (row | {"prompt": f"{number}. {row['prompt']}"} for number in range(60) for row in rows)
    long.write_text("".join(json.dumps(row) + "\n" for row in different))  # equal pairs are computed once
    own["precompute"] = {"model.path": world / "model", "data.train": long, "reference.cache": out}
    own["evaluate"] = {"evaluate.policy": world / "model", "data.eval": world / "train.jsonl", "output_dir": out}
    keys = own[command] | {key.replace("__", "."): value for key, value in COMMANDS[command].items()}
    keys["deepspeed.config"] = "none"
    words = [command, *(text for key, value in keys.items() for text in (f"--{key}", str(value)))]
    ranks = forks.start(words, 2, world / f"{out.name}.logs", DPO_DS_CACHE=str(world / "cache"))
    began = time.monotonic()
    while not (any(out.rglob("shard-*.parquet")) or (command == "evaluate" and "completions each" in ranks.output())):
        if time.monotonic() - began > 100:
            ranks.kill()
            ranks.codes()
            raise AssertionError(ranks.output())
        time.sleep(0.02)
    time.sleep(0.5)
    return ranks


@pytest.mark.distributed
@pytest.mark.parametrize("signum, rank", [(signal.SIGINT, 1), (signal.SIGHUP, 0)], ids=["INT to 1", "HUP to 0"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_signal_to_any_rank_ends_a_command_without_steps_in_a_line(forks, world, command, signum, rank):
    out = world / f"{command}-{rank}"
    ranks = start_command(forks, world, command, out)
    os.kill(ranks.pids[rank], signum)
    assert ranks.codes() == [75, 75], ranks.output()
    kept = f"finished shards stay in {out}, and the same command goes on from there"
    kept = "the same command starts it again" if command == "evaluate" else kept
    output = ranks.output()
    assert output.count(f"dpo-ds: stopped: {signum.name} received; {kept}\n") == 1 and "Traceback" not in output, output
    if command == "evaluate":
        assert status(out)["state"] == "stopped" and status(out)["exit_code"] == 75


@pytest.mark.distributed
@pytest.mark.parametrize("command", COMMANDS)
def test_a_rank_that_dies_in_a_command_without_steps_is_named(forks, world, command):
    out = world / f"{command}-killed"
    ranks = start_command(forks, world, command, out)
    os.kill(ranks.pids[1], signal.SIGKILL)
    assert ranks.codes() == [1, -signal.SIGKILL], ranks.output()
    assert "dpo-ds: error: rank 1 died: its process ended without a word; this job ends" in ranks.output()
    if command == "evaluate":
        assert status(out)["reason"] == "rank 1 died: its process ended without a word"


def interrupt_all(launcher: subprocess.Popen) -> None:
    """Ctrl-C: SIGINT to the launcher, its helper and the ranks; the launcher signals the ranks a second time."""
    os.killpg(launcher.pid, signal.SIGINT)


def terminate_launch_py(launcher: subprocess.Popen) -> None:
    """What ends a node's part of a job: launch.py hands it to its ranks one by one and waits 30 s for each."""
    (launch_py,) = psutil.Process(launcher.pid).children()
    assert "deepspeed.launcher.launch" in launch_py.cmdline()
    launch_py.terminate()


@pytest.mark.distributed
@pytest.mark.parametrize("stop", [interrupt_all, terminate_launch_py])
def test_what_stops_the_launcher_saves_a_checkpoint(world, stop):
    out = world / stop.__name__
    launcher = [Path(sys.executable).with_name("deepspeed"), "--num_gpus", "2", "--master_port", str(free_port())]
    command = [*launcher, "--module", "dpo_ds", *train_command(world, out.name, **KEYS | {"train__max_steps": 2000})]
    env = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    env |= {"DPO_DS_CACHE": str(world / "cache")}
    process = subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        wait_for_step(out, 3, seconds=200)  # three interpreters that import deepspeed, one after the other
        stop(process)
        process.wait(60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    said = status(out)
    assert (said["state"], said["exit_code"]) == ("stopped", 75) and said["reason"].endswith(" received")
    checkpoint, problem = open_folder(out / "checkpoints" / f"step-{said['step']:08d}")
    assert checkpoint is not None and checkpoint.damage() == [], problem
    assert not list((out / "pids").iterdir()), "every rank came to its end"


class Ended(Exception):
    """Stands in for the end of the process."""


def test_a_second_ctrl_c_ends_at_once_but_not_inside_a_commit(monkeypatch, capfd):
    flag, clock, calls = StopFlag(), [100.0], []
    monkeypatch.setattr(stopping.time, "monotonic", lambda: clock[0])

    def end(code):
        raise Ended(code)

    monkeypatch.setattr(stopping.os, "_exit", end)
    for seconds, signum in ((0, signal.SIGINT), (0.0005, signal.SIGTERM), (1.9, signal.SIGINT), (60, signal.SIGTERM)):
        clock[0] = 100 + seconds
        flag._take(signum, lambda: calls.append("interrupted"))
    assert calls == [] and capfd.readouterr().err.count("ending with a checkpoint") == 1
    with flag.committing:
        late = threading.Thread(
            target=lambda: pytest.raises(Ended, flag._take, signal.SIGINT, lambda: calls.append("i"))
        )
        late.start()
        late.join(0.1)
        assert calls == [] and late.is_alive(), "it waits for the commit"
    late.join(10)
    assert calls == ["i"]


def test_the_deadline_is_before_the_earlier_end(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    assert deadline(CheckpointSection(time_limit_seconds=100), 1000.0) is None, "0: off"
    both = CheckpointSection(save_before_end_seconds=30, time_limit_seconds=100)
    assert deadline(both, 1000.0) == 1000 + 100 - 30
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1050")
    assert deadline(both, 1000.0) == 1050 - 30
    check_end(CheckpointSection(save_before_end_seconds=30))
    monkeypatch.delenv("SLURM_JOB_END_TIME")
    with pytest.raises(ConfigError, match="save_before_end_seconds 30 needs an end: SLURM_JOB_END_TIME is not set"):
        check_end(CheckpointSection(save_before_end_seconds=30))
