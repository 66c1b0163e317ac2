"""The reward model on two ranks under ZeRO-3 against single-process autograd: main(OUT, FAMILY...).

Every family, in both layouts: the gradient of a global batch with margins and centring, evenly over ranks and
micro-batches with an empty one among them, then one update. Rank 0 writes what it saw to OUT as JSON.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoModelForSequenceClassification

from dpo_ds.batch import packed_batch, padded_batch
from dpo_ds.cluster import launch
from dpo_ds.cluster.process_group import enter, leave, quiet_libraries
from dpo_ds.config import ModelSection, TrainSection
from dpo_ds.config.deepspeed import Machine, fill_policy
from dpo_ds.demo.tiny import random_model, tiny_config
from dpo_ds.models.checks import settle_layout
from dpo_ds.models.engine import Policy
from dpo_ds.models.export import gathered_state_dict
from dpo_ds.models.reward_model import INITIAL_STD, RewardModel, load_classifier
from dpo_ds.training.objectives.reward import BradleyTerry, RewardObjective
from tests.oracle import relative_errors, reward_by_autograd
from tests.tiny import VOCAB, random_pairs

MARGINS = [0.0, 0.5, 1.0, 0.25, 2.0, 0.0, 1.5]
CENTERING = 0.05
HIDDEN = 32


def engine_config(ranks: int) -> dict:
    given = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    run = TrainSection(learning_rate=1e-2, max_grad_norm=0, global_batch_size=8)
    return fill_policy(given, "test", run, Machine(ranks, "cpu", False), HIDDEN)[0]


def check(path: str, layout: str, rank: int, ranks: int, device) -> dict:
    from deepspeed.utils import safe_get_full_grad

    ds_config = engine_config(ranks)
    policy = Policy(RewardModel(load_classifier(ModelSection(path=path), ds_config, seed=0)), ds_config, device)
    settled = settle_layout(layout, [policy])
    pairs = [replace(pair, margins=np.array([m])) for pair, m in zip(random_pairs(7), MARGINS, strict=True)]
    shares = [[pairs[:3], pairs[3:4]], [pairs[4:], []]]  # rank 1's second micro-batch is empty
    objective = RewardObjective(BradleyTerry(CENTERING))
    before, sums = gathered_state_dict(policy.causal_lm), 0
    for index, micro in enumerate(shares[rank]):
        loss, micro_sums = objective(policy, (packed_batch if layout == "packed" else padded_batch)(micro))
        policy.backward(loss * ranks / len(pairs), is_last=index == 1)
        sums = sums + micro_sums
    dist.all_reduce(sums)
    names = dict(policy.causal_lm.named_parameters())
    gradients = {name: safe_get_full_grad(parameter) for name, parameter in names.items()}
    norm = policy.step(1e-2)
    after = gathered_state_dict(policy.causal_lm)
    if rank != 0:
        return {}
    oracle = reward_by_autograd(path, pairs, MARGINS, CENTERING)
    errors = relative_errors(gradients, oracle.gradients)
    return {
        "settled": settled,
        "gradient_error": max(errors.values()),
        "worst": max(errors, key=errors.get),
        "loss": [sums[0].item() / len(pairs), oracle.loss],
        "norm": [norm, oracle.norm],
        "still": [name for name in names if torch.equal(before[name], after[name])],
    }


def new_head(path: str, rank: int, ranks: int, device) -> dict:
    """Of a causal language model that becomes a reward model: its body stays, its head is drawn from the seed."""
    ds_config = engine_config(ranks)
    policy = Policy(RewardModel(load_classifier(ModelSection(path=path), ds_config, seed=3)), ds_config, device)
    batch = padded_batch(random_pairs(2))
    with policy.evaluating():
        scores = policy.scores(batch).tolist()
    everyones = [None] * ranks
    dist.all_gather_object(everyones, scores)
    state = gathered_state_dict(policy.causal_lm)
    if rank != 0:
        return {}
    drawn = INITIAL_STD * torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(3))
    own = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1).state_dict()
    return {
        "equal_on_all_ranks": all(each == everyones[0] for each in everyones),
        "drawn": torch.equal(state["score.weight"], drawn),
        "changed": [name for name in own if not torch.equal(own[name], state[name])],
    }


def main(out: str, *families: str) -> None:
    place = launch.from_environment()
    quiet_libraries()
    device = enter(place)
    here = (place.rank, place.world_size, device)
    results = {}
    for family in families:
        config = tiny_config(family, VOCAB, hidden=HIDDEN)
        paths = [str(Path(out).parent / f"{family}-{kind}") for kind in ("classifier", "language-model")]
        if place.is_first:
            random_model(config).save_pretrained(paths[1])
            config.num_labels = 1
            torch.manual_seed(0)
            AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).save_pretrained(paths[0])
        dist.barrier()
        for layout in ("padded", "packed"):
            results[f"{family} {layout}"] = check(paths[0], layout, *here)
        results[f"{family} new head"] = new_head(paths[1], *here)
    if place.is_first:
        Path(out).write_text(json.dumps(results))
    leave()
