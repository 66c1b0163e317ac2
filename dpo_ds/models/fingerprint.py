"""One digest of a model's weights, from their bytes on disk: equal for equal tensors, however split over files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from transformers.utils import cached_file

from dpo_ds.cluster.derived import content_digest, remembered
from dpo_ds.config import ModelSection
from dpo_ds.errors import ModelError
from dpo_ds.models.adapters import folder_of

SAMPLE = 1 << 20  # bytes read at the start and at the end of a weights file
MODEL = "the model in model.path"
WEIGHTS = ("*.safetensors", "*.bin")
SINGLE = ("model.safetensors", "pytorch_model.bin")
INDEX_SUFFIX = ".index.json"
READ_BYTES = 1 << 24


class Tensor(NamedTuple):
    """Places one tensor's bytes in a safetensors file."""

    file: Path
    name: str
    kind: str  # type and shape, as the file's header says
    start: int
    stop: int


def weights_digest(section: ModelSection, path: str) -> str:
    """SHA-256 over every tensor's name, type, shape and bytes, in the order of names; pickled files count as they are.

    Raises:
        ModelError: no weights there, or a safetensors file that is damaged.
    """
    files = weight_files(section, path)
    return remembered(files, "tensors", lambda: _digest_of_tensors(files))


def _digest_of_tensors(files: list[Path]) -> str:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing lets go of the interpreter lock
        if files[0].suffix == ".bin":
            hashes = [f"{file.name} {digest}" for file, digest in zip(files, pool.map(file_digest, files), strict=True)]
        else:
            tensors = sorted((t for file in files for t in _tensors(file)), key=lambda tensor: tensor.name)
            digests = pool.map(lambda tensor: file_digest(tensor.file, tensor.start, tensor.stop), tensors)
            hashes = [f"{t.name} {t.kind} {digest}" for t, digest in zip(tensors, digests, strict=True)]
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def weight_files(section: ModelSection, path: str) -> list[Path]:
    """The files that transformers would load, of a folder or out of the Hub's cache."""

    def find(name: str) -> Path | None:
        found = cached_file(
            folder_of(path), name, revision=section.revision, _raise_exceptions_for_missing_entries=False
        )
        return None if found is None else Path(found)

    for name in SINGLE:
        if (single := find(name)) is not None:
            return [single]
        if (index := find(name + INDEX_SUFFIX)) is not None:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            files = [find(name) for name in names]
            if None in files:
                raise ModelError(f"{path}: {index.name} names {names[files.index(None)]}, which is not there")
            return files
    raise ModelError(f"{path}: no weights ({SINGLE[0]} or its index)")


def file_digest(path: Path, start: int = 0, stop: int | None = None) -> str:
    """SHA-256 of a file, or of its bytes from `start` to `stop`."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(start)
        left = (path.stat().st_size if stop is None else stop) - start
        while left and (chunk := file.read(min(READ_BYTES, left))):
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()


def _tensors(file: Path) -> Iterator[Tensor]:
    """safetensors: 8 bytes with the header's length, the header as JSON, the tensors' bytes."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        try:
            header = json.loads(stream.read(length)) if length <= size else None
        except (UnicodeDecodeError, json.JSONDecodeError):
            header = None
    if header is None:
        raise ModelError(f"{file}: not a safetensors file (its header cannot be read)")
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, stop = (8 + length + offset for offset in entry["data_offsets"])
        if stop > size:
            raise ModelError(f"{file}: cut off at {size} bytes, tensor {name} ends at {stop}")
        yield Tensor(file, name, f"{entry['dtype']} {entry['shape']}", start, stop)


def file_digests(path: str) -> dict[str, str]:
    """Returns the SHA-256 of each file of a model's folder that decides what it computes, by name; none of a Hub id."""
    patterns = ("config.json", "adapter_config.json", *WEIGHTS)
    files = sorted({file for pattern in patterns for file in Path(folder_of(path)).glob(pattern)})
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip([file.name for file in files], pool.map(content_digest, files), strict=True))


def model_digest(path: str, config) -> str:
    """Identifies a folder by every byte of its config and weights, a Hub id by its commit."""
    if not Path(path).is_dir():
        return f"{path}@{getattr(config, '_commit_hash', None)}"
    lines = [f"{name} {digest}" for name, digest in file_digests(path).items()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def model_as_recorded(recorded: str | None, path: str, config) -> str:
    """Returns `model_digest`, or `model_id` where a checkpoint that is older than the former has recorded it."""
    return model_id(path, config) if recorded is not None and len(recorded) == 16 else model_digest(path, config)


def model_id(path: str, config) -> str:
    """Identifies a folder as checkpoints did before every byte counted: by its config and every weights file's name,
    size, first and last MiB.
    """
    folder = Path(folder_of(path))
    if not folder.is_dir():
        return f"{path}@{getattr(config, '_commit_hash', None)}"
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(file for pattern in WEIGHTS for file in folder.glob(pattern)):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(SAMPLE))
            stream.seek(max(0, size - SAMPLE))
            digest.update(stream.read(SAMPLE))
    return digest.hexdigest()[:16]
