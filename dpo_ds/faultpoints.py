"""Places where a test can have a run die: DPO_DS_FAULT=NAME:N kills the process at its Nth arrival there."""

from __future__ import annotations

import os
import signal
from collections import Counter

VARIABLE = "DPO_DS_FAULT"
POINTS = (  # in the order in which a save passes them
    "save-begun", "shard-half-written", "shards-written", "manifest-written", "renamed", "pointer-replaced",
    "old-half-deleted",
)  # fmt: skip
_arrivals: Counter[str] = Counter()


def reach(point: str) -> None:
    """Does nothing unless the variable names this place."""
    assert point in POINTS, point
    _arrivals[point] += 1
    if os.environ.get(VARIABLE) == f"{point}:{_arrivals[point]}":
        os.kill(os.getpid(), signal.SIGKILL)
