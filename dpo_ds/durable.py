"""Files that are on the disk when a call returns, and their SHA-256; no torch, no deepspeed beyond torch.save."""

from __future__ import annotations

import hashlib
import os
import secrets
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_crc32_options, set_crc32_options

from dpo_ds import faultpoints

CHUNK = 16 << 20


@dataclass(frozen=True)
class Written:
    """What a file on disk must be."""

    size: int
    sha256: str


class HashingFile:
    """A file to write into whose hash is known at the end, computed beside the writing.

    A disk that fills up or breaks raises nothing here: the rest is thrown away and `error` says why, so that a rank can
    go on to where all ranks meet.
    """

    def __init__(self, path: Path, hasher: ThreadPoolExecutor):
        self.error: OSError | None = None
        self._path, self._hasher = path, hasher
        self._digest, self._size = hashlib.sha256(), 0
        self._file = None
        self._attempt(self._open)

    def write(self, data) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), CHUNK):
            part = view[start : start + CHUNK]
            if self.error is None:
                hashed: Future = self._hasher.submit(self._digest.update, part)  # both let go of the interpreter's lock
                self._attempt(self._write_all, part)
                hashed.result()
                faultpoints.reach("shard-half-written")
        self._size += len(view)
        return len(view)

    def flush(self) -> None:
        """torch.save's; what counts is close."""

    def close(self) -> Written:
        """Waits for the disk."""
        if self._file is not None:
            if self.error is None:
                self._attempt(os.fsync, self._file.fileno())
            self._attempt(self._file.close)
        return Written(self._size, self._digest.hexdigest())

    def _open(self) -> None:
        self._file = open(self._path, "wb", buffering=0)

    def _write_all(self, part: memoryview) -> None:
        while part:
            part = part[self._file.write(part) :]  # an unbuffered write may stop short

    def _attempt(self, action, *args) -> None:
        try:
            action(*args)
        except OSError as error:
            self.error = self.error or error


class DurableWriter:
    """Stands in for DeepSpeed's checkpoint_engine during a save: hashes, fsyncs and never raises OSError."""

    def __init__(self, inner: Any):
        self._inner = inner
        self.files: dict[str, Written] = {}  # name -> what must be there
        self.error: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def save(self, state_dict: dict, path: str) -> None:
        with ThreadPoolExecutor(1) as hasher:
            file = HashingFile(Path(path), hasher)
            checked = get_crc32_options()
            set_crc32_options(False)  # a second checksum beside ours, on the thread that writes
            torch.save(state_dict, file)
            set_crc32_options(checked)
            self.files[Path(path).name] = file.close()
        self.error = self.error or file.error


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
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")  # two ranks may write one manifest at once
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """The names in a folder: files created, renamed or removed."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
