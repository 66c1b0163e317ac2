"""An update by each algorithm on two ranks under ZeRO-3 against single-process autograd: main(OUT).

Groups lie unevenly on ranks and micro-batches, one of them empty. Rank 0 writes what it saw to OUT as JSON.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoModelForSequenceClassification

from dpo_ds.batch import packed_batch
from dpo_ds.cluster import launch
from dpo_ds.cluster.process_group import enter, leave, quiet_libraries
from dpo_ds.config import ModelSection, ReferenceSection, TrainSection
from dpo_ds.config.deepspeed import Machine, fill_policy, fill_reference
from dpo_ds.data.batching import Layout
from dpo_ds.data.prompts import Prompt
from dpo_ds.demo.tiny import random_model, tiny_config
from dpo_ds.losses import DPO
from dpo_ds.models.causal_lm import LogProbModel
from dpo_ds.models.checks import settle_layout
from dpo_ds.models.engine import Policy, load_frozen
from dpo_ds.models.generation import Completion
from dpo_ds.models.loading import load_causal_lm
from dpo_ds.models.reward_model import ValueModel, load_classifier
from dpo_ds.reference.live import LiveReference
from dpo_ds.training.objectives.preference import PreferenceObjective
from dpo_ds.training.rl import learners
from dpo_ds.training.rl.algorithms import GRPO, PPO, RLOO, Reinforce
from dpo_ds.training.rl.experience import Models
from dpo_ds.training.rl.learners import Critic, OnlinePreference, PolicyGradient, descend
from dpo_ds.training.rl.rollouts import Rollout
from tests.oracle import relative_errors
from tests.rl_oracle import BETA, CLIP, DECAY, VALUE_CLIP, RlOracle, drift
from tests.tiny import VOCAB, random_groups

HIDDEN = 32
SCORES = [[0.0, 1.0, 0.25], [2.0, -1.0, 0.5], [0.3, 0.2, 0.1], [1.0, 1.5, -0.5], [0.0, 0.75, 0.5]]
NAMES = ("reinforce", "rloo", "grpo", "ppo", "online_dpo")


def shares(groups):
    """Rank -> micro-batches; the last of rank 1 is empty."""
    return [[groups[:3], groups[3:4]], [groups[4:], []]]


def moved(measured):
    """As if the policy had had other log-probs when it drew."""
    drifts = [
        drift(g, c, t)
        for place, g in enumerate(measured.batch.indices)
        for c in range(3)
        for t in range(int(measured.batch.target_counts[3 * place + c]))
    ]
    return replace(measured, logps_N=measured.logps_N + torch.tensor(drifts))


def gradients_of(model) -> dict:
    from deepspeed.utils import safe_get_full_grad

    return {name: safe_get_full_grad(p).clone() for name, p in model.causal_lm.named_parameters()}


def main(out: str) -> None:
    place = launch.from_environment()
    quiet_libraries()
    device = enter(place)
    ranks, config = place.world_size, tiny_config("llama", VOCAB, hidden=HIDDEN)
    paths = {name: str(Path(out).parent / name) for name in ("policy", "reference", "critic")}
    if place.is_first:
        for seed, name in enumerate(("policy", "reference")):
            random_model(config, seed=seed).save_pretrained(paths[name])
        config.num_labels = 1
        torch.manual_seed(2)
        AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).save_pretrained(paths["critic"])
    dist.barrier()
    given = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    run, machine = TrainSection(learning_rate=0.0, max_grad_norm=0), Machine(ranks, "cpu", False)
    trained = fill_policy(given, "test", run, machine, HIDDEN)[0]
    frozen = load_frozen(
        ModelSection(path=paths["reference"]), fill_reference(given, "test", machine, HIDDEN)[0], device
    )
    policy = Policy(LogProbModel(load_causal_lm(ModelSection(path=paths["policy"]), trained)), trained, device)
    critic = Policy(ValueModel(load_classifier(ModelSection(path=paths["critic"]), trained, 0)), trained, device)
    reference = LiveReference(frozen, policy, ReferenceSection())
    models = Models(policy, reference, critic)
    layout = settle_layout("packed", models.all())[0]

    groups = random_groups((3,) * 5)
    batches = [packed_batch(own) for own in shares(groups)[place.rank]]
    as_drawn = models.measure(batches)
    own = Models(policy, LiveReference(policy, policy, ReferenceSection()), None).measure(batches)
    with torch.enable_grad():
        again = [policy.token_logps(batch) for batch in batches]
    same = all(torch.equal(one.logps_N, logps) for one, logps in zip(own, again, strict=True))
    first = {"ratio is 1": same, "kl": sum(one.nats()[0].item() for one in own)}
    for logps in again:
        policy.backward(0 * logps.sum(), is_last=logps is again[-1])  # every graph must be used
    policy.step(0.0)

    measured, scores = [moved(one) for one in as_drawn], [np.array(row) for row in SCORES]
    rollouts = [
        Rollout(i, Prompt("", group.prompt, ""), [Completion(ids, "", True) for ids in group.completions])
        for i, group in enumerate(groups)
    ]
    oracle = RlOracle(paths, groups, SCORES) if place.is_first else None
    results = {"layout": layout, "first": first}
    kinds = {"reinforce": Reinforce(CLIP), "rloo": RLOO(CLIP), "grpo": GRPO(CLIP), "ppo": PPO(CLIP, DECAY)}
    seen: dict = {}

    def kept(model, minibatch, loss, weight, rate):
        """`descend`, and what the gradients were before the update."""
        step = model.step
        model.step = lambda rate: (seen.__setitem__(model, gradients_of(model)), step(rate))[1]
        try:
            return descend(model, minibatch, loss, weight, rate)
        finally:
            model.step = step

    learners.descend = kept
    for name in NAMES:
        if name == "online_dpo":
            objective = PreferenceObjective(DPO(BETA), reference)
            learner = OnlinePreference(policy, objective, Layout(layout, 40, HIDDEN), 0.0)
        else:
            with_critic = Critic(critic, 0.0, VALUE_CLIP) if name == "ppo" else None
            learner = PolicyGradient(policy, kinds[name], with_critic, 0.0)
        [minibatch], told = learner.minibatches([list(range(5))], rollouts, scores, [measured], BETA)
        weight = torch.tensor(learner.weight(minibatch))
        dist.all_reduce(weight)
        means, norm = learner.update(minibatch, int(weight), lambda peak: peak, BETA)
        results[name] = {"told": told, "means": dict(zip(learner.names, means, strict=True)), "norm": norm}
        results[name]["micro_batches"] = [len(one.group_sizes if name == "online_dpo" else one.drawn.counts_C)
                                          for one in minibatch]  # fmt: skip
        if not place.is_first:
            continue
        loss = getattr(oracle, name)()
        loss, value_loss = loss if name == "ppo" else (loss, None)
        results[name]["loss"] = loss.item()
        errors = relative_errors(seen[policy], oracle.gradients(loss, oracle.policy))
        results[name]["error"] = max(errors.values())
        if value_loss is not None:
            results[name]["value_loss"] = value_loss.item()
            errors = relative_errors(seen[critic], oracle.gradients(value_loss, oracle.critic))
            results[name]["critic_error"] = max(errors.values())
    if place.is_first:
        Path(out).write_text(json.dumps(results))
    leave()

