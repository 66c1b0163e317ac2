"""Takes the signals that end a job, from the first line of the program to its last; no torch, no deepspeed.

Until training takes them over (stopping.StopFlag), a signal ends the command where it is: `Stopped` is raised in the
main thread, once, however many signals come.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
TWICE_SECONDS = 2.0  # launchers turn one Ctrl-C into several signals within milliseconds
EXIT_STOPPED, EXIT_INTERRUPTED = 75, 130


class Stopped(BaseException):  # not an Exception: a user's scoring function may be running, whose own are caught
    """The command ends early, in good order; str() is the reason, `step` the last one that a checkpoint holds.

    remedy: what is kept and how to go on, for the line that the user reads.
    """

    def __init__(self, reason: str, step: int = 0):
        super().__init__(reason)
        self.step, self.remedy = step, "the same command starts it again"

    def line(self) -> str:
        """Returns what rank 0 says of it."""
        return f"stopped{f' after step {self.step}' if self.step else ''}: {self}; {self.remedy}"


@contextlib.contextmanager
def keeping(what: str) -> Iterator[None]:
    """Has the line of a command that is stopped say what is kept, and how to go on."""
    try:
        yield
    except Stopped as stopped:
        stopped.remedy = what
        raise


class _Taken:
    """Keeps what this process has been told, by signals or by another rank."""

    error: BaseException | None = None  # what the main thread has to raise
    raised: float | None = None  # when it did
    at_once = False  # else others act on signals, or nobody does any more


_taken = _Taken()


def take() -> dict[int, object]:
    """Raises `Stopped` in the main thread at the first signal, from here on; returns who took signals before."""
    _taken.error, _taken.raised, _taken.at_once = None, None, True
    return {number: signal.signal(number, _on_signal) for number in heard()}


def heard() -> list[signal.Signals]:
    """Returns the signals that mean anything: nohup has SIGHUP ignored, and it stays so."""
    return [number for number in SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]


@contextlib.contextmanager
def taken() -> Iterator[None]:
    """Takes signals meanwhile; where they are taken already, or outside the main thread, does nothing."""
    if _taken.at_once or threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = take()
    try:
        yield
    finally:
        _taken.at_once, _taken.error = False, None
        for number, handler in previous.items():
            signal.signal(number, handler)


def ignore() -> None:
    """Lets every further signal pass: the command has come to its end, which takes a moment more."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def leave_to_others() -> None:
    """Lets signals raise nothing from here on: training stops between two steps, or the command is at its end."""
    _taken.at_once = False


def check() -> None:
    """Raises again what the main thread was to raise, in case that a library's `except` has swallowed it."""
    if _taken.error is not None:
        raise _taken.error


def interrupt(error: BaseException) -> bool:
    """Raises `error` in the main thread, from any other; False where signals are left to others."""
    if not _taken.at_once:
        return False
    if _taken.error is None:
        _taken.error = error
        signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)
    return True


def _on_signal(signum: int, frame) -> None:
    if not _taken.at_once:
        return
    now = time.monotonic()
    if _taken.raised is not None:  # the command is ending already
        if signum == signal.SIGINT and now - _taken.raised > TWICE_SECONDS:
            os._exit(EXIT_INTERRUPTED)
        return
    if _taken.error is None:
        _taken.error = Stopped(f"{signal.Signals(signum).name} received")
    _taken.raised = now
    raise _taken.error
