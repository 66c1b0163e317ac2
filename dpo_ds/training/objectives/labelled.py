"""Minimises a loss of single completions that are said to be desirable or not: `dpo-ds train` with KTO or BCO."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpo_ds.batch import Batch, sum_per_sequence
from dpo_ds.cluster import collectives
from dpo_ds.losses import Labelled
from dpo_ds.models.engine import Policy
from dpo_ds.reference import Reference
from dpo_ds.training.objectives.objective import AgainstReference

LABELLED = (
    "loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "logps/chosen", "logps/rejected",
    "rewards/baseline", "desirable",
)  # fmt: skip


@dataclass
class LabelledObjective(AgainstReference):
    """The mean of a loss over the global batch's completions.

    rewards/chosen is the mean of desirable completions, rewards/rejected of the others; accuracies: how many lie
    strictly on their side of the baseline, which is rewards/baseline; desirable: the share that is.
    """

    loss: Labelled
    reference: Reference
    names = LABELLED
    baseline: float = 0.0

    def counts(self, data) -> np.ndarray:
        return data.completions

    def weight(self, batch: Batch) -> int:
        return len(batch.target_counts)

    @property
    def needs_mismatches(self) -> bool:
        return self.loss.needs_kl

    def begin(self, policy: Policy, micro_batches: Sequence[Batch], mismatched: Sequence[Batch] = ()) -> None:
        """Takes the mean of log π - log π_ref over the completions behind other prompts of the global batch."""
        kl = 0.0
        if self.loss.needs_kl:
            sums = torch.zeros(2, dtype=torch.float64, device=policy.device)
            with policy.evaluating(), torch.no_grad():
                for batch in mismatched:
                    logratios = self._logratios(policy, batch.to(policy.device))
                    sums += torch.stack([logratios.double().sum(), sums.new_tensor(len(logratios))])
            total, count = collectives.reduce_data(sums).tolist()
            kl = total / max(count, 1.0)
        self.baseline = self.loss.baseline(kl)

    def __call__(self, policy: Policy, batch: Batch) -> tuple[Tensor, Tensor]:
        batch = batch.to(policy.device)
        policy_N = policy.token_logps(batch)
        logps = sum_per_sequence(policy_N, batch.target_counts)
        logratios = logps - sum_per_sequence(self.reference.token_logps(batch), batch.target_counts)
        losses = self.loss(logratios, batch.labels, self.baseline)
        return losses.sum(), self._sums(losses, self.loss.beta * logratios, logps, batch.labels)

    @torch.no_grad()
    def _sums(self, losses: Tensor, rewards: Tensor, logps: Tensor, labels: Tensor) -> Tensor:  # [names] float64
        is_right = torch.where(labels, rewards > self.baseline, rewards < self.baseline)
        columns = (losses, rewards * labels, rewards * ~labels, is_right, logps * labels, logps * ~labels)
        sums = [column.double().sum() for column in columns]
        return torch.stack([*sums, sums[0].new_tensor(self.baseline * len(labels)), labels.double().sum()])

    def shown(self, means: dict[str, float]) -> dict[str, float]:
        """Returns the means of each side over its own completions; a side that a batch lacks has none."""
        shares = {"chosen": means["desirable"], "rejected": 1 - means["desirable"]}
        sides = {name: shares[name.rpartition("/")[2]] for name in means if name.rpartition("/")[2] in shares}
        found = {name: mean / sides.get(name, 1.0) for name, mean in means.items() if sides.get(name, 1.0) > 0}
        if len(found) == len(means):
            found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
        return found

    def after_step(self, step: int, means: dict[str, float]) -> None:
        sides = [means[name] for name in ("rewards/chosen", "rewards/rejected") if name in means]
        self.loss = self.loss.after_step(sum(sides) / len(sides))
        self.reference.after_step(step)

    def _logratios(self, policy: Policy, batch: Batch) -> Tensor:  # [completions]
        difference = policy.token_logps(batch) - self.reference.token_logps(batch)
        return sum_per_sequence(difference, batch.target_counts)
