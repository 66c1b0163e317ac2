"""Every loss and everything that composes with one, two ranks under ZeRO-3 against one process that sees all pairs at
once, and a reference that follows the policy: usage losses.py OUT SPREAD, over how many ranks each micro-batch's tokens
are spread. Rank 0 writes what it saw to OUT as JSON; the test asserts on it.
"""

import contextlib
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from transformers import AutoModelForCausalLM

from dpo_ds.__main__ import end
from dpo_ds.batch import Batch, Group, PairLogps, packed_batch
from dpo_ds.cluster import collectives, launch
from dpo_ds.cluster.process_group import enter, leave, quiet_libraries
from dpo_ds.config import LossSection, ModelSection, ReferenceSection, TrainSection
from dpo_ds.config.deepspeed import Machine, fill_policy, fill_reference
from dpo_ds.data.batching import Layout
from dpo_ds.demo.tiny import random_model, tiny_config
from dpo_ds.losses import LOSSES, make_loss
from dpo_ds.models.causal_lm import LogProbModel
from dpo_ds.models.checks import settle_layout, settle_sequence
from dpo_ds.models.engine import Policy, load_frozen
from dpo_ds.models.export import gathered_state_dict
from dpo_ds.models.loading import load_causal_lm
from dpo_ds.reference.live import LiveReference
from dpo_ds.training.feed import Feed
from dpo_ds.training.objectives.labelled import LabelledObjective
from dpo_ds.training.objectives.preference import PreferenceObjective
from dpo_ds.training.objectives.shaping import Shaping
from tests.tiny import VOCAB, as_pairs, random_groups, random_pairs

CASES = {name: {"name": name} for name, loss in LOSSES.items() if not loss.of_labels} | {
    "sum": {"name": ["dpo", "aot", "orpo"], "weights": [0.5, 2.0, 0.1]},
    "ld": {"ld_alpha": 0.3},
    "sft": {"sft_weight": 0.7},
    "wpo": {"wpo": True},
    "forward_kl": {"divergence": "forward_kl", "name": "ipo"},
    "js": {"divergence": "js"},
    "alpha": {"divergence": "alpha", "divergence_alpha": 0.5},
    "all": {"ld_alpha": 0.3, "sft_weight": 0.7, "wpo": True, "divergence": "js", "name": ["dpo", "hinge"]},
}
PAIRS = random_pairs(7)
GROUPS = random_groups((2, 4, 3, 7, 2))
SHARES = [[PAIRS[:3], PAIRS[3:4]], [PAIRS[4:], []]]  # rank 1's second micro-batch is empty
GROUP_CASES = {
    "groups": {},
    "groups with a discount and a likelihood": {"name": "ipo", "ld_alpha": 0.3, "sft_weight": 0.2},
    "groups weighted": {"wpo": True},
    "rankings": {"name": "plackett_luce"},
}
LABELLED_CASES = {
    "labels, kto": {"name": "kto", "desirable_weight": 1.5, "undesirable_weight": 0.5},
    "labels, bco": {"name": "bco", "desirable_weight": 1.0, "undesirable_weight": 2.0},
}
SCORES = {
    "reverse_kl": lambda x: x,
    "forward_kl": lambda x: 1 - torch.exp(-x),
    "js": lambda x: math.log(2) + torch.nn.functional.logsigmoid(x),
    "alpha": lambda x: 2 * (1 - torch.exp(-x / 2)),  # (e^((α-1)x) - 1) / (α-1) at α = 1/2
}


def completion(model, pair, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the trained tokens of one completion: their log-probs, and log Σ p² where they stand."""
    ids = torch.tensor([*pair.prompt, *getattr(pair, side)])
    positions = len(pair.prompt) + torch.from_numpy(pair.target_positions(["chosen", "rejected"].index(side)))
    rows = model(input_ids=ids[None]).logits[0].log_softmax(-1)[positions - 1]
    return rows.gather(1, ids[positions][:, None])[:, 0], (2 * rows).logsumexp(-1)


def oracle(policy, reference, section: LossSection) -> float:
    """The loss of all pairs in one call, and its gradient in `policy`; the parts written out here again."""
    columns = {"policy": [], "reference": [], "plain": [], "weights": [], "counts": []}
    for pair in PAIRS:
        (chosen, chosen_p2), (rejected, rejected_p2) = (
            completion(policy, pair, side) for side in ("chosen", "rejected")
        )
        with torch.no_grad():
            anchors = [completion(reference, pair, side)[0] for side in ("chosen", "rejected")]
        shorter = min(len(chosen), len(rejected))

        def discounted(logps, shorter=shorter):
            return logps[:shorter].sum() + section.ld_alpha * logps[shorter:].sum()

        columns["policy"].append(torch.stack([discounted(chosen), discounted(rejected)]))
        columns["reference"].append(torch.stack([discounted(anchor) for anchor in anchors]))
        columns["plain"].append(chosen.sum())
        columns["counts"].append(torch.tensor([len(chosen), len(rejected)]))
        likeness = (chosen - chosen_p2).mean() + (rejected - rejected_p2).mean()
        columns["weights"].append(likeness.detach().exp())
    found = {name: torch.stack(values) for name, values in columns.items()}
    counts = found["counts"].unbind(1)
    logps, anchor = (PairLogps(*found[name].unbind(1), *counts) for name in ("policy", "reference"))
    if section.divergence != "reverse_kl":
        score = SCORES[section.divergence]
        scores = (score(logps.chosen - anchor.chosen), score(logps.rejected - anchor.rejected))
        zeros = torch.zeros(len(PAIRS))
        logps, anchor = PairLogps(*scores, *counts), PairLogps(zeros, zeros, *counts)
    of_pairs = make_loss(section)
    losses = of_pairs(logps, anchor if of_pairs.needs_reference else None)
    if section.wpo:
        losses = losses * found["weights"]
    loss = (losses - section.sft_weight * found["plain"] / counts[0]).mean()
    policy.zero_grad()
    loss.backward()
    return loss.item()


def own_batches(shares: list[list[list[Group]]]) -> list[Batch]:
    """This rank's micro-batches of the shares of two; ranks of one sequence group have both shares together."""
    spread = collectives.sequence_size(), collectives.sequence_place()
    if spread[0] == 1:
        return [packed_batch(groups) for groups in shares[collectives.rank()]]
    return [packed_batch(groups).spread(*spread) for share in shares for groups in share]


def check(policy: Policy, reference, section: LossSection, models, rank: int, ranks: int) -> dict:
    loss = make_loss(section)
    objective = PreferenceObjective(loss, reference if loss.needs_reference else None, Shaping.of(section))
    batches = own_batches(SHARES)
    objective.begin(policy, batches)
    sums = 0
    for index, batch in enumerate(batches):
        loss, micro_sums = objective(policy, batch)
        policy.backward(loss * ranks / len(PAIRS), is_last=index == len(batches) - 1)
        sums = sums + micro_sums
    loss = collectives.reduce_data(sums)[0].item() / len(PAIRS)
    gradients = {name: safe_get_full_grad(parameter) for name, parameter in policy.causal_lm.named_parameters()}
    policy.step(0.0)
    if rank != 0:
        return {}
    expected = oracle(*models, section)
    worst = max(((gradients[name] - p.grad).norm() / p.grad.norm()).item() for name, p in models[0].named_parameters())
    return {"loss": [loss, expected], "gradient_error": worst}


def check_groups(policy: Policy, reference, section: LossSection, models, rank: int, ranks: int) -> dict:
    """The same comparisons as groups and as pairs, by two ranks, one with an empty micro-batch; of losses of whole
    groups one process is what they are held against."""
    loss = make_loss(section)
    objective = PreferenceObjective(loss, reference, Shaping.of(section))
    found = []
    for change in (None,) if loss.per_group else (None, as_pairs):
        shares = [[GROUPS[:2], GROUPS[2:3]], [GROUPS[3:], []]]
        changed = [[[row for g in groups for row in (change(g) if change else [g])] for groups in share]
                   for share in shares]  # fmt: skip
        batches = own_batches(changed)
        weight = collectives.reduce_data(torch.tensor([float(sum(map(objective.weight, batches)))])).item()
        sums = 0
        for index, batch in enumerate(batches):
            value, micro_sums = objective(policy, batch)
            policy.backward(value * ranks / weight, is_last=index == len(batches) - 1)
            sums = sums + micro_sums
        means = (collectives.reduce_data(sums) / weight).tolist()
        found.append((means, {name: safe_get_full_grad(p) for name, p in policy.causal_lm.named_parameters()}))
        policy.step(0.0)
    if loss.per_group:
        policy_lm, reference_lm = models
        policy_lm.zero_grad()
        values = []
        for group in GROUPS:
            scores = []
            for i in range(len(group.completions)):
                alone = Group.pair(group.prompt, *(group.completions[i],) * 2, *(group.masks[i],) * 2)
                with torch.no_grad():
                    anchor = completion(reference_lm, alone, "chosen")[0].sum()
                scores.append(section.beta * (completion(policy_lm, alone, "chosen")[0].sum() - anchor))
            ranking = range(len(scores))  # best first
            values.append(-sum((scores[i] - torch.stack(scores[i:]).logsumexp(0)) for i in ranking))
        mean = torch.stack(values).mean()
        mean.backward()
        found.append(([mean.item()], {name: p.grad for name, p in policy_lm.named_parameters()}))
    if rank != 0:
        return {}
    (means, gradients), (expected_means, expected) = found
    norm = torch.stack([g.norm() for g in expected.values()]).norm()
    error = torch.stack([(gradients[name] - g).norm() for name, g in expected.items()]).norm() / norm
    return {"means": [means, expected_means], "gradient_error": error.item()}


class Labelled(list):
    """As much of a data set as a feed looks at: single completions, every other one desirable."""

    def __init__(self, pairs):
        super().__init__(
            Group(pair.prompt, (pair.rejected,), (pair.masks[1],), labels=np.array([place % 2 == 0]), index=place)
            for place, pair in enumerate(pairs)
        )
        self.prompt_lengths = np.array([len(group.prompt) for group in self])
        self.completion_lengths = np.array([[len(group.chosen)] for group in self])


def check_labelled(policy: Policy, reference, section: LossSection, models, rank: int, ranks: int) -> dict:
    """One global batch by two ranks, of which one has more to do, against one process that follows the papers."""
    data, loss = Labelled(PAIRS), make_loss(section)
    loss = replace(loss, delta=0.3) if section.name == "bco" else loss
    objective = LabelledObjective(loss, reference)
    rows = np.array([4, 0, 6, 2, 5, 1, 3])
    spread = collectives.sequence_size()
    layout = Layout("packed", 24 * spread, 32, (spread, collectives.sequence_place()))
    where = collectives.data_rank(), collectives.data_ranks()
    with contextlib.closing(Feed([(1, rows)], data, layout, *where, policy.device, loss.needs_kl)) as feed:
        batch = feed.following()
    objective.begin(policy, batch.micro_batches, batch.mismatched)
    sums = 0
    for micro_batch in batch.micro_batches:
        value, micro_sums = objective(policy, micro_batch)
        policy.backward(value * ranks / len(rows), is_last=micro_batch is batch.micro_batches[-1])
        sums = sums + micro_sums
    means = dict(zip(objective.names, (collectives.reduce_data(sums) / len(rows)).tolist(), strict=True))
    gradients = {name: safe_get_full_grad(p) for name, p in policy.causal_lm.named_parameters()}
    policy.step(0.0)
    if rank != 0:
        return {}

    def logratio(prompt, ids, mask):
        alone = Group.pair(prompt, ids, ids, mask, mask)
        with torch.no_grad():
            anchor = completion(models[1], alone, "chosen")[0].sum()
        return completion(models[0], alone, "chosen")[0].sum() - anchor

    longest = max(len(data[row].prompt) + len(data[row].chosen) for row in rows)
    kl = []
    for row, other in zip(rows, np.roll(rows, -1), strict=True):
        room = longest - len(data[row].prompt)
        kl.append(logratio(data[row].prompt, data[other].chosen[:room], data[other].masks[0][:room]).item())
    z = max(0.0, sum(kl) / len(kl))
    values = []
    for row in rows:
        scores = section.beta * logratio(data[row].prompt, data[row].chosen, data[row].masks[0])
        sign, weight = (1, section.desirable_weight) if data[row].labels[0] else (-1, section.undesirable_weight)
        if section.name == "kto":
            values.append(weight * (1 - torch.sigmoid(sign * (scores - section.beta * z))))
        else:
            values.append(-weight * torch.nn.functional.logsigmoid(sign * (scores - 0.3)))
    models[0].zero_grad()
    mean = torch.stack(values).mean()
    mean.backward()
    expected = {name: p.grad for name, p in models[0].named_parameters()}
    norm = torch.stack([g.norm() for g in expected.values()]).norm()
    error = torch.stack([(gradients[name] - g).norm() for name, g in expected.items()]).norm() / norm
    found = {"loss": [means["loss"], mean.item()], "gradient_error": error.item(), "kl": kl}
    return found | {"baseline": means["rewards/baseline"], "expected_baseline": section.beta * z}


def follow(policy: Policy, frozen, paths: list[str]) -> dict:
    """The live reference after one soft update: its weights, and that its forward uses them."""
    settings = ReferenceSection(update_every=3, update_alpha=0.25)
    reference = LiveReference(frozen, policy, settings)
    batch = packed_batch(PAIRS)
    starts = [AutoModelForCausalLM.from_pretrained(path).state_dict() for path in paths]
    reference.after_step(2)
    before = reference.token_logps(batch)
    reference.after_step(3)
    after = reference.token_logps(batch)
    weights = gathered_state_dict(frozen.causal_lm)
    if not weights:
        return {}  # on all ranks but the first
    mixed = AutoModelForCausalLM.from_pretrained(paths[0])
    mixed.load_state_dict({name: 0.25 * starts[0][name] + 0.75 * starts[1][name] for name in starts[0]})
    mixed.eval()
    expected = [completion(mixed, pair, side)[0] for pair in PAIRS for side in ("chosen", "rejected")]
    return {
        "weights": max((weights[name] - tensor).abs().max().item() for name, tensor in mixed.state_dict().items()),
        "logps": (after - torch.cat(expected)).abs().max().item(),
        "moved": (after - before).abs().max().item(),
    }


def main(out: str, spread: str) -> None:
    place = launch.from_environment()
    quiet_libraries()
    device = enter(place)
    config = tiny_config("llama", VOCAB, hidden=32)
    paths = [str(Path(out).parent / name) for name in ("policy", "reference")]
    if place.is_first:
        for seed, path in enumerate(paths):
            random_model(config, seed).save_pretrained(path)
    dist.barrier()
    machine = Machine(place.world_size, "cpu", False)
    # Of the weights some stay gathered (norms) and some do not.
    given = {"zero_optimization": {"stage3_param_persistence_threshold": 100}}
    policy_config, _ = fill_policy(given, "test", TrainSection(global_batch_size=8), machine, 32)
    reference_config, _ = fill_reference(given, "test", machine, 32)
    policy = Policy(LogProbModel(load_causal_lm(ModelSection(path=paths[0]), policy_config)), policy_config, device)
    frozen = load_frozen(ModelSection(path=paths[1]), reference_config, device)
    assert settle_layout("packed", [policy, frozen]) == ("packed", "")
    settle_sequence(int(spread), "", [policy, frozen])
    models = [AutoModelForCausalLM.from_pretrained(path).eval() for path in paths]
    reference = LiveReference(frozen, policy, ReferenceSection())
    results = {
        name: check(policy, reference, LossSection(**{"beta": 0.5, **case}), models,
                    place.rank, place.world_size)
        for name, case in CASES.items()
    }  # fmt: skip
    for name, case in GROUP_CASES.items():
        section = LossSection(**{"beta": 0.5, **case})
        results[name] = check_groups(policy, reference, section, models, place.rank, place.world_size)
    for name, case in LABELLED_CASES.items():
        section = LossSection(**{"beta": 0.5, **case})
        results[name] = check_labelled(policy, reference, section, models, place.rank, place.world_size)
    results["follow"] = follow(policy, frozen, paths)  # last: it changes the reference
    if place.is_first:
        Path(out).write_text(json.dumps(results))
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
    end(0)
