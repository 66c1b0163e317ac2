"""Writes and reads what a run's folder promises: STATUS.json, pids, config.yaml and metrics.jsonl."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Literal

import yaml

from dpo_ds.checkpoint.manifest import open_folder, step_folders
from dpo_ds.cluster import collectives, rendezvous
from dpo_ds.cluster.launch import Launch
from dpo_ds.cluster.process_group import speaker
from dpo_ds.cluster.records import Count, Damaged, Record, read_record
from dpo_ds.cluster.shared_files import FolderLock, make_writable, refuse_foreign, write_text, write_whole
from dpo_ds.cluster.signals import EXIT_INTERRUPTED, EXIT_STOPPED, Stopped
from dpo_ds.cluster.stopping import StopFlag
from dpo_ds.cluster.watchdog import PeerWatch, Silent
from dpo_ds.config import RECORDED, Section, to_plain
from dpo_ds.errors import UserError

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
PIDS = "pids"  # folder in output_dir: a file HOST-RANK for every running rank, for scripts that signal them


def write_status(output_dir: Path, state: str, reason: str = "", step: int = 0, exit_code: int | None = None) -> None:
    """STATUS.json, replaced in one move: scripts read it where a launcher swallows exit codes."""
    status = {"state": state, "reason": reason, "step": step, "exit_code": exit_code}
    try:
        write_text(output_dir / "STATUS.json", json.dumps(status) + "\n")
    except OSError as error:  # the exit code must still say how the run ended
        print(f"dpo-ds: STATUS.json could not be written ({error.strerror}): {status}", file=sys.stderr, flush=True)


def read_metrics(path: Path) -> list[dict]:
    """Returns the lines of a metrics.jsonl that are ours: objects with a step. None where there is no such file.

    A process may have died while writing a line, and others may have written into the file: such lines do not count.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last line end was not written whole
    except OSError:
        return []
    return [line for line in map(_metrics_of, lines) if line is not None]


def _metrics_of(line: bytes) -> dict | None:
    try:
        metrics = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return metrics if isinstance(metrics, dict) and type(metrics.get("step")) is int else None


def keep_metrics_until(path: Path, step: int) -> None:
    """Cuts what was logged beyond `step`, a half-written last line included."""
    write_whole(path, b"".join(as_line(line) for line in read_metrics(path) if step and line["step"] <= step))


def as_line(values: dict) -> bytes:
    """Returns an object as a line of JSON, its text as people read it."""
    return (json.dumps(values, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


class StatusRecord(Record):
    """Describes STATUS.json, by which a folder is known as a run's."""

    state: Literal["running", "done", "stopped", "failed"]
    reason: str
    step: Count
    exit_code: int | None


def is_a_runs(folder: Path) -> bool:
    """Tells whether a run of ours has begun in this folder: it has left its STATUS.json, or a checkpoint."""
    try:
        read_record(folder / "STATUS.json", StatusRecord)
    except (FileNotFoundError, Damaged):
        return any(open_folder(path)[0] is not None for path in step_folders(folder / "checkpoints"))
    return True


@contextlib.contextmanager
def keeping_status(output_dir: Path, launch: Launch) -> Iterator[FolderLock]:
    """Holds the folder, which must be new, empty or a run's, and keeps STATUS.json from running to done or failed.

    Gives the lock, to be shared once all ranks are in the process group.

    Raises:
        ConfigError: another job is at work there, or it holds what no run of ours made.
    """
    if launch.is_first:
        refuse_foreign(output_dir, "output_dir", is_a_runs)
    make_writable(output_dir, "output_dir")
    with contextlib.closing(FolderLock(output_dir, launch.rank, "output_dir")) as lock:
        if launch.is_first:
            lock.take(speaker(launch))
        rendezvous.peers().on_end = partial(_failed, output_dir, launch)
        if not launch.is_first:
            yield lock
            return
        with _keeping_status(output_dir):
            yield lock


@contextlib.contextmanager
def _keeping_status(output_dir: Path) -> Iterator[None]:
    write_status(output_dir, "running")
    try:
        yield
    except Stopped as stopped:
        write_status(output_dir, "stopped", str(stopped), stopped.step, EXIT_STOPPED)
        if stopped.step:
            stopped.remedy = f"the same command goes on from {output_dir / 'checkpoints'}"
        raise
    except UserError as mistake:
        write_status(output_dir, "failed", str(mistake), last_step(output_dir), exit_code=2)
        raise
    except BaseException as fault:
        write_status(output_dir, "failed", f"{type(fault).__name__}: {fault}", last_step(output_dir), exit_code=1)
        raise
    reason = ""
    with contextlib.suppress(FileNotFoundError, Damaged):
        reason = read_record(output_dir / "STATUS.json", StatusRecord).reason  # of an end before the last step
    write_status(output_dir, "done", reason, last_step(output_dir), exit_code=0)


@contextlib.contextmanager
def watched(output_dir: Path, launch: Launch, stop: StopFlag) -> Iterator[PeerWatch | Silent]:
    """Lets signals set `stop` from here on, instead of ending the command; gives the watch over the other ranks.

    Meanwhile pids/ has a file for every rank. All ranks enter.
    """
    if launch.is_first:
        (output_dir / PIDS).mkdir(exist_ok=True)
        for left in (output_dir / PIDS).iterdir():
            if re.fullmatch(r".+-\d+", left.name) and left.is_file():  # HOST-RANK of a job that was killed
                left.unlink()
    collectives.barrier()
    pid = output_dir / PIDS / f"{socket.gethostname()}-{launch.rank}"
    pid.write_text(f"{os.getpid()}\n", encoding="utf-8")
    twice = "interrupted twice, without a checkpoint of the last steps"
    with stop.taking_signals(lambda: _failed(output_dir, launch, twice, EXIT_INTERRUPTED)):
        try:
            yield rendezvous.peers()
        finally:
            pid.unlink(missing_ok=True)


def _failed(output_dir: Path, launch: Launch, reason: str, code: int) -> None:
    """The watch over the ranks ends this process."""
    if launch.is_first or (launch.rank == 1 and reason.startswith("rank 0 ")):  # then nobody else can write it
        write_status(output_dir, "failed", reason, last_step(output_dir), exit_code=code)


def set_aside(output_dir: Path) -> None:
    """checkpoint.resume never in a folder that holds a run: what is there moves into a folder of its own."""
    names = ("checkpoints", METRICS, SAMPLES, "samples", "config.yaml", "tensorboard", "trackers", "profile", "final")
    there = [output_dir / name for name in names if (output_dir / name).exists()]
    if there:
        aside = output_dir / f"before-{datetime.now():%Y%m%d-%H%M%S}"
        aside.mkdir()
        for path in there:
            shutil.move(path, aside / path.name)
        print(f"dpo-ds: starting over; the run that was in {output_dir} is now in {aside}", flush=True)


def write_config(output_dir: Path, run: Section, used: dict, launch: Launch) -> None:
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    except FileNotFoundError:
        commit = None  # no git on this machine
    environment = {"versions": used, "git_commit": commit, "ranks": launch.world_size, "threads": launch.threads}
    text = yaml.safe_dump(to_plain(run) | {RECORDED: environment}, sort_keys=False)
    (output_dir / "config.yaml").write_text(text, encoding="utf-8")


def last_step(output_dir: Path) -> int:
    """The last step that metrics.jsonl holds."""
    lines = read_metrics(output_dir / METRICS)
    return lines[-1]["step"] if lines else 0


def last_metrics_of(output_dir: Path, names: Sequence[str], step: int | None = None) -> dict:
    """Returns what metrics.jsonl says of `step`, the last one if not given, and its evaluation: the run may have had no
    step left to take.
    """
    lines = read_metrics(output_dir / METRICS)
    lines = lines[-2:] if step is None else [line for line in lines if line["step"] == step]
    return {name: line[name] for line in lines for name in line if name.removeprefix("eval_") in names}
