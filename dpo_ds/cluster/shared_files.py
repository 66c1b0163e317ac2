"""Writes and locks files that several processes or nodes share; no torch, no deepspeed.

A write is on the disk when the call returns. A folder is filled by one job at a time: `FolderLock` is POSIX's record
lock on a file there, which the kernel gives back when a process ends, however it ends. It holds between nodes on NFS
(version 4, or 3 with its lock daemon) and on parallel file systems mounted with locks; where there are none, a line
says so.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import socket
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path

from dpo_ds.errors import ConfigError

CHUNK = 16 << 20
LOCK_FILE = ".lock"
LOCK_TAKEN = (errno.EACCES, errno.EAGAIN)  # POSIX allows both


def in_background(call: Callable) -> Future:
    """Runs `call()` in a thread that keeps no process alive, and returns its future."""
    future: Future = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def write_text(path: Path, text: str) -> None:
    """`write_whole` of UTF-8 text."""
    write_whole(path, text.encode())


def write_whole(path: Path, content) -> None:
    """The file appears with all of its bytes or not at all, also after a power cut; what was there is replaced."""
    temporary = temporary_beside(path)  # two ranks may write one manifest at once
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Returns when the file's bytes are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Returns when the names in a folder are on the disk: files created, renamed or removed."""
    sync_file(path)


class FolderLock:
    """Byte `rank` of the file is a rank's; whoever begins has all bytes, so that no rank of another job may be left.

    The file stays open: closing any descriptor of it would give the lock back. key: by which the user gave the folder.
    """

    def __init__(self, folder: Path, rank: int, key: str):
        self._path, self._rank, self._key = folder / LOCK_FILE, rank, key
        self._file = self._path.open("a+", encoding="utf-8")

    def take(self, say: Callable[[Iterable[str]], None]) -> None:
        """Takes the whole lock, before anything else is done; rank 0 alone.

        Raises:
            ConfigError: another job is at work there.
        """
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in LOCK_TAKEN:
                say([f"{self._path}: {error.strerror}; where there are no locks, start no second job there meanwhile"])
                return
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            remedy = "wait for its end, or give another folder"
            raise ConfigError(f"--{self._key} {self._path.parent}: {holder} is at work there; {remedy}") from None
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


def is_at_work(folder: Path) -> bool:
    """Tells whether another process holds the folder's lock; not to be asked by one that holds it itself."""
    try:
        with (folder / LOCK_FILE).open("a+") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in LOCK_TAKEN
    return False


def temporary_beside(path: Path) -> Path:
    """Returns a name beside `path` that nobody else has, which `leftovers` recognises."""
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")


def leftovers(folder: Path, names: str) -> list[Path]:
    """Returns what killed processes of ours left in `folder` under names from `temporary_beside`.

    names: a regular expression that what they were to become matches whole; nobody else's file is ever among them.
    """
    return [path for path in folder.iterdir() if re.fullmatch(rf"(?:{names})\.[0-9a-f]{{8}}\.tmp", path.name)]


def refuse_foreign(folder: Path, key: str, is_ours: Callable[[Path], bool]) -> None:
    """Looks at a folder before a command writes into it: it must be new, empty, or carry our mark.

    is_ours: tells the mark. Hidden files and empty folders do not count (`checkpoints` may be a disk of its own), nor
    does the folder `logs` of the launch scripts.

    Raises:
        ConfigError: it holds something and no mark of ours; nothing in it has been touched.
    """
    if not folder.is_dir() or is_ours(folder):
        return
    seen = [path for path in folder.iterdir() if not path.name.startswith(".") and path.name != "logs"]
    found = sorted(path.name for path in seen if not path.is_dir() or any(path.iterdir()))
    if found:
        shown = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
        raise ConfigError(
            f"--{key} {folder}: holds {shown}, which dpo-ds did not make; give a new or an empty folder, or one that "
            "dpo-ds filled"
        )


def make_writable(folder: Path, key: str) -> None:
    """ConfigError where `--KEY FOLDER` cannot be made or written into."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        why = f"not writable ({error.strerror}); choose another folder"
        raise ConfigError(f"--{key} {folder}: {why}") from None
