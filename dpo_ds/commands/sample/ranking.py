"""Scored completions of one prompt -> preference pairs of them; no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from dpo_ds.config import SampleSection

TOO_FEW = "fewer than two completions that ended and are not empty"
TOO_FEW_KEPT = "fewer than two completions that are not empty"
SAME_TEXT = "all completions equal"
SAME_SCORE = "all scores equal"


@dataclass(frozen=True)
class Ranker:
    """`settings` of the sample section decide which completions count and how pairs are made."""

    settings: SampleSection

    def __call__(
        self, texts: Sequence[str], finished: Sequence[bool], scores: Sequence[float], row: int
    ) -> tuple[list[tuple[int, int]], str | None]:
        """(chosen, rejected) as places in `texts`, and why there is no pair. row: the prompt's number, which seeds."""
        usable, reason = self.usable(texts, finished, scores)
        if reason is not None:
            return [], reason
        if self.settings.pairs == "best_worst":
            return best_worst(texts, scores, usable)
        generator = np.random.default_rng([self.settings.seed, row, 1])  # not the one that the completions came from
        return bradley_terry(texts, scores, usable, self.settings.pair_temperature, generator), None

    def usable(
        self, texts: Sequence[str], finished: Sequence[bool], scores: Sequence[float]
    ) -> tuple[list[int], str | None]:
        """The places of the completions that count, and why no two of them can be compared."""
        keeps = self.settings.unfinished == "keep"
        usable = [i for i, text in enumerate(texts) if text.strip() and (keeps or finished[i])]
        if len(usable) < 2:
            return [], TOO_FEW_KEPT if keeps else TOO_FEW
        if len({texts[i] for i in usable}) == 1:
            return [], SAME_TEXT
        return (usable, None) if len({scores[i] for i in usable}) > 1 else ([], SAME_SCORE)


def best_worst(
    texts: Sequence[str], scores: Sequence[float], usable: Sequence[int]
) -> tuple[list[tuple[int, int]], str | None]:
    """The first of the highest score over the first of the lowest."""
    best, worst = max(usable, key=lambda i: scores[i]), min(usable, key=lambda i: scores[i])
    return ([], SAME_TEXT) if texts[best] == texts[worst] else ([(best, worst)], None)


def bradley_terry(
    texts: Sequence[str],
    scores: Sequence[float],
    usable: Sequence[int],
    temperature: float,
    generator: np.random.Generator,
) -> list[tuple[int, int]]:
    """Every two completions that differ, a over b with probability σ((score_a - score_b) / temperature): the labels of
    arXiv 2305.18290, section 3; six pairs of four completions as in its appendix C.1.
    """
    pairs = []
    for a, b in combinations(usable, 2):
        uniform = generator.random()
        if texts[a] == texts[b]:
            continue
        log_odds = (scores[a] - scores[b]) / temperature
        a_wins = uniform < 1 / (1 + np.exp(-np.clip(log_odds, -700, 700)))  # beyond 700 exp overflows
        pairs.append((a, b) if a_wins else (b, a))
    return pairs
