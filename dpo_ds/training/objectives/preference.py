"""Minimises a preference loss of the policy's log-probs against the reference's: `dpo-ds train`."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpo_ds.batch import Batch, PairLogps
from dpo_ds.cluster import collectives
from dpo_ds.losses import Loss, WeightedSum
from dpo_ds.models.engine import Policy
from dpo_ds.reference import Reference
from dpo_ds.training import metrics
from dpo_ds.training.objectives.objective import AgainstReference
from dpo_ds.training.objectives.shaping import Shaping, wpo_weights

PLAIN = Shaping()


@dataclass(frozen=True)
class Share:
    """A micro-batch's part of a loss that was computed over the whole global batch; all [comparisons].

    chosen and rejected are the derivatives of the sum of all losses by the policy's log-probs.
    """

    losses: Tensor
    chosen: Tensor
    rejected: Tensor

    def surrogate(self, policy: PairLogps) -> Tensor:
        """Returns a sum that has the loss's gradient: linear in the log-probs."""
        return self.chosen * policy.chosen + self.rejected * policy.rejected


class PreferenceObjective(AgainstReference):
    """The mean of a preference loss over the global batch's comparisons, or its groups where the loss looks at whole
    ones; reference: None where the loss needs none."""

    names = metrics.PREFERENCE

    def __init__(self, loss: Loss | WeightedSum, reference: Reference | None, shaping: Shaping = PLAIN):
        self.loss, self.reference, self.shaping = loss, reference, shaping
        self._shares: deque[Share] = deque()

    def counts(self, data) -> np.ndarray | None:
        return None if self.loss.per_group or not data.census["groups"] else data.comparisons

    def weight(self, batch: Batch) -> int:
        return len(batch.group_sizes) if self.loss.per_group else batch.num_comparisons

    def begin(self, policy: Policy, micro_batches: Sequence[Batch], mismatched: Sequence[Batch] = ()) -> None:
        if self.loss.across_pairs:
            self._shares = deque(self._look_across(policy, micro_batches))

    def __call__(self, policy: Policy, batch: Batch) -> tuple[Tensor, Tensor]:
        batch = batch.to(policy.device)
        reference_N = None if self.reference is None else self.reference.token_logps(batch)
        statistics = policy.token_statistics(batch) if self.shaping.wpo else None
        policy_N = policy.token_logps(batch) if statistics is None else statistics.logps
        logps, reference_logps = self._sums(policy_N, reference_N, batch)
        if self.loss.across_pairs:
            share = self._shares.popleft()
            losses, minimised = share.losses, share.surrogate(logps)
        else:
            losses = minimised = self.loss(*self.shaping.scores(logps, reference_logps))
        if statistics is not None:
            losses = minimised = losses * wpo_weights(statistics, batch)
        policy_logps = batch.pair_logps(policy_N)
        if self.shaping.sft_weight:
            sft = self.shaping.sft(policy_logps)
            losses, minimised = losses + sft, minimised + sft
        reference_logps = None if reference_N is None else batch.pair_logps(reference_N)
        shares = batch.shares if self.loss.per_group else None
        sums = metrics.preference_sums(losses, policy_logps, reference_logps, self.loss.beta, shares)
        return minimised.sum(), sums

    def after_step(self, step: int, means: dict[str, float]) -> None:
        self.loss = self.loss.after_step((means["rewards/chosen"] + means["rewards/rejected"]) / 2)
        if self.reference is not None:
            self.reference.after_step(step)

    def _sums(self, policy_N: Tensor, reference_N: Tensor | None, batch: Batch) -> tuple[PairLogps, PairLogps | None]:
        """Returns what the loss looks at: sums with LD's discount, where it is on, of both models alike."""
        reference = None if reference_N is None else self.shaping.pair_logps(reference_N, batch)
        return self.shaping.pair_logps(policy_N, batch), reference

    def _look_across(self, policy: Policy, micro_batches: Sequence[Batch]) -> list[Share]:
        """The loss over all ranks' pairs, by a pass without gradient, cut up for these micro-batches. All ranks enter.

        The loss depends on the weights through the log-probs alone, so that its derivatives by them are all that the
        pass with gradient needs.
        """
        rows = []
        with policy.evaluating(), torch.no_grad():
            for batch in micro_batches:
                batch = batch.to(policy.device)
                logps, reference = self._sums(policy.token_logps(batch), self.reference.token_logps(batch), batch)
                sums = (logps.chosen, logps.rejected, reference.chosen, reference.rejected)
                rows.append(torch.stack([*sums, logps.chosen_tokens.float(), logps.rejected_tokens.float()], dim=1))
        everyones, start = collectives.gather_rows(torch.cat(rows))
        chosen, rejected, reference_chosen, reference_rejected, *counts = everyones.unbind(1)
        with torch.enable_grad():  # an evaluation has switched it off
            leaves = (chosen.clone().requires_grad_(), rejected.clone().requires_grad_())
            losses = self.loss(PairLogps(*leaves, *counts), PairLogps(reference_chosen, reference_rejected, *counts))
            derivatives = torch.autograd.grad(losses.sum(), leaves)
        own = [column.narrow(0, start, sum(map(len, rows))) for column in (losses.detach(), *derivatives)]
        sizes = [len(part) for part in rows]
        return [Share(*parts) for parts in zip(*(column.split(sizes) for column in own), strict=True)]
