"""Reads rows from where they are: JSON, JSON lines, Parquet, folders of them, `datasets` folders and the Hugging Face
Hub.

Sources stream (location, row): memory does not grow with the file. A row that cannot be read, in a file that can,
comes as the BadRow that the caller may raise or skip; a file that cannot be read raises DataError.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_ds.cluster.derived import content_digest
from dpo_ds.data.json_stream import JsonArray
from dpo_ds.data.rows import BadRow, Location, shorten, unreadable
from dpo_ds.errors import DataError

Rows = Iterator[tuple[Location, dict[str, Any] | BadRow]]

KINDS = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
# The names of our splits elsewhere, best first. UNNAMED: files of a folder whose names tell no split.
UNNAMED = ""
SPLITS = {"train": ("train", UNNAMED), "eval": ("test", "validation", "valid", "val", "eval", "dev")}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
BATCH = 1024  # rows of Arrow data converted together
UNFINISHED = "unfinished object"


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
            yield from _file_rows(path, wanted)


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
        data, number = self.data.select_columns(_used(names, wanted)), 0

        def read(start: int, stop: int) -> list[dict]:
            columns = data[start:stop]
            return [{name: values[i] for name, values in columns.items()} for i in range(stop - start)]

        while number < len(data):
            for row in _converted(read, number, min(number + BATCH, len(data)), names):
                number += 1
                yield Location(self.name, number), row


def open_source(path: str, split: str = "train") -> Files | HuggingFace:
    """Finds what `path` names; reads no rows. DataError where there is nothing to read."""
    local = Path(path).expanduser()
    if local.is_dir():
        if (local / "dataset_dict.json").exists() or (local / "state.json").exists():
            return _saved(local, split)
        return _folder(local, split)
    if local.exists():
        if _kind(local) is None:
            raise DataError(f"{path}: not a file that can be read as data; known: {', '.join(KINDS)}")
        return Files((local,))
    if HUB_ID.fullmatch(path) and _kind(local) is None and not local.parent.exists():
        return _hub(path, split)
    raise DataError(_missing(path, local))


def _file_rows(path: Path, wanted: Collection[str] | None) -> Rows:
    kind = _kind(path)
    if kind == ".parquet":
        yield from _parquet_rows(path, wanted)
        return
    last, one_a_line = 0, kind.startswith(".jsonl")
    try:
        with gzip.open(path, "rb") if kind.endswith(".gz") else path.open("rb") as stream:
            is_array = not one_a_line and _begins_array(stream)
            for number, row in JsonArray(stream, path).elements() if is_array else _lines(stream):
                if last == 0 and not one_a_line and isinstance(row, BadRow) and row.reason == UNFINISHED:
                    raise DataError(f"{path}:{number}: {row}, or wrap all objects in [ ], with commas between them")
                last = number
                yield Location(str(path), number), row if isinstance(row, dict | BadRow) else _not_an_object(row)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        problem = f"{path}: broken or cut-short gzip file after row {last} ({error})"
        raise DataError(f"{problem}; copy or download it again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _begins_array(stream: BinaryIO) -> bool:
    begins = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
    stream.seek(0)
    return begins


def _lines(stream: Iterable[bytes]) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(stream, 1):
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if line.strip():
            yield number, _line(line)


def _line(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8").rstrip())
    except UnicodeDecodeError as error:
        found = f"0x{line[error.start]:02x}"
        return BadRow("not UTF-8", f"not UTF-8 at byte {error.start} of the line ({found}); save the file as UTF-8")
    except json.JSONDecodeError as error:
        if error.doc.startswith("{") and error.pos == len(error.doc):
            return BadRow(UNFINISHED, "the object does not end on its line; write each object on one line")
        problem = f"the line is not JSON at column {error.pos + 1}: {error.msg} ({shorten(error.doc[:60])})"
        return BadRow("not JSON", problem)
    except (ValueError, RecursionError) as error:
        return unreadable(error)


def _not_an_object(row: Any) -> BadRow:
    problem = f"the row is {type(row).__name__} {shorten(row)}; it must be an object with named fields"
    return BadRow("not an object", problem)


def _parquet_rows(path: Path, wanted: Collection[str] | None) -> Rows:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            for batch in file.iter_batches(BATCH, columns=_used(names, wanted)):
                for row in _converted(partial(_to_python, batch), 0, len(batch), names):
                    number += 1
                    yield Location(str(path), number), row
    except (pa.ArrowException, OSError) as error:
        problem = f"{path}: broken Parquet file after row {number} ({_first_line(error)})"
        raise DataError(f"{problem}; copy or download it again") from error


def _used(names: list[str], wanted: Collection[str] | None) -> list[str]:
    """Columns nobody asked for may hold what Python cannot: dates beyond its range, bytes that are not UTF-8."""
    return [name for name in names if wanted is None or name in wanted] or names[:1]  # one still counts the rows


def _to_python(batch: pa.RecordBatch, start: int, stop: int) -> list[dict]:
    return batch.slice(start, stop - start).to_pylist()


def _converted(
    read: Callable[[int, int], list[dict]], start: int, stop: int, names: list[str]
) -> list[dict[str, Any] | BadRow]:
    """Rows start to stop, with None in columns left out; one by one where they cannot be converted together."""
    empty = dict.fromkeys(names)
    try:
        return [empty | row for row in read(start, stop)]
    except (ValueError, OverflowError) as error:
        if stop - start > 1:
            return [row for i in range(start, stop) for row in _converted(read, i, i + 1, names)]
        if isinstance(error, UnicodeDecodeError):
            problem = f"not UTF-8 at byte {error.start} of {shorten(error.object)}; save the text as UTF-8"
            return [BadRow("not UTF-8", problem)]
        return [BadRow("not readable", f"a value cannot be read ({_first_line(error)})")]


def _kind(path: Path) -> str | None:
    name = path.name.lower()
    return next((kind for kind in sorted(KINDS, key=len, reverse=True) if name.endswith(kind)), None)


def _folder(folder: Path, split: str) -> Files:
    """Returns all data files below `folder`; where names tell splits apart (train-00.parquet), those of ours.

    Of what `dpo-ds sample` leaves, completions/ beside pairs/, the pairs.
    """
    if all((folder / name).is_dir() for name in ("completions", "pairs")):
        folder = folder / "pairs"
    found = sorted(p for p in folder.rglob("*") if p.is_file() and _kind(p) and not _hidden(p.relative_to(folder)))
    if not found:
        raise DataError(f"{folder}: the folder holds no data file; known: {', '.join(KINDS)}")
    by_split: dict[str, list[Path]] = {}
    for path in found:
        words = re.split(r"[^a-z]+", path.name.lower())
        name = next((name for names in SPLITS.values() for name in names if name and name in words), UNNAMED)
        by_split.setdefault(name, []).append(path)
    chosen = by_split[_pick(str(folder), list(by_split), split)]
    return Files(tuple(chosen), tuple(path for path in found if path not in chosen))


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _pick(where: str, there: list[str], split: str) -> str:
    """The split to read: ours by the names of `SPLITS`, or the only one."""
    for name in SPLITS[split]:
        if name in there:
            return name
    if len(there) == 1:
        return there[0]
    wanted, has = " or ".join(filter(None, SPLITS[split])), ", ".join(name or "unnamed" for name in there)
    remedy = "name one of its files, or on the Hub 'owner/name:split'"
    raise DataError(f"{where}: has no {wanted} split but {has}; {remedy}")


def _saved(folder: Path, split: str) -> HuggingFace:
    import datasets  # takes seconds to import

    try:
        data = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        problem = f"{folder}: cannot be opened as a datasets folder ({_first_line(error)})"
        raise DataError(f"{problem}; save it again with save_to_disk") from error
    files = tuple(sorted(path for path in folder.rglob("*") if path.is_file()))
    return _of_split(str(folder), data, split, files)


def _hub(path: str, split: str) -> HuggingFace:
    import datasets

    name, _, wanted = path.partition(":")
    try:
        data = datasets.load_dataset(name, split=wanted or None)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise DataError(
            f"{path}: there is no such file or folder, and it cannot be loaded from the Hugging Face Hub "
            f"({_first_line(error)}); check the name, the network and access rights, or give a local path"
        ) from error
    return _of_split(path, data, split)


def _of_split(name: str, data: Any, split: str, files: tuple[Path, ...] = ()) -> HuggingFace:
    if not isinstance(data, dict):
        return HuggingFace(name, data, files)
    ours = _pick(name, list(data), split)
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
    near = get_close_matches(local.name, [p.name for p in local.parent.iterdir()], n=1)
    hint = f"; did you mean {local.parent / near[0]}?" if near else f" in {local.parent.resolve()}"
    return f"{path}: no such file or folder{hint}"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
