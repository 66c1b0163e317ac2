"""Stopping early without losing anything: signals and time limits set a flag that all ranks agree on between two steps.

Signals are read by a thread, because Python runs no handler while the main thread sits in a collective.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from dpo_ds.cluster import collectives, signals
from dpo_ds.cluster.signals import EXIT_INTERRUPTED, SIGNALS, TWICE_SECONDS
from dpo_ds.config import CheckpointSection
from dpo_ds.errors import ConfigError

TIME_LIMIT = -1  # beside signals' numbers
KINDS = (*sorted(SIGNALS, reverse=True), TIME_LIMIT)  # the first that any rank was told is the reason given
SLURM_END = "SLURM_JOB_END_TIME"  # seconds since 1970


def stop_reason(told: Sequence[float]) -> str:
    """Returns why to stop, "" to go on, from the sums over all ranks of what they were told (`StopFlag.told`)."""
    kind = next((kind for kind, count in zip(KINDS, told, strict=True) if count), None)
    if kind is None:
        return ""
    return "the time limit is near" if kind == TIME_LIMIT else f"{signal.Signals(kind).name} received"


class StopFlag:
    """Knows whether to stop, by this process's signals or by `deadline` (seconds since 1970; None: never).

    `committing` is to be held while a checkpoint is made visible: no signal interrupts that.
    """

    def __init__(self, deadline: float | None = None):
        self.committing = threading.Lock()
        self._deadline = deadline
        self._signal, self._since = 0, 0.0

    @contextlib.contextmanager
    def taking_signals(self, on_interrupt: Callable[[], None]) -> Iterator[None]:
        """Main thread only. `on_interrupt` is called before a second Ctrl-C ends this process."""
        wake, waker = socket.socketpair()
        waker.setblocking(False)
        previous_fd = signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
        signals.check()
        signals.leave_to_others()
        previous = {signum: signal.signal(signum, lambda *_: None) for signum in signals.heard()}  # the thread acts
        threading.Thread(target=self._listen, args=(wake, on_interrupt), daemon=True).start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(previous_fd)
            for signum, handler in previous.items():
                signal.signal(signum, handler)
            waker.close()

    def agreed(self, device: torch.device) -> str:
        """Returns why to stop now, "" to go on; the same on all ranks, whoever was told. All enter."""
        return stop_reason(collectives.reduce_sum(torch.tensor(self.told(), device=device)).tolist())

    def told(self) -> list[int]:
        """Returns what this rank was told, for those who have a sum over the ranks to make anyway: a 1 for its kind."""
        mine = self._signal
        if not mine and self._deadline is not None and time.time() >= self._deadline:
            mine = TIME_LIMIT
        return [int(mine == kind) for kind in KINDS]

    def _listen(self, wake: socket.socket, on_interrupt: Callable[[], None]) -> None:
        while received := wake.recv(64):
            for signum in received:
                if signum in SIGNALS:
                    self._take(signum, on_interrupt)

    def _take(self, signum: int, on_interrupt: Callable[[], None]) -> None:
        now, name = time.monotonic(), signal.Signals(signum).name
        if not self._signal:
            self._signal, self._since = signum, now
            again = "; once more ends at once, without a checkpoint" if signum == signal.SIGINT else ""
            print(f"dpo-ds: {name}: ending with a checkpoint after this step{again}", file=sys.stderr, flush=True)
        elif signum == signal.SIGINT and now - self._since > TWICE_SECONDS:
            with self.committing:
                on_interrupt()
                os._exit(EXIT_INTERRUPTED)


def check_end(section: CheckpointSection) -> None:
    """Raises ConfigError where save_before_end_seconds is given and no end is known."""
    if section.save_before_end_seconds and not section.time_limit_seconds and SLURM_END not in os.environ:
        raise ConfigError(
            f"checkpoint.save_before_end_seconds {section.save_before_end_seconds} needs an end: {SLURM_END} is not "
            "set; give --checkpoint.time_limit_seconds"
        )


def deadline(section: CheckpointSection, started: float) -> float | None:
    """When to stop unasked, in seconds since 1970: so long before the earlier of our limit and Slurm's."""
    if not section.save_before_end_seconds:
        return None
    ends = [float(os.environ[SLURM_END])] if SLURM_END in os.environ else []
    ends += [started + section.time_limit_seconds] if section.time_limit_seconds else []
    return min(ends) - section.save_before_end_seconds
