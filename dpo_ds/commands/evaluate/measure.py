"""Asks a model about pairs and prompts, by all ranks together: completions, log-probs, scores.

Every function returns the whole on every rank, in the order of the data, and what a rank computes depends on the data
alone: another number of ranks changes who computes what.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dpo_ds.batch import Group, sum_per_sequence
from dpo_ds.cluster import collectives, rendezvous
from dpo_ds.config import EvaluateSection
from dpo_ds.data import GroupDataset
from dpo_ds.data.batching import Layout, Lengths, plan
from dpo_ds.data.prompts import Prompt
from dpo_ds.errors import UserError
from dpo_ds.models.generation import Completion, Generator, in_rounds

ROWS = 2048  # sequences dealt out to the ranks at a time
BATCHES = 4  # of completions that a rank is given together, so that like lengths share a batch
NOTHING = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Sequences:
    """Completions behind their prompts, as `GroupDataset` gives groups of one."""

    prompts: Sequence[np.ndarray]
    completions: Sequence[np.ndarray]

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, i: int) -> Group:
        trained = np.ones(len(self.completions[i]), bool)
        return Group(self.prompts[i], (self.completions[i],), (trained,), index=i)

    @property
    def prompt_lengths(self) -> np.ndarray:
        return np.array([len(ids) for ids in self.prompts])

    @property
    def completion_lengths(self) -> np.ndarray:
        return np.array([[len(ids)] for ids in self.completions]).reshape(-1, 1)


def draw(
    model, tokenizer: Any, prompts: Sequence[Prompt], settings: EvaluateSection, together: bool
) -> list[list[Completion]]:
    """settings.n completions of every prompt. together: the weights are spread over the ranks.

    Raises:
        UserError: on every rank, where the model cannot be drawn from on any.
    """
    from dpo_ds.cluster.collectives import raising_together  # deepspeed comes in with a model alone

    generator = Generator(model, tokenizer, settings, together)
    generator.report = lambda tokens, completions: rendezvous.peers().progress()
    rank, ranks = collectives.rank(), collectives.world_size()
    size = max(1, BATCHES * settings.batch_size // settings.n)
    chunks = [range(start, min(start + size, len(prompts))) for start in range(0, len(prompts), size)]
    own: dict[int, list[Completion]] = {}
    for rows in in_rounds(chunks, rank, ranks):
        rows = rows if rows is not None else range(0)
        with raising_together():
            own |= zip(rows, generator([prompts[row].ids for row in rows], settings.n, rows.start), strict=True)
    whole = {row: found for part in collectives.gather_objects(own) for row, found in part.items()}
    return [whole[row] for row in range(len(prompts))]


def sums_of_logps(model, data, layout: Layout) -> np.ndarray:
    """Log-probs of all completions, a row's adjacent, float64, summed over the trained tokens. All ranks enter."""
    rank, ranks = collectives.rank(), collectives.world_size()
    counts = np.maximum((data.completion_lengths > 0).sum(1), 1)  # a model may have drawn nothing at all
    firsts = np.cumsum(counts) - counts
    sums = torch.zeros(counts.sum(), dtype=torch.float64, device=model.device)
    for start in range(0, len(data), ROWS):
        rows = np.arange(start, min(start + ROWS, len(data)))
        for places in plan(Lengths.of(data, rows), layout, ranks)[rank]:
            rendezvous.peers().progress()
            batch = layout.collate([data[int(row)] for row in rows[places]]).to(model.device)
            found = sum_per_sequence(model.token_logps(batch), batch.target_counts)
            of = [np.arange(firsts[row], firsts[row] + counts[row]) for row in rows[places]]
            sums[torch.from_numpy(np.concatenate([NOTHING, *of]))] = found.double()
    collectives.reduce_sum(sums)  # every completion is 0 but on the rank that computed it
    return sums.cpu().numpy()


def compared(data: GroupDataset) -> tuple[np.ndarray, np.ndarray]:
    """Returns the better and the worse completion of every comparison among all of `data`, [comparisons, 2], and the
    row that each comparison is of."""
    known = [data[row].comparisons + first for row, first in enumerate(data.first_completions.tolist())]
    return np.concatenate(known), np.repeat(np.arange(len(data)), data.comparisons)


def over_ranks(rows: int, compute: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """compute(row numbers) -> values [those rows, ...], each rank on its share. All ranks enter.

    Raises:
        UserError: on every rank, where `compute` raised one on any.
    """
    rank, ranks = collectives.rank(), collectives.world_size()
    problem, values = None, None
    try:
        values = compute(np.arange(rank, rows, ranks))
    except UserError as error:
        problem = str(error)
    parts = collectives.gather_objects((problem, values))
    for problem, _ in parts:
        if problem is not None:
            raise UserError(problem)
    whole = np.empty((rows, *values.shape[1:]))
    for other, (_, values) in enumerate(parts):
        whole[other::ranks] = values
    return whole


def numbered(items: Iterable[Hashable]) -> np.ndarray:
    """int64 [items]: equal ones have the same number; numbers count from 0 as new ones come."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(item, len(numbers)) for item in items], np.int64)
