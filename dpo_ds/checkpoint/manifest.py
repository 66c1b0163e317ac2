"""Makes a folder a complete checkpoint by MANIFEST.json, written last, with the size and SHA-256 of every file."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from dpo_ds import __version__
from dpo_ds.cluster import shared_files
from dpo_ds.cluster.records import Count, Damaged, FileName, Record, Sha256, read_object, record_of

MANIFEST, LATEST = "MANIFEST.json", "latest"
FORMAT = 1  # of a checkpoint's files: DeepSpeed's ZeRO-3 shards, one pair a rank
STEP_FOLDER = re.compile(r"step-(\d+)")
HALF_DONE = re.compile(r"step-\d+(\.old)?\.tmp|latest\.[0-9a-f]{8}\.tmp")
SHARD_KINDS = ("model", "optim")
OWN_DIGEST = "manifest_sha256"  # of the manifest without this key, as JSON with sorted keys
PACKAGES = ("torch", "deepspeed", "transformers", "datasets")


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
        return [name for name, written in files if shared_files.sha256(self.path / name) != written["sha256"]]


class FileRecord(Record):
    """Says what a file on disk must be."""

    size: Count
    sha256: Sha256


class CheckpointRecord(Record):
    """Describes a complete checkpoint: MANIFEST.json without its own digest."""

    step: int = Field(ge=1, lt=1 << 62, strict=True)
    world_size: int = Field(ge=1, le=1 << 20, strict=True)
    config: dict[str, Any]
    versions: dict[str, str]
    identity: dict[str, str]
    files: dict[FileName, FileRecord]

    @model_validator(mode="after")
    def _every_rank_has_its_shards(self):
        missing = [
            f"rank {rank}'s {kind} shard"
            for rank in range(self.world_size)
            for kind in SHARD_KINDS
            if sum(name.endswith(shard_suffix(kind, rank)) for name in self.files) != 1
        ]
        if missing:
            raise ValueError(f"it names no {missing[0]}")
        return self


def shard_suffix(kind: str, rank: int, part: str = "") -> str:
    """Returns how the name of a rank's shard ends: as DeepSpeed calls it (bf16 runs put a word in front), and which
    model beside the policy it is of.
    """
    return in_part(f"zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt", part)


def in_part(name: str, part: str) -> str:
    """Returns the name of a file of another engine than the first; `part` is "" for that one."""
    return f"{name}.{part}" if part else name


def step_folders(folder: Path) -> list[Path]:
    """Returns the folders that hold, or should hold, a checkpoint, in the order of their steps; no copy that a user has
    laid beside them counts.
    """
    found = [(match, path) for path in folder.glob("step-*") if (match := STEP_FOLDER.fullmatch(path.name))]
    return [path for match, path in sorted(found, key=lambda item: int(item[0][1]))]


def step_folder(step: int) -> str:
    return f"step-{step:08d}"


def open_folder(path: Path) -> tuple[Checkpoint | None, str]:
    """The checkpoint, or why it is none: no whole manifest of a known format, a file missing or of another size."""
    try:
        values = read_object(path / MANIFEST)
        if values.pop(OWN_DIGEST, None) != _digest(values):
            return None, f"{MANIFEST} is damaged"
        if values.get("format") != FORMAT:
            by = values.get("versions")
            version = by.get("dpo_ds") if isinstance(by, dict) else None
            return None, f"its layout {values.get('format')} (dpo_ds {version}) is not known here, only {FORMAT} is"
        record_of(values, CheckpointRecord)
    except FileNotFoundError:
        return None, f"no {MANIFEST}, so it is no complete checkpoint"
    except Damaged as problem:
        return None, f"{MANIFEST} is damaged: {problem}"
    problem = first_wrong_size(path, values["files"])
    return (Checkpoint(path, values), "") if problem is None else (None, problem)


def write(folder: Path, record: dict) -> None:
    """Makes the folder a complete checkpoint; `record` has step, world_size, config, versions, identity and files."""
    manifest = json.loads(json.dumps({"format": FORMAT, **record}))  # as it will be read
    shared_files.write_text(folder / MANIFEST, json.dumps(manifest | {OWN_DIGEST: _digest(manifest)}, indent=1) + "\n")


def first_wrong_size(folder: Path, files: dict) -> str | None:
    for name, written in files.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != written["size"]:
            return f"{name} has {file.stat().st_size} bytes, {MANIFEST} says {written['size']}"
    return None


def clear(folder: Path) -> None:
    """Removes what saves and deletions left behind that died halfway, as far as the file system lets it."""
    for left in folder.glob("*.tmp"):
        if HALF_DONE.fullmatch(left.name):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink()


def versions() -> dict[str, str]:
    """Returns dpo_ds' version, also where it is not installed but a checkout, and those of what decides its numbers."""
    return {"dpo_ds": __version__} | {package: version(package) for package in PACKAGES}


def _digest(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
