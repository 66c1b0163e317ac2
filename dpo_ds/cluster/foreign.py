"""Runs code that is not ours in this process, and stays its master: whatever it does to us becomes one line.

`guarded` holds score functions and judges, `time_limit` patterns and chat templates, `refusing` the libraries' own
reading of what the user gave them. Such code keeps what it has loaded, so it runs where we run, and not in a child.

The time limit is a timer of the kernel's: a thread of ours would wait for the interpreter's lock, which `re` holds
while it searches, whereas `re` looks for signals every 4096 steps of its own (_sre), so that an exponential pattern
ends when the alarm rings. Patterns thus stay Python's; those of the `regex` package, which knows a timeout, are not the
same in every case.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError

from dpo_ds.cluster import rendezvous, signals, terminal
from dpo_ds.errors import UserError, shorten

SHOWN_BY = " (DPO_DS_VERBOSE=1 shows where)"
AGAIN_SECONDS = 1.0  # the alarm rings so often, for code that catches everything
LAST_SECONDS = 10.0  # after the limit, for code that no signal reaches
FORK_SECONDS = 1.0  # for a child to come back; one that works elsewhere, such as a pool's, never does


class Limit(NamedTuple):
    """Seconds for one call; `key` is what the user sets them by."""

    seconds: float
    key: str

    def __str__(self) -> str:
        return f"within {self.seconds:g} s ({self.key})"


class Raised(UserError):
    """Code that is not ours raised something."""


class Overdue(BaseException):  # not an Exception, which much code catches
    """The alarm has rung; `time_limit` makes a mistake of the user's of it."""


@contextlib.contextmanager
def time_limit(seconds: float, mistake: Callable[[], UserError]) -> Iterator[None]:
    """Raises `mistake()` where what it holds has not ended after so many seconds. For the main thread; in others, which
    no signal reaches, it sets no limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    is_open, has_rung = True, False

    def ring(*_) -> None:
        nonlocal has_rung
        if is_open:
            has_rung = True
            raise Overdue

    handler = signal.signal(signal.SIGALRM, ring)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN_SECONDS)
    try:
        try:
            yield
        finally:
            is_open = False
    except BaseException:
        signals.check()
        if not has_rung:
            raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler or signal.SIG_DFL)
    signals.check()
    if has_rung:  # also where the code has swallowed it
        raise mistake()


@contextlib.contextmanager
def guarded(who: str, limit: Limit) -> Iterator[None]:
    """Runs what it holds, which is not ours and is called `who`; threads that it leaves do not hold up our end.

    A signal that ends the command stays what it is.

    Raises:
        UserError: it raised anything (`Raised`), took longer than the limit, closed standard output or error (they are
            opened again), or forked so that two processes came back (the child's ends at once).
    """
    late = UserError(f"{who} did not return {limit}")
    # From a thread, where the main thread sits in C code that no signal interrupts.
    last_resort = otherwise(limit.seconds + LAST_SECONDS, rendezvous.give_up, late)
    with last_resort, time_limit(limit.seconds, lambda: late):
        with _open_streams(who), _one_process(who):
            try:
                yield
            except Overdue:
                raise
            except BaseException as error:
                signals.check()
                if isinstance(error, KeyboardInterrupt) and signal.getsignal(signal.SIGINT) is _PYTHONS:
                    raise  # nobody has taken signals, as in a notebook: then this is the user's Ctrl-C
                raise Raised(f"{who} raised {told(error)}") from error


_PYTHONS = signal.default_int_handler


@contextlib.contextmanager
def refusing(mistake: Callable[[str], UserError]) -> Iterator[None]:
    """Raises `mistake(what was raised, in a line)` for every exception of what it holds, which DPO_DS_VERBOSE=1 shows
    whole. Lack of memory, a rank that has gone and a UserError are no mistake in a file, and stay what they are.
    """
    try:
        yield
    except (UserError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        signals.check()
        if "/torch/distributed/" in traceback.extract_tb(error.__traceback__)[-1].filename:
            raise
        if os.environ.get("DPO_DS_VERBOSE"):
            traceback.print_exc()
        raise mistake(told(error)) from error


def told(error: BaseException) -> str:
    """Returns type and text of an exception in one line, with the key where it names one; its methods may fail too."""
    if isinstance(error, ValidationError):
        finding = error.errors()[0]
        key = ".".join(str(part) for part in finding["loc"])
        return f"{error.title}: {key} is {shorten(finding['input'])}: {finding['msg']}"
    try:
        text = " ".join(str(error).split())[:300]
    except Exception:
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextlib.contextmanager
def otherwise(seconds: float, call: Callable[[Any], Any], argument: Any) -> Iterator[None]:
    """Calls `call(argument)` from a thread, unless the block ends within so many seconds."""
    timer = threading.Timer(seconds, call, [argument])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def _open_streams(who: str) -> Iterator[None]:
    """Raises UserError where standard output or error is closed or another file afterwards, and puts it right."""
    streams = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    copies = {1: os.dup(1), 2: os.dup(2)}
    lost = []
    try:
        yield
    finally:
        for (name, stream), (number, copy) in zip(streams.items(), copies.items(), strict=True):
            is_closed = getattr(stream, "closed", False)
            if is_closed or not _is_same(number, copy):
                lost.append(name)
                os.dup2(copy, number)
            if is_closed:
                stream = open(number, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
            setattr(sys, name, stream)
            os.close(copy)
        if lost:
            terminal.protect()
    if lost:
        raise UserError(f"{who} closed {' and '.join(lost)}, which it has to leave open")


def _is_same(descriptor: int, copy: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.fstat(copy))
    except OSError:
        return False


class _Forks:
    count = 0  # of this process so far

    @classmethod
    def add(cls) -> None:
        cls.count += 1


os.register_at_fork(after_in_parent=_Forks.add)


@contextlib.contextmanager
def _one_process(who: str) -> Iterator[None]:
    """Ends a child that comes out of here as well, without a word; its parent raises UserError."""
    process, forks = os.getpid(), _Forks.count
    with mmap.mmap(-1, 1) as mark:  # shared with children
        try:
            yield
        finally:
            if os.getpid() != process:
                mark[0] = 1
                os._exit(0)
        end = time.monotonic() + FORK_SECONDS
        while _Forks.count > forks and not mark[0] and time.monotonic() < end:
            time.sleep(0.01)
        if mark[0]:
            raise UserError(f"{who} forked, and the child came back too; a child has to end itself (os._exit)")
