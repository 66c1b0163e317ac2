"""Keeps a command going when nobody reads what it prints any more: `| head` has ended, a log's disk is full."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from typing import TextIO

GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO)  # a reader or terminal that does not come back


def protect() -> None:
    """Lets writes to standard output and error fail without a word; STATUS.json and checkpoints tell of the run.

    A descriptor that was closed from the start becomes /dev/null, or the first file opened would get what is printed.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, _Lasting):
            setattr(sys, name, _Lasting(stream or open(os.devnull, "w", encoding="utf-8")))


def finish() -> None:
    """Writes what is left, if it can be; the interpreter's own attempt would turn the exit code into 120."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, _Lasting):
            stream.flush()
            stream.give_up()


class _Lasting:
    """A text stream whose write, flush and reconfigure never fail; everything else is the stream's own."""

    def __init__(self, stream: TextIO):
        self._stream, self._unwritten = stream, False
        if isinstance(stream, io.TextIOWrapper):
            self.reconfigure(errors="backslashreplace")  # a terminal that is ASCII gets \u03c3 for σ, not a traceback

    def reconfigure(self, **changes) -> None:
        """As the stream's own, which first writes what it holds, and asks its file where it stands."""
        try:
            self._stream.reconfigure(**changes)
        except (OSError, ValueError) as error:
            self._failed(error)

    def write(self, text: str) -> int:
        """Returns the characters given, whether they could be written or not."""
        try:
            self._stream.write(text)
        except (OSError, ValueError) as error:  # ValueError: somebody has closed the stream
            self._failed(error)
        return len(text)

    def writelines(self, lines) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._failed(error)

    def give_up(self) -> None:
        """Throws away what a full disk has not taken."""
        if self._unwritten:
            self._to_nowhere()

    def _failed(self, error: Exception) -> None:
        self._unwritten = True
        if isinstance(error, OSError) and error.errno in GONE:
            self._to_nowhere()

    def _to_nowhere(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            self._stream.flush()

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def __iter__(self):
        return iter(self._stream)

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.flush()
