"""launch_scripts/slurm_train.sbatch on two Slurm nodes: trains, is told to stop, is cancelled, loses a node."""

import time

import pytest
import yaml

from tests.ranks import ROOT
from tests.small_jobs import EXACT, exact, status, steps, train_command, wait_for_step, weights
from tests.two_hosts.hosts import minute

SCRIPT = str(ROOT / "launch_scripts/slurm_train.sbatch")
STEPS = 20


def submit(slurm, world, out, *options, env=None, **settings) -> str:
    """A training job into world/out; the job's id."""
    command = train_command(world, out, **settings)
    env = {"DPO_DS_CACHE": str(world / "cache"), **(env or {})}
    return slurm.sbatch(*options, f"--output={world / out}.log", SCRIPT, *command, **env)


def rank_log(world, out, job, rank) -> list[str]:
    return (world / out / "logs" / f"job-{job}" / f"rank-{rank}.log").read_text().splitlines()


@pytest.fixture(scope="module")
def undisturbed(slurm, world):
    """The job that nothing happens to: its id and folder."""
    job = submit(slurm, world, "undisturbed", "--nodes=2", train__max_steps=STEPS)
    slurm.wait(job, "COMPLETED")
    return job, world / "undisturbed"


def test_sbatch_trains_on_two_nodes(slurm, world, undisturbed):
    job, folder = undisturbed
    assert slurm.job(job)["NodeList"] == "alpha,beta"
    assert status(folder) == {"state": "done", "reason": "", "step": STEPS, "exit_code": 0}
    assert "ranks: 2" in (folder / "config.yaml").read_text()
    assert [line[0] for line in exact(folder)] == list(range(1, STEPS + 1))
    for rank in (0, 1):
        assert all(line.startswith(f"{rank}: ") for line in rank_log(world, folder.name, job, rank))
    assert any(f"step {STEPS}/{STEPS}" in line for line in rank_log(world, folder.name, job, 0))
    assert "srun --kill-on-bad-exit=1" in (world / f"{folder.name}.log").read_text()  # it prints what it runs


def test_usr1_saves_requeues_and_ends_as_if_nothing_had_happened(slurm, world, undisturbed):
    job = submit(slurm, world, "requeued", "--nodes=2", train__max_steps=STEPS)
    wait_for_step(world / "requeued", 5, 2 * minute())
    slurm.run("scancel", "--signal=USR1", job)  # to the steps' tasks, as --signal=USR1@120 does
    slurm.wait(job, "PENDING")
    stopped = status(world / "requeued")
    assert (stopped["state"], stopped["reason"], stopped["exit_code"]) == ("stopped", "SIGUSR1 received", 75)
    assert 5 <= stopped["step"] < STEPS
    assert slurm.wait(job, "COMPLETED")["Restarts"] == "1"
    assert f"scontrol requeue {job}" in (world / "requeued.log").read_text()
    assert any("resumed from" in line for line in rank_log(world, "requeued", job, 0))
    _, whole = undisturbed
    assert exact(world / "requeued") == exact(whole)
    assert weights(world / "requeued") == weights(whole)


def test_scancel_leaves_a_complete_checkpoint(slurm, world):
    job = submit(slurm, world, "cancelled", "--nodes=2", train__max_steps=1000)
    wait_for_step(world / "cancelled", 3, 2 * minute())
    slurm.run("scancel", job)
    slurm.wait(job, "CANCELLED")
    slurm.wait_for_idle("alpha", "beta")
    stopped = status(world / "cancelled")
    assert (stopped["state"], stopped["reason"]) == ("stopped", "SIGTERM received")
    assert (world / "cancelled/checkpoints/latest").read_text().strip() == f"step-{stopped['step']:08}"
    assert "scontrol requeue" not in (world / "cancelled.log").read_text()
    again = submit(slurm, world, "cancelled", "--nodes=2", train__max_steps=stopped["step"] + 1)  # checks every hash
    slurm.wait(again, "COMPLETED")
    assert any(f"resumed from {world}" in line for line in rank_log(world, "cancelled", again, 0))


def test_a_wrong_key_ends_the_job_before_any_rank_starts(slurm, world):
    job = submit(slurm, world, "typo", "--nodes=2", train__max_step=5)
    assert slurm.wait(job, "FAILED")["ExitCode"] == "2:0"
    (line,) = (world / "typo.log").read_text().splitlines()
    assert line.startswith("dpo-ds: error: unknown key --train.max_step; did you mean")


def test_a_lost_node_ends_the_job_by_name_and_one_node_finishes_it(slurm, world, hosts, undisturbed):
    env = {"DPO_DS_PEER_SECONDS": "5"}
    job = submit(slurm, world, "lost", "--nodes=2", env=env, train__max_steps=STEPS, checkpoint__every=5)
    wait_for_step(world / "lost", 7, 2 * minute())
    hosts["beta"].cable("down")
    lost = time.monotonic()
    hosts["beta"].kill_all()
    try:
        while status(world / "lost")["state"] == "running":
            assert time.monotonic() - lost < minute()
            time.sleep(0.2)
        slurm.wait(job, "PENDING", "FAILED", "NODE_FAIL")  # --requeue: Slurm itself puts it back, for another node
        failed = status(world / "lost")
        assert failed["state"] == "failed" and failed["exit_code"] == 1
        assert failed["reason"].startswith("rank 1 gave no sign of life for 5 s at step ")
        assert any(failed["reason"] in line for line in rank_log(world, "lost", job, 0))
        slurm.run("scancel", job)
        again = submit(slurm, world, "lost", "--nodes=1", train__max_steps=STEPS)
        assert slurm.wait(again, "COMPLETED")["NodeList"] == "alpha"
    finally:
        hosts["beta"].cable("up")
        slurm.start_node("beta")
        slurm.wait_for_idle("alpha", "beta")
    assert any("step-00000005" in line and "resumed" in line for line in rank_log(world, "lost", again, 0))
    for line, expected in zip(exact(world / "lost"), exact(undisturbed[1]), strict=True):
        assert line == pytest.approx(expected, rel=1e-4), f"one rank instead of two: {('step', *EXACT)}"


def test_the_pipeline_runs_each_stage_after_the_one_before(slurm, world):
    config = world / "pipeline.yaml"
    keys = {
        "model": {"path": str(world / "model")},
        "data": {"train": str(world / "train.jsonl"), "eval": str(world / "eval.jsonl")},
        "deepspeed": {"config": str(ROOT / "ds_configs/zero3_cpu.json")},
        "train": {"global_batch_size": 8, "micro_batch_tokens": 600, "learning_rate": 1e-3, "max_steps": 3},
        "evaluate": {"n": 0, "bootstrap": 50},
    }
    config.write_text(yaml.safe_dump(keys))
    script = ROOT / "launch_scripts/slurm_pipeline.sh"
    out = world / "pipeline"
    options = ["--nodes=2", f"--output={world}/%x.log"]
    done = slurm.run("bash", script, config, out, *options, DPO_DS_CACHE=str(world / "cache"))
    assert done.returncode == 0, done.stderr
    jobs = {line.split()[0]: line.split()[-1] for line in done.stdout.splitlines() if " is job " in line}
    assert list(jobs) == ["sft", "precompute", "train", "evaluate"]
    assert slurm.job(jobs["train"])["Dependency"].startswith(f"afterok:{jobs['precompute']}")
    for stage, job in jobs.items():
        assert slurm.wait(job, "COMPLETED", "FAILED", "CANCELLED")["JobState"] == "COMPLETED", (
            stage, (world / f"{stage}.log").read_text()[-2000:],
        )  # fmt: skip
    assert status(out / "dpo")["state"] == status(out / "evaluation")["state"] == "done"
    assert steps(out / "dpo")[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)  # policy and reference are the same
