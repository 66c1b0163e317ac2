"""How long a save blocks: usage save_time.py MODEL TARGET OUT COUNT; rank 0 writes the seconds of each save to OUT."""

import json
import threading
import time
from pathlib import Path

import torch.distributed as dist

from dpo_ds import launch
from dpo_ds.batch import padded_batch
from dpo_ds.checkpoint import CheckpointWriter
from dpo_ds.config import TrainConfig, TrainSection
from dpo_ds.ds_config import Machine, fill_policy
from dpo_ds.engine import Policy, finish_distributed, initialize_distributed, quiet_libraries
from dpo_ds.model import LogProbModel, load_causal_lm
from tests.tiny import random_pairs


def main(model: str, target: str, out: str, count: str) -> None:
    place = launch.from_environment()
    quiet_libraries()
    device = initialize_distributed(place)
    sections = {"model": {"path": model}, "data": {"train": "-"}, "deepspeed": {"config": "-"}, "output_dir": target}
    run = TrainConfig.model_validate(sections | {"checkpoint": {"keep": 1}})
    filled, _ = fill_policy({}, "benchmark", TrainSection(), Machine(place.world_size, "cpu", False), 256)
    policy = Policy(LogProbModel(load_causal_lm(run.model, filled)), filled, device)
    policy.backward(-policy.token_logps(padded_batch(random_pairs(1))).sum(), is_last=True)
    policy.step(1e-6)
    writer = CheckpointWriter(Path(target), run, {}, 0, threading.Lock(), print)
    seconds = []
    for step in range(1, int(count) + 1):
        dist.barrier()
        started = time.perf_counter()
        assert writer.save(policy.engine, step)
        seconds.append(time.perf_counter() - started)
    if place.is_first:
        Path(out).write_text(json.dumps(seconds))
    finish_distributed()
