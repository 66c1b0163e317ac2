"""Reads rows from where they are: JSON, JSON lines, CSV, TSV, Parquet, folders of them, `datasets` folders and the Hub.

Sources stream (location, row): memory does not grow with the file. A row that cannot be read, in a file that can,
comes as the BadRow that the caller may raise or skip; a file that cannot be read raises DataError.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_ds.cluster.derived import content_digest
from dpo_ds.data.json_stream import JsonArray
from dpo_ds.data.rows import BadRow, Location, shorten, unique_keys, unreadable, without_nulls
from dpo_ds.errors import DataError

Rows = Iterator[tuple[Location, dict[str, Any] | BadRow]]

KINDS = (".jsonl", ".json", ".csv", ".tsv", ".jsonl.gz", ".json.gz", ".csv.gz", ".tsv.gz", ".parquet")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
# The words that tell our splits in names, best first. UNNAMED: files of a folder whose names tell no split.
UNNAMED = ""
SPLITS = {"train": ("train",), "eval": ("test", "validation", "valid", "val", "eval", "dev")}
SPLIT_WORDS = tuple(word for words in SPLITS.values() for word in words)
SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}([.-].*)?")  # as `datasets` names a split's files
NAMED = re.compile(rf"({'|'.join(SPLIT_WORDS)})[._-][a-z].*")
NUMBERS = re.compile(r"([._-]?\d+)+$")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
BATCH, BATCH_BYTES = 1024, 1 << 25  # of Arrow data converted together
UNFINISHED = "unfinished object"
MAX_BLANK_LINES = 1_000_000  # in a row: a few bytes of gzip unpack to billions
MAX_LINE = 1 << 28  # bytes


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

        together = _together(data.data.nbytes, len(data.data))
        while number < len(data):
            for row in _converted(read, number, min(number + together, len(data)), names):
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
        if _kind(local) is None:
            raise DataError(f"{path}: not a file that can be read as data; known: {', '.join(KINDS)}")
        if named is not None:
            raise DataError(f"{path}:{named}: {path} is one file, without splits; leave out :{named}")
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
    delimiter = DELIMITERS.get(kind.removesuffix(".gz"))
    try:
        with gzip.open(path, "rb") if kind.endswith(".gz") else path.open("rb") as stream:
            if delimiter is not None:
                rows = _table(stream, path, delimiter)
            else:
                begins_array = _begins_array(stream)
                is_array = begins_array and not one_a_line
                rows = JsonArray(stream, path).elements() if is_array else _lines(stream, path)
            for number, row in rows:
                if last == 0 and not one_a_line and isinstance(row, BadRow) and row.reason == UNFINISHED:
                    raise DataError(f"{path}:{number}: {row}, or wrap all objects in [ ], with commas between them")
                if last == 0 and one_a_line and begins_array and _is_no_row(row):
                    raise DataError(f"{path}: one JSON array, where .jsonl holds an object a line; call it .json")
                last = number
                yield Location(str(path), number), row if isinstance(row, dict | BadRow) else _not_an_object(row)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        problem = f"{path}: broken or cut-short gzip file after row {last} ({error})"
        raise DataError(f"{problem}; copy or download it again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _is_no_row(first: Any) -> bool:
    """Tells whether the first line of a file that begins with [ is the beginning, or the whole, of an array of rows."""
    return isinstance(first, BadRow) or (isinstance(first, list) and any(isinstance(item, dict) for item in first))


def _begins_array(stream: BinaryIO) -> bool:
    begins = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
    stream.seek(0)
    return begins


def _lines(stream: BinaryIO, path: Path) -> Iterator[tuple[int, Any]]:
    blank = 0
    for number, line in enumerate(iter(partial(stream.readline, MAX_LINE), b""), 1):
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if line.strip():
            if len(line) == MAX_LINE:
                raise DataError(f"{path}:{number}: a line of more than {MAX_LINE >> 20} MiB; one object a line")
            blank, row = 0, _line(line)
            if isinstance(row, BadRow) and b"\r" in line.strip():
                remedy = "write it again with line feeds, as by tr '\\r' '\\n'"
                raise DataError(f"{path}:{number}: its lines end in carriage returns alone (CR); {remedy}")
            yield number, row
        else:
            blank = _one_more_blank(blank, path, number)


def _one_more_blank(blank: int, path: Path, number: int) -> int:
    if blank == MAX_BLANK_LINES:
        raise DataError(f"{path}:{number}: {blank:,} blank lines before it; this is no data: make the file again")
    return blank + 1


def _table(stream: BinaryIO, path: Path, delimiter: str) -> Iterator[tuple[int, dict[str, str] | BadRow]]:
    """Yields rows of CSV (RFC 4180) or TSV as text; a row's number is that of the line it begins on."""
    csv.field_size_limit(MAX_LINE)
    reader = csv.reader(io.TextIOWrapper(stream, "utf-8-sig", newline=""), delimiter=delimiter, strict=True)
    ends, blank = 0, 0
    try:
        names = next(reader, [])
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise DataError(f"{path}:1: two columns are called {twice[0]!r}; rename one")
        while ends := reader.line_num:
            values = next(reader, None)
            if values is None:
                return
            if not values:
                blank = _one_more_blank(blank, path, ends + 1)
                continue
            blank = 0
            if len(values) == len(names):
                yield ends + 1, dict(zip(names, values, strict=True))
            else:
                problem = (
                    f"{len(values)} fields where the header names {len(names)}; quote text that holds {delimiter!r}"
                )
                yield ends + 1, BadRow("wrong number of fields", problem)
    except csv.Error as error:
        raise DataError(f"{path}:{ends + 1}: not a table: {error}; write it again with a CSV library") from error
    except UnicodeDecodeError as error:
        found = f"0x{error.object[error.start]:02x}"
        raise DataError(f"{path}: not UTF-8 behind line {ends} ({found}); save the file as UTF-8") from error


def _line(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8").rstrip(), object_pairs_hook=unique_keys)
    except BadRow as error:
        return error
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
            groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
            together = _together(sum(group.total_byte_size for group in groups), file.metadata.num_rows)
            for batch in file.iter_batches(together, columns=_used(names, wanted)):
                for row in _converted(partial(_to_python, batch), 0, len(batch), names):
                    number += 1
                    yield Location(str(path), number), row
    except (pa.ArrowException, OSError) as error:
        problem = f"{path}: broken Parquet file after row {number} ({_first_line(error)})"
        raise DataError(f"{problem}; copy or download it again") from error


def _together(size: int, rows: int) -> int:
    """Returns how many rows of so many bytes are converted at a time."""
    return max(1, min(BATCH, rows * BATCH_BYTES // max(size, 1)))


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
        return [empty | {name: without_nulls(value) for name, value in row.items()} for row in read(start, stop)]
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


def _folder(folder: Path, split: str, named: str | None) -> Files:
    """Returns all data files below `folder`; where names tell splits apart (train-00000-of-00002.parquet,
    test.jsonl, validation/a.jsonl), those of ours.

    Of what `dpo-ds sample` leaves, completions/ beside pairs/, the pairs.
    """
    if named is None and all((folder / name).is_dir() for name in ("completions", "pairs")):
        folder = folder / "pairs"
    found = sorted(p for p in folder.rglob("*") if p.is_file() and _kind(p) and not _hidden(p.relative_to(folder)))
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
    for part in (path.name[: -len(_kind(path))], *reversed(path.parts[:-1])):
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
        problem = f"{folder}: cannot be opened as a datasets folder ({_first_line(error)})"
        raise DataError(f"{problem}; save it again with save_to_disk") from error
    files = tuple(sorted(path for path in folder.rglob("*") if path.is_file()))
    return _of_split(str(folder), data, split, named, files)


def _hub(path: str, split: str) -> HuggingFace:
    import datasets

    name, _, named = path.partition(":")
    try:
        data = datasets.load_dataset(name, split=named or None)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise DataError(
            f"{path}: there is no such file or folder, and it cannot be loaded from the Hugging Face Hub "
            f"({_first_line(error)}); check the name, the network and access rights, or give a local path"
        ) from error
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
    near = get_close_matches(local.name, [p.name for p in local.parent.iterdir()], n=1)
    hint = f"; did you mean {local.parent / near[0]}?" if near else f" in {local.parent.resolve()}"
    return f"{path}: no such file or folder{hint}"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
