"""Keeps what is derived from the user's files under DPO_DS_CACHE: made once, found again by name, used while whole.

A folder is filled by the process with `build`, under a file lock, and appears by one rename, on the disk, with the
SHA-256 of its files. The other processes watch for it; they enter no collective, so nothing times out while millions
of rows are read. They also try the lock: where nobody has held it for a while and there is no folder, the process that
fills it has ended, most often for a mistake in the data. Every process trusts a folder only after each of its bytes
was read once on this machine; afterwards it looks at the files' times alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from dpo_ds.cluster.shared_files import sha256, sync_file, sync_folder, write_text
from dpo_ds.errors import ConfigError, DataError

SUMS = "SHA256SUMS"  # of every other file of a folder, as sha256sum writes and checks it
POLL_SECONDS = 0.2
WAIT_SECONDS = 12 * 3600  # for the process that fills a folder
ABANDONED_SECONDS = 120  # that nobody holds the lock: more than ranks differ in when they come to the data
SETTLED_SECONDS = 2  # a file changed so lately may change again within one tick of its file system's clock


def cache_root() -> Path:
    return Path(os.environ.get("DPO_DS_CACHE") or "~/.cache/dpo_ds").expanduser()


@contextmanager
def usable(root: Path) -> Iterator[None]:
    """Makes a folder of the cache; what its disk refuses, then or later, is a ConfigError."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        yield
    except TimeoutError:  # an OSError too
        raise
    except OSError as error:
        problem = f"the data cache {root} cannot be made or written ({error.strerror or error})"
        raise ConfigError(f"{problem}; set DPO_DS_CACHE to a folder on a disk with room") from error


def content_digest(path: Path) -> str:
    """Returns the SHA-256 of a file, read once on this machine."""
    return remembered([path], "bytes", lambda: sha256(path))


def remembered(paths: Sequence[Path], what: str, compute: Callable[[], str]) -> str:
    """Returns `compute()`, a SHA-256 that depends on these files alone: computed once on this machine.

    It is remembered under the files' status, which is path, size, inode and both times: other content under an old
    size and modification time has a new inode or change time. A file that has changed just now is read again next time.
    """
    before = [path.stat() for path in paths]
    status: list = [socket.gethostname(), what]
    for path, file in zip(paths, before, strict=True):
        status += [str(path.resolve()), file.st_size, file.st_ino, file.st_mtime_ns, file.st_ctime_ns]
    memory = cache_root() / "digests" / hashlib.sha256(json.dumps(status).encode()).hexdigest()[:32]
    with suppress(OSError, UnicodeDecodeError):
        if re.fullmatch(r"[0-9a-f]{64}", known := memory.read_text(encoding="utf-8")):
            return known
    begun, digest = time.time(), compute()
    if begun - max(max(file.st_mtime, file.st_ctime) for file in before) > SETTLED_SECONDS:
        with suppress(OSError):  # then it is read again next time
            memory.parent.mkdir(parents=True, exist_ok=True)
            write_text(memory, digest)
    return digest


def derive(folder: Path, what: str, fill: Callable[[Path], None], build: bool) -> None:
    """Returns once `folder` is there and whole; with `build`, `fill(folder)` makes it where it is not.

    what: its name in the line that says that it was damaged and is made again.

    Raises:
        ConfigError: the cache's disk refuses.
        DataError: without `build`, the process that fills the folder has ended without it.
        TimeoutError: it did not appear within WAIT_SECONDS.
    """
    lock = f"{folder}.lock"
    with usable(folder.parent):
        if not build:
            _wait_for(folder, lock)
            return
        if damage(folder) is None:
            return
        with FileLock(lock):
            if folder.exists() and (problem := damage(folder)) is not None:
                print(f"dpo-ds: {what} in {folder}: {problem}; it is made again", flush=True)
                shutil.rmtree(folder)
            if not folder.exists():
                _make(folder, fill)


def damage(folder: Path) -> str | None:
    """Returns what is wrong with a folder that `derive` made, None if every file is as it was written."""
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
        sums = dict(reversed(line.split("  ", 1)) for line in lines)
        changed = next((name for name, digest in sums.items() if content_digest(folder / name) != digest), None)
    except (OSError, ValueError) as error:
        return f"{SUMS} or a file that it names cannot be read ({type(error).__name__})"
    if changed or not sums:
        return f"{changed} is not what was written" if changed else f"{SUMS} is empty"
    return None


def _make(folder: Path, fill: Callable[[Path], None]) -> None:
    """Fills a folder beside `folder` and renames it; what an earlier, killed process left there is cleared."""
    work = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        fill(work)
        files = sorted(work.iterdir())
        for path in files:
            sync_file(path)
        write_text(work / SUMS, "".join(f"{sha256(path)}  {path.name}\n" for path in files))
    except BaseException:
        shutil.rmtree(work)
        raise
    work.rename(folder)
    sync_folder(folder.parent)


def _wait_for(folder: Path, lock: str) -> None:
    start = idle_since = time.monotonic()
    while damage(folder) is not None:
        now = time.monotonic()
        if now - start > WAIT_SECONDS:
            raise TimeoutError(f"{folder} did not appear within {WAIT_SECONDS} s: is the rank that makes it gone?")
        if _is_held(lock):
            idle_since = time.monotonic()
        elif now - idle_since > ABANDONED_SECONDS:
            raise DataError(f"{folder}: the rank that makes it ended without it; its own message says why")
        else:
            time.sleep(POLL_SECONDS)


def _is_held(lock: str) -> bool:
    """Is somebody at work under the lock? Tries for a moment: another waiter that looks holds it for an instant."""
    try:
        with FileLock(lock, timeout=POLL_SECONDS):
            return False
    except Timeout:
        return True
