"""Looks at where checkpoints go: room, speed, and whether every node sees the same folder."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dpo_ds.checkpoint.disk import HashingFile
from dpo_ds.cluster import collectives
from dpo_ds.cluster.launch import Launch
from dpo_ds.cluster.shared_files import write_text
from dpo_ds.commands.doctor.report import FAIL, PASS, WARN, Finding

DISK = "disk"
PROBE = 64 << 20  # bytes that each node writes
SEEN_SECONDS = 10.0  # that a network file system may take to show a new file
SLOW_SECONDS = 600.0  # for a checkpoint
TOKEN = "seen-by-all"


@dataclass(frozen=True)
class Disk:
    """What one node found. free: bytes; rate: written and fsynced, bytes per second. sees: rank 0's file. problem: why
    it could not write."""

    host: str
    free: int
    rate: float
    sees: bool
    problem: str = ""


def check(folder: Path, launch: Launch, checkpoint_bytes: int, keep: int) -> list[Finding]:
    """All ranks enter. folder: on the checkpoints' file system, made by rank 0."""
    host = socket.gethostname()
    wanted, problem = f"{host} {os.getpid()}\n", ""
    try:
        if launch.is_first:
            write_text(folder / TOKEN, wanted)
    except OSError as error:  # all ranks must hear of it: they wait for the file's words
        problem = error.strerror or str(error)
    wanted, broken = collectives.from_rank_0((wanted, problem and Disk(host, 0, 0.0, True, problem)))
    if broken:
        return judge([broken], checkpoint_bytes, keep, folder.parent)
    found = of_this_node(folder, wanted) if launch.is_first_on_node else None
    return judge(list(filter(None, collectives.gather_objects(found))), checkpoint_bytes, keep, folder.parent)


def of_this_node(folder: Path, wanted: str) -> Disk:
    """Looks for rank 0's file, and writes one of its own that it removes."""
    host, deadline = socket.gethostname(), time.monotonic() + SEEN_SECONDS
    while not (sees := _reads(folder / TOKEN, wanted)) and time.monotonic() < deadline:
        time.sleep(0.2)
    if not sees:
        return Disk(host, 0, 0.0, False)
    probe = folder / f"speed-{host}-{os.getpid()}"
    file, block, started = HashingFile(probe), bytes(1 << 20), time.perf_counter()
    for _ in range(PROBE // len(block)):
        file.write(block)
    file.close()
    seconds = time.perf_counter() - started
    probe.unlink(missing_ok=True)
    problem = file.error.strerror if file.error is not None else ""
    return Disk(host, shutil.disk_usage(folder).free, PROBE / seconds, True, problem)


def judge(disks: Sequence[Disk], checkpoint_bytes: int, keep: int, folder: Path) -> list[Finding]:
    """A checkpoint must fit; while one is written, `keep` others are there."""
    blind = [disk.host for disk in disks if not disk.sees]
    if blind:
        text = f"{', '.join(blind[:4])} does not see what rank 0 wrote into {folder}"
        remedy = "output_dir must be on a file system that all nodes share, mounted at the same path"
        return [Finding(DISK, FAIL, text, remedy)]
    if broken := [disk for disk in disks if disk.problem]:
        text = f"{broken[0].host} cannot write into {folder}: {broken[0].problem}"
        return [Finding(DISK, FAIL, text, "make room there, or choose another output_dir")]
    least, rate = min(disk.free for disk in disks), sum(disk.rate for disk in disks)
    seconds, whole = checkpoint_bytes / rate, (keep + 1) * checkpoint_bytes
    slowest = min(disks, key=lambda disk: disk.rate)
    figures = {
        "free_bytes": least,
        "checkpoint_bytes": checkpoint_bytes,
        "needed_bytes": whole,
        "write_bytes_per_second": {disk.host: disk.rate for disk in disks},
    }
    text = f"{_gb(least)} free in {folder}; a checkpoint takes {_gb(checkpoint_bytes)}"
    speed = f"written at {_gb(slowest.rate)}/s a node ({slowest.host}), {seconds:.0f} s each"
    if least < checkpoint_bytes:
        remedy = "make room, or choose another output_dir: no checkpoint could be saved"
        return [Finding(DISK, FAIL, text, remedy, figures)]
    if least < whole:
        need = f"{text}, {keep + 1} of them are there at a time ({_gb(whole)})"
        return [Finding(DISK, FAIL, need, "make room, or lower checkpoint.keep", figures)]
    if seconds > SLOW_SECONDS:
        remedy = "use a faster file system, or save less often (checkpoint.every)"
        return [Finding(DISK, WARN, f"{text}, {speed}", remedy, figures)]
    nodes = f"seen alike by {len(disks)} node{'s' * (len(disks) > 1)}"
    return [Finding(DISK, PASS, f"{text}, {speed}; {nodes}", figures=figures)]


def _reads(path: Path, wanted: str) -> bool:
    try:
        return path.read_text() == wanted
    except OSError:
        return False


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
