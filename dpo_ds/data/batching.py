"""Which pairs make up a global batch, and how they are spread over ranks and micro-batches.

The global batches and their order depend on seed, epoch and data alone. The spreading depends on the number of ranks;
it changes who computes what, never the mean over the global batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dpo_ds.batch import Batch, PreferencePair, packed_batch, padded_batch

Plan = list[list[list[int]]]  # rank -> micro-batch -> positions in the global batch


@dataclass(frozen=True)
class Layout:
    """How pairs become micro-batches: name padded or packed, sides (chosen, rejected), the budget of tokens a rank
    holds in one forward, and the model's width, which weighs attention's square term against the rest.
    """

    name: str
    sides: tuple[str, ...]
    budget: int
    hidden_size: int

    def collate(self, pairs: Sequence[PreferencePair]) -> Batch:
        return (packed_batch if self.name == "packed" else padded_batch)(pairs, self.sides)


@dataclass(frozen=True)
class Lengths:
    """Tokens of each pair of a global batch, int64 [pairs]; rejected is 0 where only chosen is used."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray

    @classmethod
    def of(cls, data, rows: np.ndarray) -> Lengths:
        """Takes these rows of the tokenised data, which keeps int32: a square of a long pair would overflow."""
        columns = (data.prompt_lengths, data.chosen_lengths, data.rejected_lengths)
        return cls(*(column[rows].astype(np.int64) for column in columns))

    def cost(self, hidden_size: int) -> np.ndarray:  # [pairs]
        """Work of the packed pair in units of one token's matmuls: tokens, plus attention's (query, key) pairs.

        A token costs about 24 d² FLOPs a layer, a (query, key) pair 4 d, d the hidden size.
        """
        p, c, r = self.prompt, self.chosen, self.rejected
        attended = (p + c) * (p + c + 1) / 2 + r * p + r * (r + 1) / 2
        return p + c + r + attended / (6 * hidden_size)


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


def steps_per_epoch(sources: Sequence[tuple[int, int, float]], global_batch_size: int) -> int:
    """The last, smaller batch counts: it is kept."""
    pairs = sum((stop - start) * int(weight) + _rest(weight, stop - start) for start, stop, weight in sources)
    return math.ceil(pairs / global_batch_size)


def _rest(weight: float, rows: int) -> int:
    """Rows of the pass that `weight` leaves unfinished."""
    return round((weight - int(weight)) * rows)


def global_batches(
    sources: Sequence[tuple[int, int, float]], seed: int, global_batch_size: int, first_step: int
) -> Iterator[tuple[int, np.ndarray]]:
    """(step, rows of the data set) from `first_step` on, endlessly; step 1 is the first."""
    per_epoch = steps_per_epoch(sources, global_batch_size)
    step = first_step
    while True:
        epoch, offset = divmod(step - 1, per_epoch)
        order = epoch_order(sources, seed, epoch)
        for start in range(offset * global_batch_size, len(order), global_batch_size):
            yield step, order[start : start + global_batch_size]
            step += 1


def plan(lengths: Lengths, layout: Layout, ranks: int) -> Plan:
    """Spreads a global batch so that the slowest rank's work is near the mean.

    Every rank gets the same number of micro-batches (ZeRO-3 is collective), some of them empty if need be. A
    micro-batch holds at most `layout.budget` tokens, padding included, unless a single pair is longer.
    """
    if layout.name == "padded":
        bins = _padded_bins(lengths, layout, ranks)
    else:
        bins = _packed_bins(lengths, layout, ranks)
    return _deal(bins, lengths.cost(layout.hidden_size), ranks)


def _padded_bins(lengths: Lengths, layout: Layout, ranks: int) -> list[list[int]]:
    """Neighbours in length share a micro-batch: the smallest largest one among splits of the sorted pairs."""
    longest = lengths.prompt + np.maximum(lengths.chosen, lengths.rejected)
    order = np.argsort(-longest, kind="stable")
    row = len(layout.sides) * longest[order]  # sorted: a bin's first pair sets the width of all its rows

    def fill(capacity: int) -> list[list[int]]:
        bins: list[list[int]] = []
        widest = 0
        for pair, width in zip(order, row, strict=True):
            if bins and widest * (len(bins[-1]) + 1) <= capacity:
                bins[-1].append(int(pair))
            else:
                bins.append([int(pair)])
                widest = width
        return bins

    count = math.ceil(len(fill(layout.budget)) / ranks) * ranks
    low, high = 1, layout.budget  # smallest capacity that needs no more than `count` bins
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(fill(middle)) <= count else (middle + 1, high)
    return fill(low)


def _packed_bins(lengths: Lengths, layout: Layout, ranks: int) -> list[list[int]]:
    """Heaviest pair first into the lightest bin that has room; more bins until all fit."""
    tokens = np.minimum(lengths.prompt + lengths.chosen + lengths.rejected, layout.budget)  # a longer one fills a bin
    cost = lengths.cost(layout.hidden_size)
    order = np.argsort(-cost, kind="stable")
    count = max(1, math.ceil(tokens.sum() / (layout.budget * ranks))) * ranks
    while True:
        bins: list[list[int]] = [[] for _ in range(count)]
        room, load = np.full(count, layout.budget), np.zeros(count)
        left = tokens.sum()
        for pair in order:
            lightest = int(np.where(room >= tokens[pair], load, np.inf).argmin())
            if room[lightest] < tokens[pair]:
                break
            left -= tokens[pair]
            bins[lightest].append(int(pair))
            room[lightest] -= tokens[pair]
            load[lightest] += cost[pair]
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
