"""The learning rate as a function of the update alone, so that resuming needs no state."""

from __future__ import annotations

import math


def learning_rate(step: int, peak: float, schedule: str, warmup_steps: int, total_steps: int) -> float:
    """The rate of update `step` (1 is the first), as transformers' schedulers of the same names give it.

    Linear from 0 over `warmup_steps`, then constant, or to 0 at `total_steps` linearly or as half a cosine.
    """
    done = step - 1
    if done < warmup_steps:
        return peak * done / warmup_steps
    if schedule == "constant":
        return peak
    progress = (done - warmup_steps) / max(1, total_steps - warmup_steps)
    if schedule == "linear":
        return peak * max(0.0, 1 - progress)
    return peak * max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))
