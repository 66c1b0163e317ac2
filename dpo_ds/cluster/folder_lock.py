"""One `dpo-ds precompute` or `sample` at a time in a folder: a lock that lasts as long as the processes that hold it.

It is POSIX's record lock on a file there, which the kernel gives back when a process ends, however it ends. It holds
between nodes on NFS (version 4, or 3 with its lock daemon) and on parallel file systems mounted with locks; where there
are none, a line says so.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Callable, Iterable
from pathlib import Path

from dpo_ds.errors import ConfigError

NAME = ".lock"
TAKEN = (errno.EACCES, errno.EAGAIN)  # POSIX allows both


class FolderLock:
    """Byte `rank` of the file is a rank's; whoever begins has all bytes, so that no rank of another job may be left.

    The file stays open: closing any descriptor of it would give the lock back. key: by which the user gave the folder.
    """

    def __init__(self, folder: Path, rank: int, key: str):
        self._path, self._rank, self._key = folder / NAME, rank, key
        self._file = self._path.open("a+", encoding="utf-8")

    def take(self, say: Callable[[Iterable[str]], None]) -> None:
        """All of it, before anything else is done; rank 0 alone.

        Raises:
            ConfigError: another job is at work there.
        """
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in TAKEN:
                say([f"{self._path}: {error.strerror}; where there are no locks, start no second job there meanwhile"])
                return
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            folder = f"--{self._key} {self._path.parent}"
            raise ConfigError(f"{folder}: {holder} is filling it; wait for its end, or give another folder") from None
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()

    def close(self) -> None:
        """Gives it back; no name stays in the file, so that a finished folder has the same bytes whoever filled it."""
        if self._rank == 0:
            self._file.truncate(0)
        self._file.close()

    def share(self, barrier: Callable[[], None]) -> None:
        """From rank 0's alone to every rank's own: the last to end gives it back. All ranks enter."""
        no_locks = contextlib.suppress(OSError)  # of a file system without them: rank 0 has said so
        with no_locks:
            if self._rank == 0:
                fcntl.lockf(self._file, fcntl.LOCK_UN, 0, 1)  # all but byte 0
        barrier()
        with no_locks:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, self._rank)
        barrier()
