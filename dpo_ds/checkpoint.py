"""Sharded checkpoints that are complete or not there at all.

Every rank writes its shard into `step-N.tmp/`; when all have, rank 0 writes MANIFEST.json, renames the folder to `step-N/` and
points `latest` at it. A run that dies in between leaves the previous checkpoint as the newest complete one.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from dpo_ds.config import Section, flatten, to_plain
from dpo_ds.errors import ConfigError

MANIFEST = "MANIFEST.json"
# Keys that may differ between a run and its resumption; all others decide what is computed.
MAY_CHANGE = ("train.learning_rate", "train.schedule", "train.warmup_steps", "train.max_steps", "train.epochs", "train.eval_every")
MAY_CHANGE_SECTIONS = ("checkpoint.", "deepspeed.", "output_dir")
MAY_CHANGE_KEYS = ("data.eval", "train.micro_batch_tokens", "train.layout", "train.activation_checkpointing", "model.attn")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    manifest: dict

    @property
    def step(self) -> int:
        return self.manifest["step"]


def find(output_dir: Path, resume: str) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to continue from, and a line on every incomplete one that was passed over. Reads files only.

    Args:
        resume: checkpoint.resume, i.e. auto, never or a folder.
    Raises:
        ConfigError: the named folder is no complete checkpoint.
    """
    if resume == "never":
        return None, []
    if resume != "auto":
        checkpoint, problem = _open(Path(resume))
        if checkpoint is None:
            raise ConfigError(f"--checkpoint.resume {resume}: {problem}; name a folder checkpoints/step-... or auto")
        return checkpoint, []
    notes = []
    for path in sorted((output_dir / "checkpoints").glob("step-????????"), reverse=True):
        checkpoint, problem = _open(path)
        if checkpoint is not None:
            return checkpoint, notes
        notes.append(f"{path}: {problem}; trying the one before")
    return None, notes


def check_compatible(checkpoint: Checkpoint, run: Section, ranks: int) -> list[str]:
    """Lines on settings that changed since the checkpoint.

    Raises:
        ConfigError: one changed that decides what is computed, or the number of ranks did.
    """
    if checkpoint.manifest["world_size"] != ranks:
        raise ConfigError(
            f"{checkpoint.path} was saved by {checkpoint.manifest['world_size']} ranks, this run has {ranks}; start it "
            "with the same number, or with another output_dir"
        )
    before, now = flatten(checkpoint.manifest["config"]), flatten(to_plain(run))
    notes = []
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) == now.get(key):
            continue
        change = f"{key} {before.get(key)!r} -> {now.get(key)!r}"
        if key not in MAY_CHANGE + MAY_CHANGE_KEYS and not key.startswith(MAY_CHANGE_SECTIONS):
            raise ConfigError(
                f"{change} cannot change on resume from {checkpoint.path}; "
                "use another output_dir, or --checkpoint.resume never to start over"
            )
        if not key.startswith(("checkpoint.resume", "output_dir")):
            notes.append(f"changed on resume: {change}")
    return notes


class CheckpointWriter:
    """Commits checkpoints of one run; all ranks enter every method."""

    def __init__(self, output_dir: Path, run: Section, versions: dict):
        self.folder = output_dir / "checkpoints"
        self.keep = run.checkpoint.keep
        self.record = {"config": to_plain(run), "versions": versions, "world_size": dist.get_world_size()}

    def save(self, engine, step: int) -> None:
        """A complete `step-N/`, or an exception and the previous ones untouched."""
        final = self.folder / f"step-{step:08d}"
        temporary = final.with_suffix(".tmp")
        is_first = dist.get_rank() == 0
        if is_first:
            shutil.rmtree(temporary, ignore_errors=True)  # a save that died halfway
            self.folder.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        engine.save_checkpoint(str(self.folder), tag=temporary.name, client_state={"step": step}, save_latest=False)
        dist.barrier()
        if is_first:
            self._commit(temporary, final, step)
        dist.barrier()

    def _commit(self, temporary: Path, final: Path, step: int) -> None:
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        shards = [path for path in files if path.name.endswith("_optim_states.pt")]
        assert len(shards) == self.record["world_size"], f"{len(shards)} optimizer shards in {temporary}"
        for path in files:
            _fsync(path)
        sizes = {str(path.relative_to(temporary)): path.stat().st_size for path in files}
        _write_durably(temporary / MANIFEST, json.dumps({"step": step, "files": sizes, **self.record}, indent=1))
        if final.exists():
            shutil.rmtree(final)  # an incomplete one of this step, or find() had resumed from it
        os.replace(temporary, final)
        _write_durably(self.folder / "latest.tmp", final.name + "\n")
        os.replace(self.folder / "latest.tmp", self.folder / "latest")
        _fsync(self.folder)
        for old in sorted(self.folder.glob("step-????????"))[: -self.keep]:
            shutil.rmtree(old)


def load(engine, checkpoint: Checkpoint) -> None:
    """Weights and optimizer state into a fresh engine of the same number of ranks. All ranks enter."""
    path, _ = engine.load_checkpoint(str(checkpoint.path.parent), tag=checkpoint.path.name)
    if path is None:
        raise ConfigError(f"{checkpoint.path} cannot be loaded by DeepSpeed")


def _open(path: Path) -> tuple[Checkpoint | None, str]:
    """The checkpoint, or why it is none."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None, f"no {MANIFEST}, so it is no complete checkpoint"
    except (UnicodeDecodeError, json.JSONDecodeError):
        return None, f"{MANIFEST} is damaged"
    for name, size in manifest["files"].items():
        file = path / name
        if not file.is_file():
            return None, f"{name} is missing"
        if file.stat().st_size != size:
            return None, f"{name} has {file.stat().st_size} bytes, {MANIFEST} says {size}"
    return Checkpoint(path, manifest), ""


def _write_durably(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
