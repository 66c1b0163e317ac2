"""Finds where rows are: a data file, a folder of them, a `datasets` folder or a data set of the Hub; and which split of
them is ours. How a file is read is in files.py.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import pyarrow as pa

from dpo_ds.cluster.derived import content_digest
from dpo_ds.data.files import KINDS, Rows, columns_read, converted_rows, file_rows, kind_of, rows_at_once
from dpo_ds.data.rows import Location
from dpo_ds.errors import DataError, first_line

# The words that tell our splits in names, best first. UNNAMED: files of a folder whose names tell no split.
UNNAMED = ""
SPLITS = {"train": ("train",), "eval": ("test", "validation", "valid", "val", "eval", "dev")}
SPLIT_WORDS = tuple(word for words in SPLITS.values() for word in words)
SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}([.-].*)?")  # as `datasets` names a split's files
NAMED = re.compile(rf"({'|'.join(SPLIT_WORDS)})[._-][a-z].*")
NUMBERS = re.compile(r"([._-]?\d+)+$")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


@dataclass(frozen=True)
class Files:
    """One data file, or the data files of a folder that belong to the split; `left_out` are the others."""

    paths: tuple[Path, ...]
    left_out: tuple[Path, ...] = ()

    @property
    def names(self) -> list[str]:
        return [str(path) for path in self.paths]

    def identity(self) -> list:
        """Returns what the cache knows the rows by: the files' resolved paths and the SHA-256 of their content."""
        return [[str(path.resolve()), _digest(path)] for path in self.paths]

    def rows(self, wanted: Collection[str] | None = None) -> Rows:
        """wanted: the fields that will be used; others may come as None. All if not given."""
        for path in self.paths:
            yield from file_rows(path, wanted)


@dataclass(frozen=True)
class HuggingFace:
    """One split of a `datasets` data set, memory-mapped by that library."""

    name: str
    data: Any = field(repr=False)
    files: tuple[Path, ...] = ()  # of a folder; none: data of the Hub, known by the library's fingerprint
    left_out: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        return [self.name]

    def identity(self) -> list:
        return [self.name, *(Files(self.files).identity() or [self.data._fingerprint])]

    def rows(self, wanted: Collection[str] | None = None) -> Rows:
        """As `Files.rows`."""
        names = self.data.column_names
        data, number = self.data.select_columns(columns_read(names, wanted)), 0

        def read(start: int, stop: int) -> list[dict]:
            columns = data[start:stop]
            return [{name: values[i] for name, values in columns.items()} for i in range(stop - start)]

        together = rows_at_once(data.data.nbytes, len(data.data))
        while number < len(data):
            for row in converted_rows(read, number, min(number + together, len(data)), names):
                number += 1
                yield Location(self.name, number), row


def open_source(path: str, split: str = "train") -> Files | HuggingFace:
    """Finds what `path` or `path:split` names; reads no rows.

    split, "train" or "eval", picks among several where `path` names none. DataError where there is nothing to read.
    """
    local, named = Path(path).expanduser(), None
    if not local.exists() and ":" in path and Path(path.rpartition(":")[0]).expanduser().exists():
        path, _, named = path.rpartition(":")
        local = Path(path).expanduser()
    if local.is_dir():
        if (local / "dataset_dict.json").exists() or (local / "state.json").exists():
            return _saved(local, split, named)
        return _folder(local, split, named)
    if local.exists():
        if not local.is_file():  # to open a FIFO may be to wait for ever
            raise DataError(f"{path}: neither a file nor a folder; write its rows into a file, they are read twice")
        if kind_of(local) is None:
            raise DataError(f"{path}: not a file that can be read as data; known: {', '.join(KINDS)}")
        if named is not None:
            raise DataError(f"{path}:{named}: {path} is one file, without splits; leave out :{named}")
        return Files((local,))
    if HUB_ID.fullmatch(path) and kind_of(local) is None and not local.parent.exists():
        return _hub(path, split)
    raise DataError(_missing(path, local))


def _folder(folder: Path, split: str, named: str | None) -> Files:
    """Returns all data files below `folder`; where names tell splits apart (train-00000-of-00002.parquet,
    test.jsonl, validation/a.jsonl), those of ours.

    Of what `dpo-ds sample` leaves, completions/ beside pairs/, the pairs.
    """
    if named is None and all((folder / name).is_dir() for name in ("completions", "pairs")):
        folder = folder / "pairs"
    found = sorted(p for p in folder.rglob("*") if p.is_file() and kind_of(p) and not _hidden(p.relative_to(folder)))
    if not found:
        raise DataError(f"{folder}: the folder holds no data file; known: {', '.join(KINDS)}")
    by_split: dict[str, list[Path]] = {}
    for path in found:
        by_split.setdefault(_split_of(path.relative_to(folder)), []).append(path)
    chosen = by_split[_pick(str(folder), list(by_split), split, named)]
    return Files(tuple(chosen), tuple(path for path in found if path not in chosen))


def _split_of(path: Path) -> str:
    """Returns the split that a file's name tells, else the nearest folder's.

    It is "train_prefs" of train_prefs-00000-of-00001.parquet and of train_prefs.jsonl, "train" of a-train-7.jsonl.
    """
    for part in (path.name[: -len(kind_of(path))], *reversed(path.parts[:-1])):
        if shard := SHARD.fullmatch(part):
            return shard[1]
        name = NUMBERS.sub("", part.lower())
        if NAMED.fullmatch(name):
            return name
        words = re.split(r"[^a-z]+", name)
        if word := next((word for word in SPLIT_WORDS if word in words), None):
            return word
    return UNNAMED


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _pick(where: str, there: list[str], split: str, named: str | None) -> str:
    """Returns the split to read: the one that is named, else ours by the words of SPLITS, or the only one."""
    has = ", ".join(name or "unnamed" for name in sorted(there))
    if named is not None:
        if named not in there:
            raise DataError(f"{where}:{named}: {where} has no split {named!r} but {has}")
        return named
    for word in SPLITS[split]:
        ours = [word] if word in there else [name for name in there if word in re.split(r"[^a-z]+", name.lower())]
        if len(ours) > 1:
            example = f"name one, as in {where}:{sorted(ours)[0]}"
            raise DataError(f"{where}: has several {split} splits, {', '.join(sorted(ours))}; {example}")
        if ours:
            return ours[0]
    if len(there) == 1 or (split == "train" and UNNAMED in there):
        return UNNAMED if UNNAMED in there else there[0]
    remedy = f"name one of its files, or a split as in {where}:{sorted(filter(None, there))[0]}"
    raise DataError(f"{where}: has no {' or '.join(SPLITS[split])} split but {has}; {remedy}")


def _saved(folder: Path, split: str, named: str | None) -> HuggingFace:
    import datasets  # takes seconds to import

    try:
        data = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        problem = f"{folder}: cannot be opened as a datasets folder ({type(error).__name__}: {first_line(error)})"
        raise DataError(f"{problem}; save it again with save_to_disk") from error
    files = tuple(sorted(path for path in folder.rglob("*") if path.is_file()))
    return _of_split(str(folder), data, split, named, files)


def _hub(path: str, split: str) -> HuggingFace:
    import datasets

    name, _, named = path.partition(":")
    try:
        data = datasets.load_dataset(name, split=named or None)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        problem = f"it cannot be loaded from the Hugging Face Hub ({type(error).__name__}: {first_line(error)})"
        remedy = "check the name, the network and access rights, or give a local path"
        raise DataError(f"{path}: there is no such file or folder, and {problem}; {remedy}") from error
    return _of_split(path, data, split, None)


def _of_split(name: str, data: Any, split: str, named: str | None, files: tuple[Path, ...] = ()) -> HuggingFace:
    if not isinstance(data, dict):
        if named is not None:
            raise DataError(f"{name}:{named}: {name} is one data set, without splits; leave out :{named}")
        return HuggingFace(name, data, files)
    ours = _pick(name, list(data), split, named)
    left_out = tuple(f"{name}:{other}" for other in data if other != ours)
    return HuggingFace(f"{name}:{ours}", data[ours], files, left_out)


def _digest(path: Path) -> str:
    try:
        return content_digest(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _missing(path: str, local: Path) -> str:
    if not local.parent.is_dir():
        return f"{path}: no such file: the folder {local.parent} does not exist"
    if local.is_symlink():
        return f"{path}: no such file: it is a link to {local.readlink()}, which does not exist"
    near = get_close_matches(local.name, [p.name for p in local.parent.iterdir()], n=1)
    hint = f"; did you mean {local.parent / near[0]}?" if near else f" in {local.parent.resolve()}"
    return f"{path}: no such file or folder{hint}"
