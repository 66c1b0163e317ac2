"""A checkpoint into an engine and out again: usage reshard.py MODEL DS_CONFIG SOURCE TARGET on any number of ranks.

SOURCE "new" makes one instead: two updates on random pairs. DS_CONFIG is JSON text. TARGET gets checkpoints/step-2.
"""

import json
import threading
from pathlib import Path

import torch

from dpo_ds.batch import padded_batch
from dpo_ds.checkpoint.manifest import open_folder
from dpo_ds.checkpoint.shards import load
from dpo_ds.checkpoint.writer import CheckpointWriter
from dpo_ds.cluster import launch
from dpo_ds.cluster.process_group import enter, leave, quiet_libraries
from dpo_ds.config import TrainConfig, TrainSection
from dpo_ds.config.deepspeed import Machine, fill_policy
from dpo_ds.models.causal_lm import LogProbModel
from dpo_ds.models.engine import Policy, own_slice
from dpo_ds.models.loading import load_causal_lm
from tests.tiny import random_pairs


def slices(engine) -> dict:
    """This rank's part of every weight, in the type that it computes with."""
    return {name: parameter.ds_tensor.detach() for name, parameter in engine.module.named_parameters()}


def check_slices(engine, rank: int, saved: list[dict]) -> None:
    """What the saving ranks put beside the engine's state, cut anew, is what the engine has loaded."""
    for name, parameter in engine.module.named_parameters():
        own = own_slice([weights[name] for weights in saved], parameter.ds_numel)
        length = max(0, min(len(own), parameter.ds_numel - rank * len(own)))  # without the padding
        assert own.dtype == parameter.ds_tensor.dtype
        assert torch.equal(own[:length], parameter.ds_tensor.detach()[:length]), name


def main(model: str, ds_config: str, source: str, target: str) -> None:
    place = launch.from_environment()
    quiet_libraries()
    device = enter(place)
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
        extras = load(policy.engine, checkpoint)
        assert [extra["rank"] for extra in extras] == list(range(checkpoint.world_size))
        check_slices(policy.engine, place.rank, [extra["weights"] for extra in extras])
    writer = CheckpointWriter(Path(target), run, {}, 0, threading.Lock(), print, lambda step: None)
    writer.save(policy.engine, 2, {"rank": place.rank, "weights": slices(policy.engine)}, wait=True)
    assert writer.newest == 2
    leave()
