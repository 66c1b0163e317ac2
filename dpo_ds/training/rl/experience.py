"""What policy, reference and critic say of an iteration's completions before any update; without gradients.

It is computed in the very micro-batches that updates go through, so that the ratio of the first one is 1 to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dpo_ds.batch import Batch, Group
from dpo_ds.cluster import collectives
from dpo_ds.data.batching import Layout, Lengths, plan
from dpo_ds.models.engine import LoadedModel, Policy
from dpo_ds.reference import Reference

NATS = ("kl", "entropy")


@dataclass(frozen=True)
class Measured:
    """A micro-batch, on the policy's device, and what the models say of its targets, each [N] float32; None: no such
    model.
    """

    batch: Batch
    logps_N: Tensor
    entropy_N: Tensor
    reference_N: Tensor | None
    values_N: Tensor | None

    def nats(self) -> Tensor:
        """Returns float64 sums: of log π - log π_ref and of entropy over tokens."""
        zero = self.logps_N.new_zeros(())
        kl = zero if self.reference_N is None else (self.logps_N - self.reference_N).double().sum()
        return torch.stack([kl.double(), self.entropy_N.double().sum()])


@dataclass(frozen=True)
class Models:
    """What measures; reference and critic may be None."""

    policy: Policy
    reference: Reference | None
    critic: Policy | None

    def of_language(self) -> list[LoadedModel]:
        return [self.policy, *([] if self.reference is None else self.reference.models())]

    def trained(self) -> list[Policy]:
        return [self.policy, *([] if self.critic is None else [self.critic])]

    def all(self) -> list[LoadedModel]:
        return [*self.of_language(), *self.trained()[1:]]

    def measure(self, batches: Sequence[Batch]) -> list[Measured]:
        """All ranks enter, with equally many micro-batches."""
        found = []
        with torch.no_grad(), self.policy.evaluating():
            for batch in batches:
                batch = batch.to(self.policy.device)
                reference_N = None if self.reference is None else self.reference.token_logps(batch)
                statistics = self.policy.token_statistics(batch)
                found.append(Measured(batch, statistics.logps, statistics.entropy, reference_N, None))
        if self.critic is None:
            return found
        with torch.no_grad(), self.critic.evaluating():
            values = [self.critic.scores(measured.batch) for measured in found]
        return [replace(one, values_N=of) for one, of in zip(found, values, strict=True)]


def micro_batches(groups: Sequence[Group], layout: Layout) -> list[Batch]:
    """This rank's of a minibatch; as many as on every other rank, some perhaps without groups."""
    most = max((len(group.completions) for group in groups), default=1)
    lengths = np.zeros((len(groups), most), np.int64)
    for row, group in enumerate(groups):
        lengths[row, : len(group.completions)] = [len(ids) for ids in group.completions]
    of_prompts = np.array([len(group.prompt) for group in groups], np.int64)
    share = plan(Lengths(of_prompts, lengths), layout, collectives.data_ranks())[collectives.data_rank()]
    return [layout.collate([groups[place] for place in members]) for members in share]
