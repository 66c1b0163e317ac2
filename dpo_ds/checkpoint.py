"""Sharded checkpoints that are complete or not there at all.

Every rank writes its shards into `step-N.tmp/`, hashing and fsyncing as it goes; when all have, rank 0 writes
MANIFEST.json, renames the folder to `step-N/` and points `latest` at it. A run that dies in between leaves the previous
checkpoint as the newest complete one. Loading is in elastic.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from threading import Lock

import torch.distributed as dist

from dpo_ds import durable, faultpoints
from dpo_ds.config import Section, flatten, to_plain
from dpo_ds.errors import ConfigError

MANIFEST, LATEST = "MANIFEST.json", "latest"
FORMAT = 1  # of a checkpoint's files: DeepSpeed's ZeRO-3 shards, one pair a rank
FOLDERS = "step-????????"
PACKAGES = ("torch", "deepspeed", "transformers", "datasets")
START_OVER = "use another output_dir, or --checkpoint.resume never to start over"
# Keys that may differ between a run and its resumption; all others decide what is computed.
MAY_CHANGE = (
    "train.learning_rate", "train.schedule", "train.warmup_steps", "train.max_steps", "train.epochs",
    "train.eval_every", "data.eval", "train.micro_batch_tokens", "train.layout", "train.activation_checkpointing",
    "model.attn", "reference.cache",
)  # fmt: skip
MAY_CHANGE_SECTIONS = ("checkpoint.", "deepspeed.", "output_dir")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose files all have their size; `damage` also looks at every byte."""

    path: Path
    manifest: dict

    @property
    def step(self) -> int:
        return self.manifest["step"]

    @property
    def world_size(self) -> int:
        return self.manifest["world_size"]

    def damage(self, share: int = 0, shares: int = 1) -> list[str]:
        """The names of those files of this share whose SHA-256 is not the manifest's."""
        files = sorted(self.manifest["files"].items())[share::shares]
        return [name for name, written in files if durable.sha256(self.path / name) != written["sha256"]]


def find(output_dir: Path, resume: str) -> tuple[list[Checkpoint], list[str]]:
    """The checkpoints to continue from, best first, and a line on each one passed over; reads manifests and sizes only.

    Args:
        resume: checkpoint.resume, i.e. auto, never or a folder.
    Raises:
        ConfigError: the named folder is no complete checkpoint, or auto finds damaged ones only.
    """
    if resume == "never":
        return [], []
    if resume != "auto":
        checkpoint, problem = open_folder(Path(resume))
        if checkpoint is None:
            raise ConfigError(f"--checkpoint.resume {resume}: {problem}; name a folder checkpoints/step-... or auto")
        return [checkpoint], []
    complete, notes = [], []
    folder = output_dir / "checkpoints"
    for path in sorted(folder.glob(FOLDERS), reverse=True):
        checkpoint, problem = open_folder(path)
        if checkpoint is not None:
            complete.append(checkpoint)
        elif not complete:
            notes.append(f"{path}: {problem}; trying the one before")
    if notes and not complete:
        raise ConfigError(_none_left(folder, notes[0].removesuffix("; trying the one before")))
    if complete and (folder / LATEST).exists():
        named = (folder / LATEST).read_text(encoding="utf-8", errors="replace").strip()
        newest = complete[0].path.name
        if named != newest:
            notes.append(f"{folder / LATEST} names {named or 'nothing'}; taking {newest}, the newest complete one")
    return complete, notes


def choose(candidates: Sequence[Checkpoint]) -> tuple[Checkpoint | None, list[str]]:
    """The first candidate whose every byte is right, and a line on each damaged one. All ranks enter, each reads some.

    Raises:
        ConfigError: on every rank, all of them are damaged.
    """
    notes = []
    for candidate in candidates:
        shares: list = [None] * dist.get_world_size()
        dist.all_gather_object(shares, candidate.damage(dist.get_rank(), len(shares)))
        damaged = sorted(name for names in shares for name in names)
        if not damaged:
            return candidate, notes
        problem = f"{candidate.path}: {', '.join(damaged)} differs from what was written (SHA-256)"
        if candidate is candidates[-1]:
            raise ConfigError(_none_left(candidate.path.parent, problem))
        notes.append(f"{problem}; trying the one before")
    return None, notes


def check_config(checkpoint: Checkpoint, run: Section, ranks: int) -> list[str]:
    """Lines on what changed since the checkpoint and may.

    Raises:
        ConfigError: a setting changed that decides what is computed.
    """
    notes, now = [], versions()
    for package, used in checkpoint.manifest["versions"].items():
        if now.get(package) != used:
            notes.append(f"{checkpoint.path} was saved with {package} {used}, this is {now.get(package)}")
    if checkpoint.world_size != ranks:
        notes.append(
            f"{checkpoint.path} was saved by {checkpoint.world_size} ranks, this run has {ranks}: resharding, results "
            "agree within rounding"
        )
    before, now = flatten(checkpoint.manifest["config"]), flatten(to_plain(run))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) == now.get(key):
            continue
        change = f"{key} {before.get(key)!r} -> {now.get(key)!r}"
        if key not in MAY_CHANGE and not key.startswith(MAY_CHANGE_SECTIONS):
            raise ConfigError(f"{change} cannot change on resume from {checkpoint.path}; {START_OVER}")
        if not key.startswith(("checkpoint.resume", "output_dir")):
            notes.append(f"changed on resume: {change}")
    return notes


def check_identity(checkpoint: Checkpoint, identity: dict[str, str]) -> None:
    """Compares what the config's paths stand for, as identity.py names it.

    Raises:
        ConfigError: another model, other data or another precision.
    """
    for what, value in checkpoint.manifest["identity"].items():
        if identity.get(what) != value:
            raise ConfigError(f"{what} is now {identity.get(what)}, in {checkpoint.path} it was {value}; {START_OVER}")


def versions() -> dict[str, str]:
    """Of dpo_ds and of what decides its numbers."""
    return {"dpo_ds": version("dpo-ds")} | {package: version(package) for package in PACKAGES}


def set_aside_newer(output_dir: Path, resumed: Checkpoint) -> list[str]:
    """Renames the checkpoints in output_dir that come after `resumed`; all, if it lies elsewhere. Rank 0 only."""
    folder = output_dir / "checkpoints"
    _clear(folder)
    own = resumed.path.resolve().parent == folder.resolve()
    notes = []
    for path in sorted(folder.glob(FOLDERS)):
        if not own or int(path.name.removeprefix("step-")) > resumed.step:
            aside = path.with_name(f"{path.name}.aside")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            notes.append(f"{path} is now {aside.name}; delete it once you need it no more")
    if own:
        durable.write_text(folder / LATEST, resumed.path.name + "\n")
    return notes


class CheckpointWriter:
    """Commits checkpoints of one run; all ranks enter `save`. `committing` is held while rank 0 makes one visible.

    newest: the step of the newest one, at first of the one resumed from; 0 if there is none.
    """

    def __init__(
        self, output_dir: Path, run: Section, identity: dict[str, str], resumed_step: int, committing: Lock,
        say: Callable[[str], None],
    ):  # fmt: skip
        self.folder = output_dir / "checkpoints"
        self.keep = run.checkpoint.keep
        self.newest = resumed_step
        self._committing, self._say = committing, say
        self._record = {"config": to_plain(run), "versions": versions(), "identity": identity}

    def save(self, engine, step: int) -> bool:
        """A complete `step-N/`; where the disk is full or broken, a line, the previous ones untouched, and False."""
        final = self.folder / f"step-{step:08d}"
        temporary = final.with_suffix(".tmp")
        problem = self._prepare(temporary, _state_bytes(engine)) if dist.get_rank() == 0 else None
        if _first(problem):
            return self._failed(step, problem)
        faultpoints.reach("save-begun")
        outcomes = self._write(engine, temporary, step)
        faultpoints.reach("shards-written")
        problem = None
        if dist.get_rank() == 0:
            with self._committing:
                problem = self._commit(outcomes, temporary, final, step)
        if _first(problem):
            return self._failed(step, problem)
        self.newest = step
        return True

    def _prepare(self, temporary: Path, needed: int) -> str | None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _clear(self.folder)
            free = shutil.disk_usage(self.folder).free
            if free < needed:
                return f"it needs {needed} bytes, {free} are free in {self.folder}"
            temporary.mkdir()
        except OSError as error:
            return f"{error.strerror} ({error.filename})"
        return None

    def _write(self, engine, temporary: Path, step: int) -> list[tuple[dict, str | None]]:
        """Of every rank: what it wrote, and what went wrong."""
        from dpo_ds.elastic import random_state

        writer = durable.DurableWriter(engine.checkpoint_engine)
        engine.checkpoint_engine = writer
        engine._copy_recovery_script = lambda path: None  # it would raise on one rank alone where the disk is full
        engine.save_checkpoint(
            str(self.folder),
            tag=temporary.name,
            client_state={"step": step, "random_state": random_state()},
            save_latest=False,
            exclude_frozen_parameters=True,  # they are in the model's own files
        )
        engine.checkpoint_engine = writer._inner
        problem = None if writer.error is None else f"rank {dist.get_rank()}: {writer.error.strerror}"
        outcomes: list = [None] * dist.get_world_size()
        dist.all_gather_object(outcomes, ({name: asdict(written) for name, written in writer.files.items()}, problem))
        return outcomes

    def _commit(self, outcomes: list, temporary: Path, final: Path, step: int) -> str | None:
        """Makes the checkpoint visible; or says why not."""
        files = {name: written for written_by_rank, _ in outcomes for name, written in written_by_rank.items()}
        problem = next((problem for _, problem in outcomes if problem), None)
        try:
            if problem is None:
                problem = _first_wrong_size(temporary, files)
            if problem is None:
                record = {"format": FORMAT, "step": step, "world_size": len(outcomes), **self._record, "files": files}
                body = json.dumps(record, indent=1)
                durable.write_text(temporary / MANIFEST, f"{body}\n{_digest(body)}")
        except OSError as error:
            problem = f"{error.strerror} ({error.filename})"
        if problem is not None:
            needed = sum(written["size"] for written in files.values())
            shutil.rmtree(temporary, ignore_errors=True)
            free = shutil.disk_usage(self.folder).free
            return f"{problem}; it needs {needed} bytes, {free} are free in {self.folder}"
        faultpoints.reach("manifest-written")
        if final.exists():
            _remove(final)  # of this step, older than the resumption that led here again
        os.replace(temporary, final)
        durable.sync_folder(self.folder)
        faultpoints.reach("renamed")
        durable.write_text(self.folder / LATEST, final.name + "\n")
        faultpoints.reach("pointer-replaced")
        complete = [path for path in sorted(self.folder.glob(FOLDERS)) if (path / MANIFEST).is_file()]
        for old in complete[: -self.keep]:
            _remove(old)
        return None

    def _failed(self, step: int, problem: str | None) -> bool:
        if problem is not None:
            stays = f"that of step {self.newest} stays" if self.newest else "there is none yet"
            self._say(f"checkpoint of step {step} NOT saved: {problem}; {stays}, training goes on")
        return False


def open_folder(path: Path) -> tuple[Checkpoint | None, str]:
    """The checkpoint, or why it is none: no whole manifest of a known format, a file missing or of another size."""
    try:
        text = (path / MANIFEST).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None, f"no {MANIFEST}, so it is no complete checkpoint"
    except UnicodeDecodeError:
        return None, f"{MANIFEST} is damaged"
    body, _, digest = text.rpartition("\n")
    if digest != _digest(body):
        return None, f"{MANIFEST} is damaged"
    manifest = json.loads(body)
    if manifest["format"] != FORMAT:
        version = manifest["versions"]["dpo_ds"]
        return None, f"its layout {manifest['format']} (dpo_ds {version}) is not known here, only {FORMAT} is"
    problem = _first_wrong_size(path, manifest["files"])
    return (Checkpoint(path, manifest), "") if problem is None else (None, problem)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _first_wrong_size(folder: Path, files: dict) -> str | None:
    for name, written in files.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != written["size"]:
            return f"{name} has {file.stat().st_size} bytes, {MANIFEST} says {written['size']}"
    return None


def _none_left(folder: Path, problem: str) -> str:
    return f"{problem}, and no complete checkpoint is left in {folder}; --checkpoint.resume never starts over"


def _remove(folder: Path) -> None:
    """Renamed, then deleted: a deletion that dies halfway leaves nothing that looks like a checkpoint."""
    doomed = folder.with_name(folder.name + ".old.tmp")
    os.replace(folder, doomed)
    faultpoints.reach("old-half-deleted")
    shutil.rmtree(doomed)


def _clear(folder: Path) -> None:
    """Removes what saves and deletions left behind that died halfway."""
    for left in folder.glob("*.tmp"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def _state_bytes(engine) -> int:
    """What all ranks write, but for some kilobytes each: the fp32 weights and Adam's two moments."""
    return 3 * sum(4 * parameter.ds_numel for parameter in engine.module.parameters() if parameter.requires_grad)


def _first(problem: str | None) -> bool:
    """Whether rank 0 has a problem; all ranks enter."""
    box = [problem is not None]
    dist.broadcast_object_list(box, src=0)
    return box[0]
