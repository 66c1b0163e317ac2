"""Writes files whose SHA-256 is known at the end, computed beside the writing."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from dpo_ds.checkpoint import faultpoints
from dpo_ds.cluster.shared_files import CHUNK, in_background

WORTH_A_THREAD = 1 << 20  # bytes that take longer to hash than a thread takes to start


@dataclass(frozen=True)
class Written:
    """Says what a file on disk must be."""

    size: int
    sha256: str


class HashingFile:
    """A file to write into whose hash is known at the end, computed beside the writing.

    A disk that fills up or breaks raises nothing here: the rest is thrown away and `error` says why, so that a rank can
    go on to where all ranks meet.
    """

    def __init__(self, path: Path):
        self.error: OSError | None = None
        self.size = 0
        self._path, self._digest = path, hashlib.sha256()
        self._file = None
        self._sent = 0  # bytes that the disk has been told to take
        self._attempt(self._open)

    def write(self, data) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), CHUNK):
            part = view[start : start + CHUNK]
            if self.error is None and len(part) < WORTH_A_THREAD:
                self._digest.update(part)
                self._attempt(self._write_all, part)
            elif self.error is None:
                hashed = in_background(lambda part=part: self._digest.update(part))  # both let go of Python's lock
                self._attempt(self._write_all, part)
                hashed.result()
            self.size += len(part)
            faultpoints.reach("shard-half-written")
        return len(view)

    def flush(self) -> None:
        """torch.save's; what counts is close."""

    def close(self) -> Written:
        """Waits for the disk."""
        if self._file is not None:
            if self.error is None:
                self._attempt(os.fsync, self._file.fileno())
                self._attempt(self._drop_from_cache, self.size)
            self._attempt(self._file.close)
        return Written(self.size, self._digest.hexdigest())

    def _open(self) -> None:
        self._file = open(self._path, "wb", buffering=0)

    def _write_all(self, part: memoryview) -> None:
        end = self.size + len(part)
        while part:
            part = part[self._file.write(part) :]  # an unbuffered write may stop short
        if end - self._sent >= CHUNK:
            self._drop_from_cache(end)

    def _drop_from_cache(self, end: int) -> None:
        """Lets go of the page cache: Linux starts writing such pages at once, so that little is left to wait for in
        close.
        """
        os.posix_fadvise(self._file.fileno(), 0, end, os.POSIX_FADV_DONTNEED)
        self._sent = end

    def _attempt(self, action, *args) -> None:
        try:
            action(*args)
        except OSError as error:
            self.error = self.error or error
