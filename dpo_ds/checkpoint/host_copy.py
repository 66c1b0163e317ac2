"""Keeps back what DeepSpeed would save, to be written while training stands still, or from a copy while it goes on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.serialization import get_crc32_options, set_crc32_options

BLOCK = 64 << 20
CGROUPS = Path("/sys/fs/cgroup")
GROUP_FILES = {  # of a group's limit, of what it uses, and the line of memory.stat on what of that could be dropped
    "": ("memory.max", "memory.current", "inactive_file"),  # version 2
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),  # version 1
}


class Sink(Protocol):
    """Takes a file's content, piece by piece."""

    def write(self, data) -> int: ...
    def flush(self) -> None: ...


Content = Callable[[Sink], None]  # writes a file's content into a sink


class HostCopy:
    """Files in memory, byte for byte what will be on disk; the next ones take the same blocks."""

    def __init__(self):
        self._blocks: list[np.ndarray] = []
        self._used = 0
        self._pieces: list[memoryview] = []

    @property
    def bytes(self) -> int:
        """Memory held, also between two saves."""
        return len(self._blocks) * BLOCK

    def clear(self) -> None:
        """Frees the blocks for the next save."""
        self._used = 0

    def take(self, state: dict) -> Content:
        """The file that `state` would become, as it is now."""
        self._pieces = []
        save(state, self)
        return partial(_write_pieces, self._pieces)

    def write(self, data) -> int:
        view = memoryview(data).cast("B")
        start = 0
        while start < len(view):
            index, offset = divmod(self._used, BLOCK)
            if index == len(self._blocks):
                self._blocks.append(np.empty(BLOCK, np.uint8))
            part = view[start : start + BLOCK - offset]
            target = self._blocks[index][offset : offset + len(part)]
            target[:] = np.frombuffer(part, np.uint8)
            self._pieces.append(memoryview(target))
            self._used += len(part)
            start += len(part)
        return len(view)

    def flush(self) -> None:
        """torch.save's."""


class Capture:
    """Stands in for DeepSpeed's checkpoint_engine: nothing is written, `files` has what would be.

    copy: where the content is kept from what training does next; None where it waits.
    """

    def __init__(self, inner: Any, copy: HostCopy | None):
        self._inner, self._copy = inner, copy
        self.files: dict[str, Content] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def save(self, state_dict: dict, path: str) -> None:
        self.files[Path(path).name] = self._copy.take(state_dict) if self._copy else partial(save, state_dict)


def capture(engine, folder: Path, client_state: dict, copy: HostCopy | None) -> dict[str, Content]:
    """The content of this rank's files in `folder` by their names. All ranks enter."""
    kept = Capture(engine.checkpoint_engine, copy)
    engine.checkpoint_engine = kept
    engine._copy_recovery_script = lambda path: None  # it would raise on one rank alone where the disk is full
    engine.save_checkpoint(
        str(folder.parent),
        tag=folder.name,
        client_state=client_state,
        save_latest=False,
        exclude_frozen_parameters=True,  # they are in the model's own files
    )
    engine.checkpoint_engine = kept._inner
    return kept.files


def save(state: dict, sink: Sink) -> None:
    """torch.save without its own checksum beside our SHA-256."""
    checked = get_crc32_options()
    set_crc32_options(False)
    torch.save(state, sink)
    set_crc32_options(checked)


def _write_pieces(pieces: list[memoryview], sink: Sink) -> None:
    for piece in pieces:
        sink.write(piece)


def free_memory() -> int:
    """Bytes that this process's machine can still give, and its control group allows."""
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return min([1024 * int(meminfo["MemAvailable"].split()[0]), *_left_in_groups()])


def _left_in_groups() -> Iterator[int]:
    """Yields what every control group with a limit around this process leaves; a container's own is the outermost."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controller, name = line.split(":", 2)
        root = CGROUPS / controller
        for folder in (root / name.strip("/") / "group").parents if controller in GROUP_FILES else ():
            if not folder.is_relative_to(root):
                break
            limit, used, spare = GROUP_FILES[controller]
            with contextlib.suppress(FileNotFoundError, ValueError):  # the outermost has none; a limit may be "max"
                free = int((folder / limit).read_text()) - int((folder / used).read_text())
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                yield free + int(stat[spare])
