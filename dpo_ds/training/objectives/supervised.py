"""Minimises the negative log-likelihood of chosen completions: `dpo-ds sft`."""

from __future__ import annotations

from torch import Tensor

from dpo_ds.batch import Batch
from dpo_ds.models.engine import Policy
from dpo_ds.training.objectives.objective import Objective


class SupervisedObjective(Objective):
    """Maximum likelihood of the chosen completions; its mean is over the global batch's trained tokens."""

    names = ("loss",)

    def weight(self, batch: Batch) -> int:
        return len(batch.targets)

    def __call__(self, policy: Policy, batch: Batch) -> tuple[Tensor, Tensor]:
        negative_log_likelihood = -policy.token_logps(batch).sum()
        return negative_log_likelihood, negative_log_likelihood.detach().double()[None]
