"""Numbers that evaluation reports of what it measured: means with standard errors, bootstrap intervals, win rates.

Values are [prompts, n], n completions of every prompt. Completions of one prompt resemble each other, so errors come
from the spread between prompts: n completions of one prompt count as one observation, a mean of n. Of a single prompt
each completion is an observation.
"""

from __future__ import annotations

import numpy as np

LEVEL = 0.95  # of bootstrap intervals
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
BINS = 40


def mean_of(values: np.ndarray) -> dict[str, float | None]:
    """mean and standard_error of values [prompts, n] or [rows]; one observation has no standard error (None)."""
    means = _observations(values)
    error = means.std(ddof=1) / np.sqrt(len(means)) if len(means) > 1 else None
    return {"mean": float(means.mean()), "standard_error": None if error is None else float(error)}


def mean_of_pairs(values: np.ndarray, prompts: np.ndarray) -> dict[str, float | None]:
    """mean and standard_error of values [pairs]; prompts [pairs]: the number of each one's prompt, from 0 on.

    A prompt's pairs count as one observation, as in a cluster-robust error: √(Σ over prompts of (Σ over its pairs of
    value - mean)² G / (G - 1)) / pairs, of G prompts. With one pair a prompt, and of a single prompt, as `mean_of`.
    """
    values = np.asarray(values, dtype=np.float64)
    sums = np.bincount(prompts, weights=values - values.mean())
    if len(sums) == 1:
        return mean_of(values)
    error = np.sqrt((sums**2).sum() * len(sums) / (len(sums) - 1)) / len(values)
    return {"mean": float(values.mean()), "standard_error": float(error)}


def bootstrap_interval(values: np.ndarray, resamples: int, seed: int) -> list[float]:
    """The percentile interval [low, high] of the mean of values [prompts, n], observations drawn with replacement."""
    means = _observations(values)
    generator = np.random.default_rng(seed)
    drawn = [means[generator.integers(len(means), size=len(means))].mean() for _ in range(resamples)]
    return [float(edge) for edge in np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])]


def win_rate(preferred: np.ndarray, resamples: int, seed: int) -> dict[str, float | list[float]]:
    """The mean of preferred [prompts, n], each in [0, 1] (1/2: a tie), its interval, and how it splits.

    wins, ties and losses are the shares above, at and below 1/2; prompts count alike.
    """
    return {
        "win_rate": mean_of(preferred)["mean"],
        "interval": bootstrap_interval(preferred, resamples, seed),
        "wins": float((preferred > 0.5).mean()),
        "ties": float((preferred == 0.5).mean()),
        "losses": float((preferred < 0.5).mean()),
    }


def distribution(values: np.ndarray) -> dict[str, dict | list]:
    """Quantiles, and a histogram of equal bins from the smallest to the largest value, of values of any shape."""
    low, high = float(np.min(values)), float(np.max(values))
    scale = 1e-9 * max(abs(low), abs(high))
    if high - low <= scale:  # equal but for rounding: bins would have no width
        low, high = low - max(0.5, scale), high + max(0.5, scale)
    counts, edges = np.histogram(values, bins=BINS, range=(low, high))
    quantiles = np.quantile(values, QUANTILES)
    return {
        "quantiles": {str(at): float(value) for at, value in zip(QUANTILES, quantiles, strict=True)},
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
    }


def _observations(values: np.ndarray) -> np.ndarray:  # [prompts], or [n] of a single prompt
    rows = np.asarray(values, dtype=np.float64).reshape(len(values), -1)
    return rows[0] if len(rows) == 1 else rows.mean(1)
