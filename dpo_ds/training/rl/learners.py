"""What becomes of an iteration's completions: updates of the policy, by policy gradients or by a loss of pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dpo_ds.batch import OF_A_PAIR, Group
from dpo_ds.cluster import collectives
from dpo_ds.data.batching import Layout
from dpo_ds.models.engine import Policy
from dpo_ds.training.objectives.preference import PreferenceObjective
from dpo_ds.training.rl.advantages import moments, whitened
from dpo_ds.training.rl.algorithms import Algorithm, Drawn
from dpo_ds.training.rl.experience import Measured, micro_batches
from dpo_ds.training.rl.rollouts import Rollout
from dpo_ds.training.rl.values import explained_variance, explanation_moments, value_losses

RateOf = Callable[[float], float]  # a peak learning rate -> this iteration's


class Learner(Protocol):
    """Makes minibatches of what was drawn, each a list of this rank's micro-batches, and an update of each."""

    names: tuple[str, ...]  # of an update's means, "loss" first

    def minibatches(
        self, shares: Sequence[Sequence[int]], rollouts: Sequence[Rollout], scores: Sequence[np.ndarray],
        measured: Sequence[Sequence[Measured]], beta: float,
    ) -> tuple[list[list[Any]], dict[str, float]]:  # fmt: skip
        """Returns them, and what is to be told of them. All ranks enter.

        shares: places in `rollouts` of each minibatch; scores: penalties taken off; measured: this rank's micro-batches
        of each share.
        """

    def weight(self, minibatch: Sequence[Any]) -> int:
        """Returns what this rank's part counts in the mean that is minimised."""

    def update(self, minibatch: Sequence[Any], weight: int, rate_of: RateOf, beta: float) -> tuple[list[float], float]:
        """Returns means of `names` over the global minibatch, whose weight is given and above 0, and the gradient norm
        before clipping. All ranks enter.
        """

    def state(self) -> dict:
        """Returns what this rank's part of a checkpoint keeps of it."""
        return {}

    def load_state(self, states: Sequence[dict]) -> None:
        """Takes back what every rank that saved gave, in their order."""


@dataclass(frozen=True)
class Critic:
    """The model of values; clip: of its loss."""

    model: Policy
    learning_rate: float
    clip: float


@dataclass(frozen=True)
class Experience:
    """A micro-batch with what weighs its log-probs: advantages [N] or [C] of the algorithm; returns_N of a critic."""

    measured: Measured
    drawn: Drawn
    advantages: Tensor
    returns_N: Tensor | None


@dataclass(frozen=True)
class PolicyGradient(Learner):
    policy: Policy
    algorithm: Algorithm
    critic: Critic | None
    learning_rate: float

    @property
    def names(self) -> tuple[str, ...]:
        return ("loss", "clip_fraction") + (() if self.critic is None else ("value_loss",))

    def minibatches(self, shares, rollouts, scores, measured, beta):
        n = len(scores[0])
        experience = [[self._experience(one, n, scores, beta) for one in minibatch] for minibatch in measured]
        flat = [one for minibatch in experience for one in minibatch]
        found = {}
        if self.critic is not None:
            total = sum(explanation_moments(one.drawn.values_N, one.returns_N) for one in flat)
            found["explained_variance"] = explained_variance(collectives.reduce_data(total))
        if self.algorithm.whitens:
            total = collectives.reduce_data(sum(moments(one.advantages) for one in flat))
            experience = [[_whitened(one, total) for one in minibatch] for minibatch in experience]
        return experience, found

    def weight(self, minibatch: Sequence[Experience]) -> int:
        return sum(len(one.advantages) for one in minibatch)

    def update(self, minibatch, weight, rate_of, beta):
        def loss(one: Experience) -> tuple[Tensor, Tensor]:
            logps_N = self.policy.token_logps(one.measured.batch)
            losses, held = self.algorithm.losses(logps_N, one.drawn, one.advantages, beta)
            return losses.sum(), torch.stack([losses.detach().double().sum(), held.double().sum()])

        means, grad_norm = descend(self.policy, minibatch, loss, weight, rate_of(self.learning_rate))
        if self.critic is None:
            return means, grad_norm

        def value_loss(one: Experience) -> tuple[Tensor, Tensor]:
            values_N = self.critic.model.scores(one.measured.batch)
            losses = value_losses(values_N, one.drawn.values_N, one.returns_N, self.critic.clip).sum()
            return losses, losses.detach().double()[None]

        rate = rate_of(self.critic.learning_rate)
        return means + descend(self.critic.model, minibatch, value_loss, weight, rate)[0], grad_norm

    def _experience(self, measured: Measured, n: int, scores: Sequence[np.ndarray], beta: float) -> Experience:
        batch = measured.batch
        of_batch = np.concatenate([np.zeros(0), *(scores[place] for place in batch.indices)])
        scores_C = torch.from_numpy(of_batch).to(batch.targets.device)
        models = measured.logps_N, measured.reference_N, measured.values_N
        drawn = Drawn(batch.target_counts, n, scores_C, *models)
        advantages = self.algorithm.advantages(drawn, beta)
        returns_N = None if self.critic is None else advantages + drawn.values_N
        return Experience(measured, drawn, advantages, returns_N)


@dataclass(frozen=True)
class OnlinePreference(Learner):
    """The best of a prompt's completions against the worst, as a preference that was just asked for (online DPO, arXiv
    2402.04792); prompts whose scores are all equal have none.
    """

    policy: Policy
    objective: PreferenceObjective
    layout: Layout
    learning_rate: float

    @property
    def names(self) -> tuple[str, ...]:
        return self.objective.names

    def minibatches(self, shares, rollouts, scores, measured, beta):
        pairs = [best_and_worst(rollout.group(i), scores[i]) for i, rollout in enumerate(rollouts)]
        of_shares = [[pairs[place] for place in share if pairs[place] is not None] for share in shares]
        batches = [[batch.to(self.policy.device) for batch in micro_batches(own, self.layout)] for own in of_shares]
        return batches, {"pairs": sum(map(len, of_shares))}

    def weight(self, minibatch) -> int:
        return sum(map(self.objective.weight, minibatch))

    def update(self, minibatch, weight, rate_of, beta):
        self.objective.begin(self.policy, minibatch)
        rate = rate_of(self.learning_rate)
        means, norm = descend(self.policy, minibatch, lambda one: self.objective(self.policy, one), weight, rate)
        self.objective.after_step(0, dict(zip(self.names, means, strict=True)))
        return means, norm

    def state(self) -> dict:
        return self.objective.state()

    def load_state(self, states: Sequence[dict]) -> None:
        self.objective.load_state(states)


def best_and_worst(group: Group, scores: np.ndarray) -> Group | None:
    """The first of the highest score and the first of the lowest, as a pair; None where all are equal."""
    best, worst = int(np.argmax(scores)), int(np.argmin(scores))
    if scores[best] == scores[worst]:
        return None
    completions, masks = (tuple(of[i] for i in (best, worst)) for of in (group.completions, group.masks))
    return Group(group.prompt, completions, masks, OF_A_PAIR, index=group.index)


def descend(
    model: Policy, minibatch: Sequence[Any], loss: Callable[[Any], tuple[Tensor, Tensor]], weight: int, rate: float
) -> tuple[list[float], float]:
    """One update with the mean gradient over the global minibatch, whichever ranks compute it. All ranks enter.

    loss: a micro-batch -> what is summed up and differentiated, and float64 sums to be told; weight: what the sums are
    divided by. Returns means, and the gradient norm before clipping.
    """
    sums = 0
    for micro_batch in minibatch:
        value, told = loss(micro_batch)
        # DeepSpeed averages gradients over the ranks, and a rank has a share of the sum.
        model.backward(value * collectives.world_size() / weight, is_last=micro_batch is minibatch[-1])
        sums = sums + told
    grad_norm = model.step(rate)
    return (collectives.reduce_data(sums) / weight).tolist(), grad_norm


def _whitened(one: Experience, total: Tensor) -> Experience:
    return Experience(one.measured, one.drawn, whitened(one.advantages, total), one.returns_N)
