"""Places where a test can have a run die: DPO_DS_FAULT=NAME:N kills the process at its Nth arrival there.

DPO_DS_SLOW_DISK=SECONDS makes every piece of a shard take so long, so that a small model, too, trains on meanwhile.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter

VARIABLE, SLOW_DISK = "DPO_DS_FAULT", "DPO_DS_SLOW_DISK"
POINTS = (  # in the order in which a save passes them; the third is between two steps, once a step
    "save-begun", "shard-half-written", "still-writing", "shards-written", "manifest-written", "renamed",
    "pointer-replaced", "old-half-deleted",
)  # fmt: skip
PHASES = ("batch-drawn", "completions-drawn", "completions-scored", "before-update")  # of an iteration of dpo-ds rl
_arrivals: Counter[str] = Counter()


def reach(point: str) -> None:
    """Does nothing unless the variable names this place."""
    assert point in POINTS + PHASES, point
    _arrivals[point] += 1
    if os.environ.get(VARIABLE) == f"{point}:{_arrivals[point]}":
        os.kill(os.getpid(), signal.SIGKILL)
    if point == "shard-half-written" and SLOW_DISK in os.environ:
        time.sleep(float(os.environ[SLOW_DISK]))
