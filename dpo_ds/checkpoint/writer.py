"""Sharded checkpoints that are complete or not there at all.

Every rank writes its shards into `step-N.tmp/`, hashing and fsyncing as it goes, in a thread, from a copy, while
training goes on. Once all have, rank 0 writes MANIFEST.json, renames the folder to `step-N/` and points `latest` at it.
A run that dies in between leaves the previous checkpoint as the newest complete one. Loading is in shards.py.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from concurrent import futures
from dataclasses import asdict
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import Any, NoReturn

import torch

from dpo_ds.checkpoint import faultpoints, manifest
from dpo_ds.checkpoint.disk import HashingFile, Written
from dpo_ds.checkpoint.host_copy import Content, HostCopy, capture, free_memory
from dpo_ds.checkpoint.manifest import LATEST, MANIFEST, in_part, step_folder, step_folders
from dpo_ds.cluster import collectives, launch, shared_files
from dpo_ds.cluster.shared_files import in_background
from dpo_ds.cluster.signals import Stopped
from dpo_ds.config import Section, to_plain
from dpo_ds.errors import TrainingError

NO_OTHERS: Mapping[str, Any] = MappingProxyType({})
LOOK_SECONDS = 1.0  # between two looks at a save that all ranks wait for


class CheckpointWriter:
    """Commits checkpoints of one run; all ranks enter `save`, `commit_if_written` and `finish`, each at the same step.

    committing: held while rank 0 makes one visible. progress(step): told while this rank waits for its disk.
    newest: the step of the newest complete one, at first of the one resumed from; 0 if there is none.
    best: the step of the one that stays however many come after it; 0 if there is none.
    """

    def __init__(
        self, output_dir: Path, run: Section, identity: dict[str, str], resumed_step: int, committing: Lock,
        say: Callable[[str], None], progress: Callable[[int], None],
    ):  # fmt: skip
        self.folder = output_dir / "checkpoints"
        self.keep = run.checkpoint.keep
        self.newest, self.best = resumed_step, 0
        self._copy = HostCopy() if run.checkpoint.asynchronous else None
        self._writing: _Writing | None = None
        self._pruning: futures.Future | None = None
        self._committing, self._say, self._progress = committing, say, progress
        self._record = {"config": to_plain(run), "versions": manifest.versions(), "identity": identity}

    def save(
        self, engine, step: int, extra: dict | None = None, *, wait: bool = False, is_best: bool = False,
        beside: Mapping[str, Any] = NO_OTHERS,
    ) -> None:  # fmt: skip
        """Begins a complete `step-N/` and, with `wait` or without a copy, ends it; the save before is ended first.

        `newest` tells whether it came through. Where the disk is full or broken, there is a line, and the previous ones
        are untouched.

        Args:
            extra: what this rank wants back beside the engine's state (elastic.load): plain values and tensors.
            is_best: it stays, in the place of the best one before, once it is complete.
            beside: other engines that are trained, by the name that their files get.
        """
        from dpo_ds.checkpoint.shards import random_state

        self.finish()
        temporary = (self.folder / step_folder(step)).with_suffix(".tmp")
        needed = sum(map(state_bytes, (engine, *beside.values()))) + collectives.world_size() * _tensor_bytes(extra)
        problem = self._prepare(temporary, needed) if collectives.rank() == 0 else None
        if _first(problem):
            self._failed(step, problem)
            return
        if self._copy is not None and self._copy.bytes == 0 and not wait:
            self._make_room(needed)
        copy = None if wait else self._copy
        faultpoints.reach("save-begun")
        state = {"step": step, "random_state": random_state()}
        files = capture(engine, temporary, state | {"extra": extra or {}}, copy)
        for part, other in beside.items():
            files |= {in_part(name, part): written for name, written in capture(other, temporary, state, copy).items()}
        self._writing = _Writing(step, temporary, files, engine.device, is_best)
        if copy is None:
            self.finish()

    def save_and_stop(
        self, engine, step: int, extra: dict, reason: str, *, beside: Mapping[str, Any] = NO_OTHERS
    ) -> NoReturn:
        """Ends the run between two steps, with all that was done until `step` in a checkpoint; step 0 needs none.

        Raises:
            Stopped: always, unless that could not be saved: TrainingError.
        """
        self.finish()
        if self.newest < step:
            self.save(engine, step, extra, wait=True, beside=beside)
        if self.newest < step:
            raise TrainingError(f"{reason}, and the checkpoint of step {step} could not be saved")
        raise Stopped(reason, step)

    def commit_if_written(self) -> None:
        """Commits the save under way if all ranks have written their shards; to be called between two steps."""
        if self._writing is not None and not self._try_to_commit():
            faultpoints.reach("still-writing")

    def finish(self) -> None:
        """Waits for the save under way, if there is one, and commits it."""
        while self._writing is not None:
            self._writing.wait(LOOK_SECONDS)
            if self._writing.has_moved():
                self._progress(self._writing.step)
            self._try_to_commit()
        if self._pruning is not None:
            if problem := self._pruning.result():
                self._say(f"an old checkpoint could not be deleted: {problem}; the newer ones are complete")
            self._pruning = None

    def _make_room(self, needed: int) -> None:
        """Gives up the copy, on all ranks, where one of their hosts may lack the memory: half of what is free stays."""
        share, here = needed // collectives.world_size(), launch.from_environment().local_world_size
        if min(collectives.gather_objects(free_memory() // here // 2)) < share:
            self._copy = None
        if collectives.rank() == 0 and self._copy is None:
            self._say(
                f"checkpoint.asynchronous: a copy of {share} bytes a rank is more than half of the memory that is "
                "free; training stands still while checkpoints are written"
            )
        elif collectives.rank() == 0:
            self._say(f"checkpoint.asynchronous: {share} bytes of memory a rank hold the copy that is written")

    def _prepare(self, temporary: Path, needed: int) -> str | None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            manifest.clear(self.folder)
            free = shutil.disk_usage(self.folder).free
            if free < needed:
                return f"it needs {needed} bytes, {free} are free in {self.folder}"
            temporary.mkdir()
        except OSError as error:
            return _of_disk(error)
        return None

    def _try_to_commit(self) -> bool:
        writing = self._writing
        if collectives.reduce_max(not writing.is_done, writing.device):
            return False
        self._writing = None
        outcomes = collectives.gather_objects(writing.outcome())
        if self._copy is not None:
            self._copy.clear()
        faultpoints.reach("shards-written")
        problem = None
        if collectives.rank() == 0:
            with self._committing:
                problem = self._commit(outcomes, writing)
        if _first(problem):
            self._failed(writing.step, problem)
        else:
            self.newest, self.best = writing.step, writing.step if writing.is_best else self.best
        return True

    def _commit(self, outcomes: list, writing: _Writing) -> str | None:
        """Makes the checkpoint visible; or says why not."""
        temporary, step = writing.folder, writing.step
        files = {name: asdict(written) for written_by_rank, _ in outcomes for name, written in written_by_rank.items()}
        problem = next((problem for _, problem in outcomes if problem), None)
        try:
            if problem is None:
                problem = manifest.first_wrong_size(temporary, files)
            if problem is None:
                record = {"step": step, "world_size": len(outcomes), **self._record, "files": files}
                manifest.write(temporary, record)
        except OSError as error:
            problem = _of_disk(error)
        if problem is not None:
            needed = sum(written["size"] for written in files.values())
            shutil.rmtree(temporary, ignore_errors=True)
            free = shutil.disk_usage(self.folder).free
            return f"{problem}; it needs {needed} bytes, {free} are free in {self.folder}"
        try:
            self._make_visible(temporary, step)
        except OSError as error:
            return _of_disk(error)
        best = step if writing.is_best else self.best
        self._pruning = in_background(lambda: self._prune(best))
        return None

    def _make_visible(self, temporary: Path, step: int) -> None:
        faultpoints.reach("manifest-written")
        final = self.folder / step_folder(step)
        if final.exists():
            _remove(final)  # of this step, older than the resumption that led here again
        os.replace(temporary, final)
        shared_files.sync_folder(self.folder)
        faultpoints.reach("renamed")
        shared_files.write_text(self.folder / LATEST, final.name + "\n")
        faultpoints.reach("pointer-replaced")

    def _prune(self, best: int) -> str | None:
        """Says what went wrong."""
        complete = [path for path in step_folders(self.folder) if (path / MANIFEST).is_file()]
        try:
            for old in complete[: -self.keep]:
                if old.name != step_folder(best):
                    _remove(old)
        except OSError as error:
            return _of_disk(error)
        return None

    @property
    def best_or_coming(self) -> int:
        """The step of the best one, as soon as it is being written."""
        return self._writing.step if self._writing and self._writing.is_best else self.best

    def _failed(self, step: int, problem: str | None) -> None:
        if problem is not None:
            stays = f"that of step {self.newest} stays" if self.newest else "there is none yet"
            self._say(f"checkpoint of step {step} NOT saved: {problem}; {stays}")


class _Writing:
    """A save under way: a thread writes this rank's files."""

    def __init__(self, step: int, folder: Path, files: dict[str, Content], device, is_best: bool):
        self.step, self.folder, self.device, self.is_best = step, folder, device, is_best
        self._open: list[HashingFile] = []
        self._moved = 0
        self._future = in_background(lambda: self._write(files))

    @property
    def is_done(self) -> bool:
        return self._future.done()

    def wait(self, seconds: float) -> None:
        futures.wait([self._future], seconds)

    def has_moved(self) -> bool:
        """Tells whether bytes were written since it was last asked."""
        before, self._moved = self._moved, sum(file.size for file in self._open)
        return self._moved != before

    def outcome(self) -> tuple[dict[str, Written], str | None]:
        """Returns what was written, and what went wrong."""
        return self._future.result()

    def _write(self, files: dict[str, Content]) -> tuple[dict[str, Written], str | None]:
        written, problem = {}, None
        for name, write_into in files.items():
            file = HashingFile(self.folder / name)
            self._open.append(file)
            write_into(file)
            written[name] = file.close()
            if file.error is not None and problem is None:
                problem = f"rank {collectives.rank()}: {file.error.strerror}"
        return written, problem


def _remove(folder: Path) -> None:
    """Renamed, then deleted: a deletion that dies halfway leaves nothing that looks like a checkpoint."""
    doomed = folder.with_name(folder.name + ".old.tmp")
    os.replace(folder, doomed)
    faultpoints.reach("old-half-deleted")
    shutil.rmtree(doomed)


def _of_disk(error: OSError) -> str:
    return f"{error.strerror} ({error.filename})"


def state_bytes(engine) -> int:
    """Returns what all ranks write, but for some kilobytes each: the fp32 weights and Adam's two moments."""
    return 3 * sum(4 * parameter.ds_numel for parameter in engine.module.parameters() if parameter.requires_grad)


def _tensor_bytes(state) -> int:
    """Returns the bytes of all tensors in nested dicts."""
    if isinstance(state, dict):
        return sum(map(_tensor_bytes, state.values()))
    return state.nbytes if isinstance(state, torch.Tensor) else 0


def _first(problem: str | None) -> bool:
    """Tells every rank whether rank 0 has a problem; all ranks enter."""
    return collectives.from_rank_0(problem is not None)
