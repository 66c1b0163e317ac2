"""Looks at the model that will train: what it says before the first step, what one step changes, the memory it takes.

All ranks enter every function that runs the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo_ds.batch import Batch, Group
from dpo_ds.cluster import collectives
from dpo_ds.commands.doctor.report import FAIL, PASS, WARN, Finding
from dpo_ds.data.batching import Layout, Lengths, plan
from dpo_ds.memory.trace import PeakMemory
from dpo_ds.models.attention import canary_tolerance
from dpo_ds.models.causal_lm import freeze_beside_text
from dpo_ds.models.engine import Policy
from dpo_ds.training.objectives.objective import Objective

LOSS, REFERENCE, LEAK, MOVED, MEMORY = "loss", "reference", "cross-talk", "step", "memory"
LOSS_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
ABOVE, BELOW = 1.25, 0.5  # measured over expected memory
REMEDY_STILL = "no gradient reaches them, or train.learning_rate is lost in rounding"
SMALL = 256 << 20  # bytes below which what is left over elsewhere outweighs the model
CHUNK = 1 << 22


class Mirror:
    """Stands in for a policy that says what the reference says: what the loss's formula gives where both are equal."""

    def __init__(self, policy: Policy, reference):
        self._policy, self._reference = policy, reference

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def token_logps(self, batch: Batch) -> Tensor:
        return self._reference.token_logps(batch)


def one_micro_batch(data, rows: np.ndarray, layout: Layout) -> np.ndarray:
    """Returns the first of these rows, as many as make one micro-batch on every rank."""
    count = len(rows)
    while count > 1:
        micro_batches = len(plan(Lengths.of(data, rows[:count]), layout, collectives.data_ranks())[0])
        if micro_batches == 1:
            break
        count = max(1, count // micro_batches)
    return rows[:count]


def micro_batch(data, rows: np.ndarray, layout: Layout) -> Batch:
    """Returns this rank's micro-batch of these rows; it may be one without any."""
    places = plan(Lengths.of(data, rows), layout, collectives.data_ranks())[collectives.data_rank()][0]
    return layout.collate([data[int(rows[place])] for place in places])


def check_loss(trainer, objective: Objective, policy: Policy, rows: np.ndarray) -> list[Finding]:
    """Compares the loss before any step with what its formula gives where the policy is the reference."""
    objective = objective.for_evaluation()  # what a step adds to it needs gradients
    loss = trainer.means(objective, trainer.data, rows, 0)["loss"]
    reference = getattr(objective, "reference", None)
    if reference is None:
        vocabulary = policy.causal_lm.config.get_text_config().vocab_size
        is_reward = hasattr(policy.engine.module.causal_lm, "score")
        return judge_alone(loss, math.log(2) if is_reward else math.log(vocabulary), is_reward)
    trained, trainer.policy = trainer.policy, Mirror(policy, reference)
    try:
        expected = trainer.means(objective, trainer.data, rows, 0)["loss"]
    finally:
        trainer.policy = trained
    return judge_loss(loss, expected, _tolerance(policy))


def judge_loss(loss: float, expected: float, tolerance: float) -> list[Finding]:
    name = "ln 2" if abs(expected - math.log(2)) < 1e-6 else "its formula's value"
    figures = {"loss": loss, "expected": expected}
    if abs(loss - expected) <= tolerance * max(1.0, abs(expected)):
        text = f"{loss:.6f} before the first step, {name} as policy = reference gives"
        return [Finding(LOSS, PASS, text, figures=figures)]
    text = f"{loss:.6f} before the first step; where policy = reference it is {expected:.6f} ({name})"
    remedy = "let reference.path be the model that training starts from, and reference.cache be filled from it"
    return [Finding(LOSS, FAIL, text, remedy, figures)]


def judge_alone(loss: float, guess: float, is_reward: bool) -> list[Finding]:
    """Without a reference: the loss should not be far above that of guessing each token, or each pair."""
    figures = {"loss": loss}
    text = f"{loss:.4f} before the first step; guessing a {'pair' if is_reward else 'token'} costs {guess:.4f}"
    if not math.isfinite(loss):
        return [Finding(LOSS, FAIL, text, "look at the model's weights and its type", figures)]
    verdict, remedy = (WARN, "do tokenizer, model and data belong together?") if loss > guess + 1 else (PASS, "")
    return [Finding(LOSS, verdict, text, remedy, figures)]


def check_reference(objective: Objective, policy: Policy, batch: Batch) -> list[Finding]:
    """Compares the policy's log-probs with the reference's, token by token."""
    reference = getattr(objective, "reference", None)
    if reference is None:
        return [Finding(REFERENCE, PASS, "this run has none")]
    batch = batch.to(policy.device)
    with policy.evaluating():
        logps = reference.token_logps(batch)
        difference = (policy.token_logps(batch) - logps).abs()
        tolerance = _agreed_tolerance(policy, logps)
    worst = collectives.reduce_max(difference.max().item() if len(difference) else 0.0, policy.device)
    mean = collectives.reduce_max(difference.mean().item() if len(difference) else 0.0, policy.device)
    text, figures = f"log-probs of a token differ by {worst:.1e} at most, {mean:.1e} on average", {"worst": worst}
    if mean <= tolerance:
        return [Finding(REFERENCE, PASS, f"the policy's {text}", "", figures)]
    remedy = "it is another model: give reference.path the folder of model.path, or fill reference.cache from it"
    return [Finding(REFERENCE, FAIL, f"policy and reference: {text}", remedy, figures)]


def check_cross_talk(policy: Policy, layout: Layout, group: Group, is_reward: bool) -> list[Finding]:
    """Changes one completion's tokens at a time: what is said of the others must not move."""
    if len(group.completions) < 2:
        return [Finding(LEAK, PASS, "rows have one completion each")]
    vocabulary = policy.causal_lm.config.get_text_config().vocab_size
    worst = 0.0
    with policy.evaluating():
        usual = _of_completions(policy, layout, group, is_reward)
        tolerance = _agreed_tolerance(policy, torch.cat(usual))
        for place in range(len(group.completions)):
            changed = list(group.completions)
            changed[place] = (changed[place] + 1) % vocabulary
            now = _of_completions(policy, layout, replace(group, completions=tuple(changed)), is_reward)
            others = [(a - b).abs() for i, (a, b) in enumerate(zip(usual, now, strict=True)) if i != place]
            worst = max(worst, torch.cat(others).max().item())
    worst = collectives.reduce_max(worst, policy.device)
    what = "scores" if is_reward else "log-probs"
    text = f"another completion's tokens move {what} by {worst:.1e}"
    if worst <= tolerance:
        return [Finding(LEAK, PASS, f"chosen never sees rejected: {text}", "", {"worst": worst})]
    remedy = "the attention mask does not hold in this model; take train.layout padded, and report the model"
    return [Finding(LEAK, FAIL, f"a completion sees another one: {text}", remedy, {"worst": worst})]


def _of_completions(policy: Policy, layout: Layout, group: Group, is_reward: bool) -> list[Tensor]:
    batch = layout.collate([group]).to(policy.device)
    if is_reward:
        return list(policy.scores(batch).split(1))
    return list(policy.token_logps(batch).split(batch.target_counts.tolist()))


def digests(policy: Policy) -> dict[str, int]:
    """Returns a number for the bits of this rank's fp32 slice of every trained parameter, by name."""
    optimizer, found = policy.engine.optimizer, {}
    for group, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        offset = 0
        for parameter in group:
            length = parameter.partition_numel()
            found[policy.engine.param_names[parameter]] = bits(flat.detach().narrow(0, offset, length))
            offset += length
    return found


def bits(values: Tensor) -> int:
    """Sums the bit patterns, each times its odd place, modulo 2^64: equal for equal bits alone, but for a chance of
    some 2^-60.
    """
    total = 0
    for part in values.flatten().contiguous().view(torch.int32).split(CHUNK):
        places = torch.arange(1, 2 * len(part), 2, dtype=torch.int64, device=part.device)
        total = (31 * total + int((part.to(torch.int64) * places).sum())) & ((1 << 64) - 1)
    return total


def check_moved(policy: Policy, before: Mapping[str, int], has_adapters: bool) -> list[Finding]:
    """Looks which parameters one step has changed on any rank, and which it was not to."""
    after = digests(policy)
    names = sorted(after)
    flags = torch.tensor([float(after[name] != before[name]) for name in names], device=policy.device)
    moved = collectives.reduce_sum(flags).tolist()
    still = [name for name, count in zip(names, moved, strict=True) if not count]
    frozen = [] if has_adapters else unexpectedly_frozen(policy.causal_lm)
    beside = sum(not p.requires_grad for p in policy.causal_lm.parameters()) - len(frozen)
    return judge_moved(len(names), still, frozen, beside)


def unexpectedly_frozen(model) -> list[str]:
    """Returns parameters of a model without adapters that nothing trains, though they are the text model's."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    if not frozen:
        return []
    states = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(True)
    freeze_beside_text(model)
    meant = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    for parameter, state in states.items():
        parameter.requires_grad_(state)
    return sorted(frozen - meant)


def judge_moved(count: int, still: Sequence[str], frozen: Sequence[str], beside: int) -> list[Finding]:
    """count: trained parameters; still: those that one step left; frozen: those that were not meant to be; beside: how
    many were."""
    findings = []
    experts = [name for name in still if "expert" in name and "lora_" not in name]
    # LoRA's B begins at zero, so that no gradient reaches A before B has moved.
    waiting = [name for name in still if "lora_A" in name and name.replace("lora_A", "lora_B") not in still]
    others = sorted(set(still) - {*experts, *waiting})
    if frozen:
        text = f"{len(frozen)} parameters are frozen that should train ({', '.join(frozen[:3])})"
        findings.append(Finding(MOVED, FAIL, text, "look for what sets requires_grad to False (the model's own code?)"))
    if others:
        text = f"{len(others)} of {count} parameters did not move in one step ({', '.join(others[:3])})"
        findings.append(Finding(MOVED, FAIL, text, REMEDY_STILL))
    if experts:
        text = f"{len(experts)} experts did not move: no token of this micro-batch reached them ({experts[0]})"
        findings.append(Finding(MOVED, WARN, text, "no harm unless the router never picks them: model.router_aux_loss"))
    stay = f"; {beside} are frozen by design" if beside else ""
    wait = f"; {len(waiting)} of them begin with the next: lora_A behind a lora_B of zeros" if waiting else ""
    text = f"{'all ' * (not waiting)}{count - len(waiting)} trained parameters moved in one step{wait}{stay}"
    return findings or [Finding(MOVED, PASS, text)]


def judge_memory(measured: int, expected: int) -> list[Finding]:
    """Both in bytes, of the rank that holds most, at the step's peak."""
    figures = {"measured_bytes": measured, "expected_bytes": expected}
    text = f"{measured / 1e9:.2f} GB at the peak of a step, {expected / 1e9:.2f} GB expected"
    slack = SMALL if expected < SMALL else 0
    if measured > ABOVE * expected + slack:
        remedy = "lower train.micro_batch_tokens, or take train.activation_memory checkpoint; plan with the measured"
        return [Finding(MEMORY, FAIL, text, remedy, figures)]
    if measured < BELOW * expected - slack:
        return [Finding(MEMORY, WARN, text, "the estimate is too high here; a larger micro-batch may fit", figures)]
    return [Finding(MEMORY, PASS, text, figures=figures)]


def _agreed_tolerance(policy: Policy, outputs: Tensor) -> float:
    """Returns the same on all ranks, whatever their outputs are: of none at all, 0. All ranks enter."""
    own = canary_tolerance(policy.causal_lm, outputs) if len(outputs) else 0.0
    return collectives.reduce_max(own, policy.device)


def _tolerance(policy: Policy) -> float:
    dtype = next(parameter.dtype for parameter in policy.causal_lm.parameters() if parameter.is_floating_point())
    return LOSS_TOLERANCE[dtype]


@contextmanager
def measured(meter: PeakMemory | None, device: torch.device, peaks: list[int]) -> Iterator[None]:
    """Adds to `peaks` the most bytes that this rank's tensors take within the block.

    meter: has counted since before the model was loaded, on a CPU; None on a GPU, which counts itself.
    """
    if meter is None:
        torch.cuda.reset_peak_memory_stats(device)
    else:
        meter.begin("step")
    yield
    peaks.append(torch.cuda.max_memory_allocated(device) if meter is None else meter.peaks["step"])
