"""How long saves block, in turn with dd: usage save_time.py MODEL TARGET OUT ROUNDS; rank 0 writes the seconds to OUT.

A round is dd of as many bytes, a save that is waited for, undisturbed updates, and a save beside updates.
"""

import json
import os
import subprocess
import threading
import time
from pathlib import Path

import torch.distributed as dist

from dpo_ds.batch import padded_batch
from dpo_ds.checkpoint.writer import CheckpointWriter
from dpo_ds.cluster import launch
from dpo_ds.cluster.process_group import enter, leave, quiet_libraries
from dpo_ds.config import TrainConfig, TrainSection
from dpo_ds.config.deepspeed import Machine, fill_policy
from dpo_ds.models.causal_lm import LogProbModel
from dpo_ds.models.engine import Policy
from dpo_ds.models.loading import load_causal_lm
from tests.tiny import random_pairs

STEPS = 2  # undisturbed, and beside a save at least


def main(model: str, target: str, out: str, rounds: str) -> None:
    place = launch.from_environment()
    quiet_libraries()
    device = enter(place)
    sections = {"model": {"path": model}, "data": {"train": "-"}, "deepspeed": {"config": "-"}, "output_dir": target}
    run = TrainConfig.model_validate(sections | {"checkpoint": {"keep": 1}})
    filled, _ = fill_policy({}, "benchmark", TrainSection(), Machine(place.world_size, "cpu", False), 256)
    policy = Policy(LogProbModel(load_causal_lm(run.model, filled)), filled, device)
    batch = padded_batch(random_pairs(2))
    writer = CheckpointWriter(Path(target), run, {}, 0, threading.Lock(), print, lambda step: None)

    def update() -> None:
        policy.backward(-policy.token_logps(batch).sum(), is_last=True)
        policy.step(1e-6)

    def blocked(action, *args, **kwargs) -> float:
        dist.barrier()
        started = time.perf_counter()
        action(*args, **kwargs)
        return time.perf_counter() - started

    update()
    writer.save(policy.engine, 1)  # takes the memory of the copy
    writer.finish()
    (first,) = (Path(target) / "checkpoints").glob("step-*")
    size = sum(path.stat().st_size for path in first.iterdir())
    measured = []
    for step in range(2, 2 * int(rounds) + 2, 2):
        seconds = {"dd": blocked(dd, Path(target) / "dd", size) if place.is_first else blocked(lambda: None)}
        dist.barrier()
        seconds["waiting"] = blocked(writer.save, policy.engine, step, wait=True)
        seconds["update"] = sum(blocked(update) for _ in range(STEPS)) / STEPS
        seconds["beside"] = blocked(writer.save, policy.engine, step + 1)
        slowed = []
        while writer.newest < step + 1 or len(slowed) < STEPS:
            if writer.newest < step + 1:
                seconds["written after"] = len(slowed)
                seconds["beside"] += blocked(writer.commit_if_written)
            slowed.append(blocked(update))
        writing = slowed[: seconds["written after"]]
        seconds["update while writing"] = sum(writing) / len(writing)
        writer.finish()
        measured.append(seconds | {"bytes": size})
        if place.is_first:
            Path(out).write_text(json.dumps(measured))
    leave()


def dd(path: Path, size: int) -> None:
    """Writes and fsyncs `size` bytes."""
    os.sync()
    command = ["dd", "if=/dev/zero", f"of={path}", "bs=16M", f"count={size}", "iflag=count_bytes", "conv=fsync"]
    subprocess.run(command, check=True, capture_output=True)
