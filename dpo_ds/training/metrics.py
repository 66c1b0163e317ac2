"""Defines what is logged, once: sums over this rank's pairs, then one reduction over ranks, then means over the
global batch.
"""

from __future__ import annotations

import resource
from collections.abc import Sequence

import torch
from torch import Tensor

from dpo_ds.batch import PairLogps
from dpo_ds.losses import rewards

PREFERENCE = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)


@torch.no_grad()
def preference_sums(
    losses: Tensor, policy: PairLogps, reference: PairLogps | None, beta: float, shares: Tensor | None = None
) -> Tensor:
    """[PREFERENCE] sums over a micro-batch's comparisons in float64, each times its share, 1 if not given. Rewards are
    β (log π - log π_ref), β log π without a reference.
    """
    chosen, rejected = rewards(beta, policy, reference)
    columns = (chosen, rejected, chosen - rejected, chosen > rejected, policy.chosen, policy.rejected)
    columns = [column.double() if shares is None else column.double() * shares for column in columns]
    return torch.stack([losses.double().sum(), *(column.sum() for column in columns)])


def named(names: Sequence[str], means: Tensor) -> dict[str, float]:
    """Name -> mean. A name that comes several times is an error in bins: their absolute means add up."""
    values = zip(names, means.tolist(), strict=True)
    found: dict[str, float] = {}
    for name, mean in values:
        found[name] = mean if names.count(name) == 1 else found.get(name, 0.0) + abs(mean)
    return found


def peak_memory_bytes(device: torch.device) -> int:
    """Most device memory this rank has held; on a CPU the most resident memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
