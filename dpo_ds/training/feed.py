"""Prepares the next global batch on a thread while a GPU computes the one before."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

from dpo_ds.batch import Batch, Group
from dpo_ds.data import GroupDataset
from dpo_ds.data.batching import Layout, Lengths, plan


@dataclass(frozen=True)
class LocalBatch:
    """This rank's part of a global batch: as many micro-batches as on every other rank, some perhaps without pairs.

    rows and lengths: of all pairs of the global batch, whichever rank computes them. mismatched: likewise, prompts with
    the completions of the row behind in the global batch, none where they are not asked for.
    """

    step: int
    rows: np.ndarray
    lengths: Lengths
    micro_batches: list[Batch]
    mismatched: list[Batch] = field(default_factory=list)


class Feed:
    """Yields this rank's part of every global batch in `batches`; to be closed.

    `prepare_next` is for the moment at which the host has issued its work and waits for the GPU: earlier the thread
    would take Python's lock from the one that keeps the GPU busy. On a GPU tensors lie in pinned memory, so that they
    are copied while the host goes on. waited: seconds for which training had to wait for a batch so far.
    """

    def __init__(
        self, batches: Iterable[tuple[int, np.ndarray]], data: GroupDataset, layout: Layout, rank: int, ranks: int,
        device: torch.device, mismatches: bool = False,
    ):  # fmt: skip
        self.waited = 0.0
        self._batches = iter(batches)
        self._data, self._layout, self._rank, self._ranks = data, layout, rank, ranks
        self._pins, self._mismatches = device.type == "cuda", mismatches
        self._thread = ThreadPoolExecutor(1, "batches")
        self._following: Future[LocalBatch | None] | None = None

    def __iter__(self) -> Iterator[LocalBatch]:
        while (batch := self.following()) is not None:
            self._following = None
            yield batch

    def prepare_next(self) -> None:
        """Begins to prepare what comes next, where that has not begun."""
        if self._following is None:
            self._following = self._thread.submit(self._prepare)

    def following(self) -> LocalBatch | None:
        """Returns what comes next, None after the last, and leaves it there."""
        started = time.perf_counter()
        self.prepare_next()
        batch = self._following.result()
        self.waited += time.perf_counter() - started
        return batch

    def close(self) -> None:
        self._thread.shutdown()

    def _prepare(self) -> LocalBatch | None:
        step, rows = next(self._batches, (0, None))
        if rows is None:
            return None
        lengths = Lengths.of(self._data, rows)
        batches = self._collated(lengths, [(row, row) for row in rows.tolist()])
        mismatched = []
        if self._mismatches and len(rows) > 1:
            others, longest = np.roll(rows, -1), int((lengths.prompt + lengths.completions.max(1)).max())
            room = np.maximum(longest - lengths.prompt, 1)[:, None]
            cut = np.minimum(Lengths.of(self._data, others).completions, room)
            both = list(zip(rows.tolist(), others.tolist(), strict=True))
            mismatched = self._collated(Lengths(lengths.prompt, cut), both)
        return LocalBatch(step, rows, lengths, batches, mismatched)

    def _collated(self, lengths: Lengths, rows: Sequence[tuple[int, int]]) -> list[Batch]:
        """Returns this rank's micro-batches of groups, the prompt of one row with the completions of another; these are
        cut where `lengths` says so."""
        batches = []
        for members in plan(lengths, self._layout, self._ranks)[self._rank]:
            groups = []
            for place in members:
                prompt, completions = rows[place]
                group = self._data[prompt]
                if prompt != completions:
                    group = _behind(group, self._data[completions], lengths.completions[place])
                groups.append(group)
            batch = self._layout.collate(groups)
            batches.append(batch.pinned() if self._pins else batch)
        return batches


def _behind(group: Group, other: Group, lengths: np.ndarray) -> Group:
    """Returns the other group's completions, cut to these lengths, behind a group's prompt."""
    completions = tuple(ids[:n] for ids, n in zip(other.completions, lengths.tolist(), strict=False))
    masks = tuple(mask[:n] for mask, n in zip(other.masks, lengths.tolist(), strict=False))
    return Group(group.prompt, completions, masks)
