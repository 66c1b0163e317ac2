"""A checkpoint into an engine and out again: usage reshard.py MODEL DS_CONFIG SOURCE TARGET on any number of ranks.

SOURCE "new" makes one instead: two updates on random pairs. DS_CONFIG is JSON text. TARGET gets checkpoints/step-2.
"""

import json
import threading
from pathlib import Path

from dpo_ds import launch
from dpo_ds.batch import padded_batch
from dpo_ds.checkpoint import CheckpointWriter, open_folder
from dpo_ds.config import TrainConfig, TrainSection
from dpo_ds.ds_config import Machine, fill_policy
from dpo_ds.elastic import load
from dpo_ds.engine import Policy, finish_distributed, initialize_distributed, quiet_libraries
from dpo_ds.model import LogProbModel, load_causal_lm
from tests.tiny import random_pairs


def main(model: str, ds_config: str, source: str, target: str) -> None:
    place = launch.from_environment()
    quiet_libraries()
    device = initialize_distributed(place)
    sections = {"model": {"path": model}, "data": {"train": "-"}, "deepspeed": {"config": "-"}, "output_dir": target}
    run = TrainConfig.model_validate(sections)
    settings = TrainSection(learning_rate=1e-2, weight_decay=0.1, global_batch_size=8)
    filled, _ = fill_policy(json.loads(ds_config), "test", settings, Machine(place.world_size, "cpu", False), 32)
    policy = Policy(LogProbModel(load_causal_lm(run.model, filled)), filled, device)
    if source == "new":
        for seed in (1, 2):
            batch = padded_batch(random_pairs(3, seed=seed + 10 * place.rank))
            policy.backward(-policy.token_logps(batch).sum(), is_last=True)
            policy.step(1e-2)
    else:
        checkpoint, problem = open_folder(Path(source))
        assert checkpoint, problem
        load(policy.engine, checkpoint)
    writer = CheckpointWriter(Path(target), run, {}, 0, threading.Lock(), print)
    assert writer.save(policy.engine, 2)
    finish_distributed()
