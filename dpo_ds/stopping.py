"""Stopping early without losing anything: signals and time limits become a flag that all ranks agree on between two steps.

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
from collections.abc import Callable, Iterator

import torch

from dpo_ds import metrics
from dpo_ds.peers import PeerWatch, Silent

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
TIME_LIMIT = 1  # beside signal numbers; no signal that we take has this one
SLURM_END = "SLURM_JOB_END_TIME"  # seconds since 1970
TWICE_SECONDS = 2.0  # launchers turn one Ctrl-C into several signals within milliseconds
EXIT_INTERRUPTED = 130


class Stopped(Exception):
    """All ranks agreed to end before the last step; str() is the reason, `step` the one that the checkpoint holds."""

    def __init__(self, reason: str, step: int):
        super().__init__(reason)
        self.step = step


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Before the first step there is nothing to save: a signal ends the run where it is. Main thread only."""

    def stop(signum, frame):
        raise Stopped(f"{signal.Signals(signum).name} before the first step", 0)

    previous = {signum: signal.signal(signum, stop) for signum in SIGNALS}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


class StopFlag:
    """Takes this process's signals from `with` on; `agreed` is for all ranks, between two steps.

    Args:
        deadline: when to stop unasked, in seconds since 1970; None: never.
        peers: told how far this rank is.
        committing: held while a checkpoint is made visible, which nothing interrupts.
        on_interrupt: called before a second Ctrl-C ends this process.
    """

    def __init__(
        self, deadline: float | None, peers: PeerWatch | Silent, committing: threading.Lock, on_interrupt: Callable[[], None]
    ):
        self.peers = peers
        self._deadline, self._committing, self._on_interrupt = deadline, committing, on_interrupt
        self._signal, self._since = 0, 0.0

    def __enter__(self) -> StopFlag:
        self._wake, waker = socket.socketpair()
        waker.setblocking(False)
        self._waker = waker  # kept open
        self._previous_fd = signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
        self._previous = {signum: signal.signal(signum, lambda *_: None) for signum in SIGNALS}  # the thread acts
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        signal.set_wakeup_fd(self._previous_fd)
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._waker.close()

    def agreed(self, step: int, device: torch.device) -> str:
        """Why to stop before `step`, or "" to go on; the same on every rank, whoever was told. All ranks enter."""
        self.peers.progress(step)
        mine = self._signal
        if not mine and self._deadline is not None and time.time() >= self._deadline:
            mine = TIME_LIMIT
        told = int(metrics.reduce_max(mine, device))
        if told == 0:
            return ""
        return "the time limit is near" if told == TIME_LIMIT else f"{signal.Signals(told).name} received"

    def _listen(self) -> None:
        while received := self._wake.recv(64):
            for signum in received:
                if signum in SIGNALS:
                    self._take(signum)

    def _take(self, signum: int) -> None:
        now, name = time.monotonic(), signal.Signals(signum).name
        if not self._signal:
            self._signal, self._since = signum, now
            again = "; once more ends at once, without a checkpoint" if signum == signal.SIGINT else ""
            print(f"dpo-ds: {name}: saving a checkpoint after this step, then ending{again}", file=sys.stderr, flush=True)
        elif signum == signal.SIGINT and now - self._since > TWICE_SECONDS:
            with self._committing:
                self._on_interrupt()
                os._exit(EXIT_INTERRUPTED)


def deadline(save_before_end_seconds: int, time_limit_seconds: int, started: float) -> float | None:
    """When to stop unasked, in seconds since 1970: `save_before_end_seconds` before the earlier of the limit and Slurm's.

    None if save_before_end_seconds is 0; preflight makes sure that there is an end to be before.
    """
    if not save_before_end_seconds:
        return None
    ends = [float(os.environ[SLURM_END])] if SLURM_END in os.environ else []
    ends += [started + time_limit_seconds] if time_limit_seconds else []
    return min(ends) - save_before_end_seconds
