"""The learning rate of every update, by the formulas of transformers' schedulers of the same names.

All rise linearly from 0 over the warm-up. Then constant stays; linear and cosine go to 0 at the last step,
cosine_with_min_lr to train.min_lr_ratio of the peak; inverse_sqrt falls as 1/sqrt(step) (arXiv 1706.03762, section
5.3); wsd (warm-up, stable, decay: arXiv 2404.06395) stays until the last train.decay_ratio of all steps, in which it
goes down as half a cosine to train.min_lr_ratio of the peak.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from dpo_ds.config import TrainSection
from dpo_ds.data.batching import steps_per_epoch

TIMESCALE = 10_000  # of inverse_sqrt without a warm-up, as transformers has it


def learning_rate(step: int, run: TrainSection, total_steps: int, peak: float | None = None) -> float:
    """The rate of update `step` (1 is the first) of `total_steps`. peak: of another model than the policy."""
    peak = run.learning_rate if peak is None else peak
    done, warmup = step - 1, warmup_steps(run, total_steps)
    if done < warmup:
        return peak * done / warmup
    return peak * _share_of_peak(done, warmup, run, total_steps)


def warmup_steps(run: TrainSection, total_steps: int) -> int:
    """Steps of the warm-up, those of train.warmup_ratio rounded up."""
    return run.warmup_steps or math.ceil(round(run.warmup_ratio * total_steps, 6))  # 0.1 x 30 is a little more than 3


def _share_of_peak(done: int, warmup: int, run: TrainSection, total_steps: int) -> float:
    progress = (done - warmup) / max(1, total_steps - warmup)
    if run.schedule == "constant":
        return 1.0
    if run.schedule == "linear":
        return max(0.0, 1 - progress)
    if run.schedule == "inverse_sqrt":
        timescale = warmup or TIMESCALE
        return math.sqrt(timescale / (done + timescale - warmup))
    if run.schedule == "wsd":
        decay = min(math.ceil(round(run.decay_ratio * total_steps, 6)), total_steps - warmup)
        progress = max(0.0, (done - (total_steps - decay)) / max(1, decay))
    least = 0.0 if run.schedule == "cosine" else run.least_ratio
    return least + (1 - least) * max(0.0, 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def total_steps(
    sources: Sequence[tuple[int, int, float]], run: TrainSection, counts: np.ndarray | None = None
) -> int:
    """train.max_steps alone if given, else train.epochs passes."""
    if run.max_steps is not None:
        return run.max_steps
    steps = run.epochs * steps_per_epoch(sources, run.global_batch_size, counts)
    return max(1, math.ceil(round(steps, 6)))  # 1.1 x 10 is a little more than 11
