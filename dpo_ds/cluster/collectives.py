"""Carries out every collective of the package; nothing else calls those of torch.distributed.

All ranks enter each of these functions, or the ranks that came wait for the others until the time limit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dpo_ds.errors import UserError


def rank() -> int:
    return dist.get_rank()


def world_size() -> int:
    return dist.get_world_size()


def barrier() -> None:
    """Returns once every rank has come."""
    dist.barrier()


def reduce_sum(values: Tensor) -> Tensor:
    """Returns `values` itself, summed over the ranks in place."""
    dist.all_reduce(values)
    return values


def reduce_max(value: float, device: torch.device) -> float:
    """Returns the largest of the ranks' values."""
    largest = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.item()


def gather_rows(rows: Tensor) -> tuple[Tensor, int]:
    """Returns the rows [n, columns] of all ranks, in the order of ranks, and where this rank's begin."""
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    sizes = [int(count) for count in counts]
    padded = rows.new_zeros(max(sizes), rows.shape[1])
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded)
    return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)]), sum(sizes[: rank()])


def gather_objects(value: Any) -> list:
    """Returns every rank's object, in the order of ranks."""
    parts: list = [None] * world_size()
    dist.all_gather_object(parts, value)
    return parts


def from_rank_0(value: Any) -> Any:
    """Returns rank 0's object on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


@contextlib.contextmanager
def raising_together() -> Iterator[None]:
    """Raises the mistake of the first rank that has one on every rank, so that rank 0 tells it."""
    mistake = None
    try:
        yield
    except UserError as error:
        mistake = error
    first = next(filter(None, gather_objects(mistake)), None)
    if first is not None:
        raise first
