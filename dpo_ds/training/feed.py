"""Prepares the next global batch on a thread while a GPU computes the one before."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from dpo_ds.batch import Batch
from dpo_ds.data import GroupDataset
from dpo_ds.data.batching import Layout, Lengths, plan


@dataclass(frozen=True)
class LocalBatch:
    """This rank's part of a global batch: as many micro-batches as on every other rank, some perhaps without pairs.

    rows and lengths: of all pairs of the global batch, whichever rank computes them.
    """

    step: int
    rows: np.ndarray
    lengths: Lengths
    micro_batches: list[Batch]


class Feed:
    """Yields this rank's part of every global batch in `batches`; to be closed.

    `prepare_next` is for the moment at which the host has issued its work and waits for the GPU: earlier the thread
    would take Python's lock from the one that keeps the GPU busy. On a GPU tensors lie in pinned memory, so that they
    are copied while the host goes on. waited: seconds for which training had to wait for a batch so far.
    """

    def __init__(
        self, batches: Iterable[tuple[int, np.ndarray]], data: GroupDataset, layout: Layout, rank: int, ranks: int,
        device: torch.device,
    ):  # fmt: skip
        self.waited = 0.0
        self._batches = iter(batches)
        self._data, self._layout, self._rank, self._ranks = data, layout, rank, ranks
        self._pins = device.type == "cuda"
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
        mine = plan(lengths, self._layout, self._ranks)[self._rank]
        batches = [self._layout.collate([self._data[int(rows[index])] for index in members]) for members in mine]
        return LocalBatch(step, rows, lengths, [batch.pinned() for batch in batches] if self._pins else batches)
