"""Which groups make up a global batch, and how they are spread over ranks and micro-batches.

The global batches and their order depend on seed, epoch and data alone. The spreading depends on the number of ranks;
it changes who computes what, never the mean over the global batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dpo_ds.batch import Batch, Group, packed_batch, padded_batch

Plan = list[list[list[int]]]  # rank -> micro-batch -> positions in the global batch


@dataclass(frozen=True)
class Layout:
    """How groups become micro-batches: name padded or packed, the budget of tokens a micro-batch holds, and the model's
    width, which weighs attention's square term against the rest. spread: how many ranks compute a packed micro-batch
    together, and which of them this one is.
    """

    name: str
    budget: int
    hidden_size: int
    spread: tuple[int, int] = (1, 0)

    def collate(self, groups: Sequence[Group]) -> Batch:
        if self.name == "padded":
            return padded_batch(groups)
        return packed_batch(groups) if self.spread[0] == 1 else packed_batch(groups).spread(*self.spread)


@dataclass(frozen=True)
class Lengths:
    """Tokens of each group of a global batch, int64: prompt [groups], completions [groups, n], 0 where a group has
    fewer than the one that has most."""

    prompt: np.ndarray
    completions: np.ndarray

    @classmethod
    def of(cls, data, rows: np.ndarray) -> Lengths:
        """Takes these rows of the tokenised data, which keeps int32: a square of a long group would overflow."""
        return cls(data.prompt_lengths[rows].astype(np.int64), data.completion_lengths[rows].astype(np.int64))

    @property
    def tokens(self) -> np.ndarray:  # [groups]
        return self.prompt + self.completions.sum(1)

    def cost(self, hidden_size: int) -> np.ndarray:  # [groups]
        """Work of the packed group in units of one token's matmuls: tokens, plus attention's (query, key) pairs.

        A token costs about 24 d² FLOPs a layer, a (query, key) pair 4 d, d the hidden size.
        """
        first, others = self.prompt + self.completions[:, 0], self.completions[:, 1:]
        attended = first * (first + 1) / 2 + others.sum(1) * self.prompt + (others * (others + 1) / 2).sum(1)
        return self.tokens + attended / (6 * hidden_size)


def epoch_order(sources: Sequence[tuple[int, int, float]], seed: int, epoch: int) -> np.ndarray:
    """Rows of the data set in the order of one epoch.

    A source (start, stop, weight) is passed over `weight` times an epoch; the fraction that is left of a pass takes
    rows at random, others every epoch.
    """
    generator = np.random.default_rng([seed, epoch])
    taken = []
    for start, stop, weight in sources:
        rows = np.arange(start, stop)
        taken += [rows] * int(weight)
        taken.append(generator.permutation(rows)[: _rest(weight, len(rows))])
    return generator.permutation(np.concatenate(taken))


def steps_per_epoch(
    sources: Sequence[tuple[int, int, float]], global_batch_size: int, counts: np.ndarray | None = None
) -> int:
    """The last, smaller batch counts: it is kept. counts [rows]: what each row counts of a batch; 1 if not given."""
    rows = sum((stop - start) * int(weight) + _rest(weight, stop - start) for start, stop, weight in sources)
    if counts is None:
        return math.ceil(rows / global_batch_size)
    taken = [(counts[start:stop], weight) for start, stop, weight in sources]
    total = sum(of.sum() * int(weight) + of.mean() * _rest(weight, len(of)) for of, weight in taken if len(of))
    return min(math.ceil(round(total, 6) / global_batch_size), rows)


def _rest(weight: float, rows: int) -> int:
    """Rows of the pass that `weight` leaves unfinished."""
    return round((weight - int(weight)) * rows)


def global_batches(
    sources: Sequence[tuple[int, int, float]], seed: int, global_batch_size: int, first_step: int,
    counts: np.ndarray | None = None,
) -> Iterator[tuple[int, np.ndarray]]:  # fmt: skip
    """(step, rows of the data set) from `first_step` on, endlessly; step 1 is the first.

    A row that counts more than 1 is never cut: batches are filled to the nearest of global_batch_size.
    """
    per_epoch = steps_per_epoch(sources, global_batch_size, counts)
    step = first_step
    while True:
        epoch, offset = divmod(step - 1, per_epoch)
        order = epoch_order(sources, seed, epoch)
        if counts is None:
            ends = [*range(0, len(order), global_batch_size), len(order)]
        else:
            ends = _ends(counts[order], global_batch_size, per_epoch)
        for start, end in zip(ends[offset:], ends[offset + 1 :], strict=False):
            yield step, order[start:end]
            step += 1


def _ends(counts: np.ndarray, size: int, steps: int) -> list[int]:
    """Returns where `steps` batches of an epoch begin and end: none empty, each end the nearest to its share."""
    counted, ends = np.cumsum(counts), [0]
    for step in range(1, steps):
        at = int(np.searchsorted(counted, step * size))
        near = at + (at >= len(counted) or counted[at] - step * size <= step * size - (counted[at - 1] if at else 0))
        ends.append(min(max(near, ends[-1] + 1), len(counts) - (steps - step)))
    return [*ends, len(counts)]


def plan(lengths: Lengths, layout: Layout, ranks: int) -> Plan:
    """Spreads a global batch so that the slowest rank's work is near the mean.

    Every rank gets the same number of micro-batches (ZeRO-3 is collective), some of them empty if need be. A
    micro-batch holds at most `layout.budget` tokens, padding included, unless a single group is longer.
    """
    if layout.name == "padded":
        bins = _padded_bins(lengths, layout, ranks)
    else:
        bins = _packed_bins(lengths, layout, ranks)
    return _deal(bins, lengths.cost(layout.hidden_size), ranks)


def _padded_bins(lengths: Lengths, layout: Layout, ranks: int) -> list[list[int]]:
    """Neighbours in length share a micro-batch: the smallest largest one among splits of the sorted groups."""
    longest = lengths.prompt + lengths.completions.max(1)
    order = np.argsort(-longest, kind="stable")  # a bin's first group sets the width of all its rows
    rows_of = (lengths.completions > 0).sum(1)

    def fill(capacity: int) -> list[list[int]]:
        bins: list[list[int]] = []
        widest = rows = 0
        for group in order.tolist():
            rows += rows_of[group]
            if bins and widest * rows <= capacity:
                bins[-1].append(group)
            else:
                bins.append([group])
                widest, rows = longest[group], rows_of[group]
        return bins

    count = math.ceil(len(fill(layout.budget)) / ranks) * ranks
    low, high = 1, layout.budget  # smallest capacity that needs no more than `count` bins
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(fill(middle)) <= count else (middle + 1, high)
    return fill(low)


def _packed_bins(lengths: Lengths, layout: Layout, ranks: int) -> list[list[int]]:
    """Heaviest group first into the lightest bin that has room; more bins until all fit."""
    tokens = np.minimum(lengths.tokens, layout.budget)  # a longer one fills a bin
    cost = lengths.cost(layout.hidden_size)
    order = np.argsort(-cost, kind="stable")
    count = max(1, math.ceil(tokens.sum() / (layout.budget * ranks))) * ranks
    while True:
        bins: list[list[int]] = [[] for _ in range(count)]
        room, load = np.full(count, layout.budget), np.zeros(count)
        left = tokens.sum()
        for group in order:
            lightest = int(np.where(room >= tokens[group], load, np.inf).argmin())
            if room[lightest] < tokens[group]:
                break
            left -= tokens[group]
            bins[lightest].append(int(group))
            room[lightest] -= tokens[group]
            load[lightest] += cost[group]
        else:
            return bins
        count += max(1, left // (2 * layout.budget * ranks)) * ranks  # half of what the rest needs: few tries, few bins


def _deal(bins: list[list[int]], cost: np.ndarray, ranks: int) -> Plan:
    """Bins of like cost run at the same time, the heaviest of each round on the rank that has least so far."""
    bins = sorted(bins, key=lambda members: -cost[members].sum())
    bins += [[] for _ in range(-len(bins) % ranks)]
    per_rank: Plan = [[] for _ in range(ranks)]
    load = np.zeros(ranks)
    for start in range(0, len(bins), ranks):
        for rank, members in zip(np.argsort(load, kind="stable"), bins[start : start + ranks], strict=True):
            per_rank[rank].append(members)
            load[rank] += cost[members].sum()
    return per_rank
