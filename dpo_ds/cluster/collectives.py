"""Carries out every collective of the package; nothing else calls those of torch.distributed.

All ranks enter each of these functions, or the ranks that came wait for the others until the time limit.

Ranks may stand in sequence groups, `sequence_size` neighbours each, which hold the same rows together: every one of a
group computes its part of the tokens and knows what came of all of them. What is summed up over the data is then given
by the first of each group (`reduce_data`). A group of one is the usual case.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dpo_ds.errors import UserError

# The watchdog ends what hangs, and tells a job that hangs from one that was suspended for a night; no clock here does.
TIMEOUT = timedelta(days=7)

_sequence_size = 1
_sequence_group: dist.ProcessGroup | None = None


def form_sequence_groups(size: int) -> None:
    """Puts every `size` neighbouring ranks into a group. All ranks enter; the number of ranks is a multiple."""
    global _sequence_size, _sequence_group
    _sequence_size, _sequence_group = size, None
    for first in range(0, world_size(), size) if size > 1 else ():
        members = list(range(first, first + size))
        group = dist.new_group(members, timeout=TIMEOUT)  # a new group has torch's own otherwise: 10 minutes of NCCL
        if rank() in members:
            _sequence_group = group


def sequence_size() -> int:
    return _sequence_size


def sequence_place() -> int:
    """Returns this rank's place within its sequence group."""
    return rank() % _sequence_size if _sequence_size > 1 else 0


def data_rank() -> int:
    """Returns the number of this rank's sequence group."""
    return rank() // _sequence_size


def data_ranks() -> int:
    """Returns how many sequence groups there are: each has other data."""
    return world_size() // _sequence_size


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


def reduce_data(values: Tensor) -> Tensor:
    """Returns `values` itself, summed in place over the sequence groups, in which all ranks have the same."""
    return reduce_sum(values if sequence_place() == 0 else values.zero_())


def reduce_sequence(values: Tensor) -> Tensor:
    """Returns `values` itself, summed in place over the ranks of this rank's sequence group."""
    if _sequence_size > 1:
        dist.all_reduce(values, group=_sequence_group)
    return values


def exchange_sequence(parts: Tensor) -> Tensor:
    """Sends parts[i] [sequence_size, ...] to the group's rank i; returns what each of them sent, shaped alike."""
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=_sequence_group)
    return received


def reduce_max(value: float, device: torch.device) -> float:
    """Returns the largest of the ranks' values."""
    largest = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.item()


def gather_equal(values: Tensor) -> Tensor:
    """Returns all ranks' values, equally shaped, one after another [world_size * n, ...]."""
    gathered = values.new_empty(world_size() * len(values), *values.shape[1:])
    dist.all_gather_into_tensor(gathered, values)
    return gathered


def swap(values: Tensor, partner: int) -> Tensor:
    """Returns what `partner` sends while it gets `values`; it calls this with this rank, and nobody else need come."""
    received = torch.empty_like(values)
    both = [dist.P2POp(dist.isend, values, partner), dist.P2POp(dist.irecv, received, partner)]
    for request in dist.batch_isend_irecv(both):
        request.wait()
    return received


def gather_rows(rows: Tensor) -> tuple[Tensor, int]:
    """Returns the rows [n, columns] of all ranks, in the order of ranks, and where this rank's begin. The ranks of a
    sequence group have the same: they are taken once.
    """
    own = rows if sequence_place() == 0 else rows[:0]
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([len(own)], device=rows.device))
    sizes = [int(count) for count in counts]
    padded = rows.new_zeros(max(sizes), rows.shape[1])
    padded[: len(own)] = own
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded)
    start = sum(sizes[: rank() - sequence_place()])
    return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)]), start


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
