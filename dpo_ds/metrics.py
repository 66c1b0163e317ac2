"""What is logged, defined once: sums over this rank's pairs, then one reduction over ranks, then means over the
global batch.
"""

from __future__ import annotations

import resource

import torch
import torch.distributed as dist
from torch import Tensor

from dpo_ds.batch import PairLogps

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
def preference_sums(losses: Tensor, policy: PairLogps, reference: PairLogps, beta: float) -> Tensor:  # [PREFERENCE]
    """Sums over a micro-batch's pairs in float64, in the order of PREFERENCE. Rewards are β (log π - log π_ref)."""
    chosen = beta * (policy.chosen - reference.chosen)
    rejected = beta * (policy.rejected - reference.rejected)
    columns = (losses, chosen, rejected, chosen - rejected, chosen > rejected, policy.chosen, policy.rejected)
    return torch.stack([column.double().sum() for column in columns])


def reduce_sum(values: Tensor) -> Tensor:
    """The sum over ranks; all ranks enter."""
    dist.all_reduce(values)
    return values


def reduce_max(value: float, device: torch.device) -> float:
    """The largest over ranks; all ranks enter."""
    largest = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.item()


def peak_memory_bytes(device: torch.device) -> int:
    """Most device memory this rank has held; on a CPU the most resident memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
