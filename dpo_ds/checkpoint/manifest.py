"""What makes a folder a complete checkpoint: MANIFEST.json, written last, with the size and SHA-256 of every file."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from dpo_ds.cluster import shared_files

MANIFEST, LATEST = "MANIFEST.json", "latest"
FORMAT = 1  # of a checkpoint's files: DeepSpeed's ZeRO-3 shards, one pair a rank
FOLDERS = "step-????????"
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


def open_folder(path: Path) -> tuple[Checkpoint | None, str]:
    """The checkpoint, or why it is none: no whole manifest of a known format, a file missing or of another size."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None, f"no {MANIFEST}, so it is no complete checkpoint"
    except ValueError:  # no UTF-8 or no JSON
        return None, f"{MANIFEST} is damaged"
    if not isinstance(manifest, dict) or manifest.pop(OWN_DIGEST, None) != _digest(manifest):
        return None, f"{MANIFEST} is damaged"
    if manifest["format"] != FORMAT:
        version = manifest["versions"]["dpo_ds"]
        return None, f"its layout {manifest['format']} (dpo_ds {version}) is not known here, only {FORMAT} is"
    problem = first_wrong_size(path, manifest["files"])
    return (Checkpoint(path, manifest), "") if problem is None else (None, problem)


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
        shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink()


def versions() -> dict[str, str]:
    """Of dpo_ds and of what decides its numbers."""
    return {"dpo_ds": version("dpo-ds")} | {package: version(package) for package in PACKAGES}


def _digest(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
