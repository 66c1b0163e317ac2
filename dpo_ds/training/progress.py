"""How far a rank's own share of some work is: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

LINE_SECONDS = 10


class Progress:
    """total: `unit`s to do; the speed is told in `counted`. Rank 0's own share, which is every rank's up to a shard."""

    def __init__(self, total: int, talks: bool, unit: str, counted: str):
        self.count, self.done = 0, 0
        self._unit, self._counted = unit, counted
        self._started = self._last_line = time.monotonic()
        self._total, self._talks = total, talks
        self._bar = None
        if talks and sys.stderr.isatty():
            self._bar = tqdm(total=total, unit=unit, unit_scale=True, dynamic_ncols=True)

    def add(self, count: int, done: int) -> None:
        self.count, self.done = self.count + count, self.done + done
        if self._bar is not None:
            self._bar.update(done)
        elif self._talks and time.monotonic() - self._last_line >= LINE_SECONDS:
            self._last_line = time.monotonic()
            seconds = self._last_line - self._started
            left = tqdm.format_interval(seconds / self.done * (self._total - self.done))
            share, speed = self.done / self._total, self.count / seconds
            print(f"dpo-ds: {share:.0%}  {speed:.3g} {self._counted}/s a rank  left {left}", flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._talks and self.count:
            seconds = time.monotonic() - self._started
            line = f"{self.count} {self._counted}, {self.done} {self._unit}s in {seconds:.1f} s on rank 0"
            print(f"dpo-ds: {line}", flush=True)
