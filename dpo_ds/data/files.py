"""Reads the rows of a data file: JSON, JSON lines, CSV, TSV, with gzip around them, and Parquet.

Rows stream as (location, row): memory does not grow with the file. A row that cannot be read, in a file that can, comes
as the BadRow that the caller may raise or skip; a file that cannot be read raises DataError.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_ds.data.json_stream import JsonArray
from dpo_ds.data.rows import BadRow, Location, shorten, unique_keys, unreadable, without_nulls
from dpo_ds.errors import DataError, first_line

Rows = Iterator[tuple[Location, dict[str, Any] | BadRow]]

KINDS = (".jsonl", ".json", ".csv", ".tsv", ".jsonl.gz", ".json.gz", ".csv.gz", ".tsv.gz", ".parquet")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
BATCH, BATCH_BYTES = 1024, 1 << 25  # of Arrow data converted together
UNFINISHED = "unfinished object"
MAX_BLANK_LINES = 1_000_000  # in a row: a few bytes of gzip unpack to billions
MAX_LINE = 1 << 28  # bytes


def kind_of(path: Path) -> str | None:
    """Returns which of KINDS a file is by its name; None for another one."""
    name = path.name.lower()
    return next((kind for kind in sorted(KINDS, key=len, reverse=True) if name.endswith(kind)), None)


def file_rows(path: Path, wanted: Collection[str] | None) -> Rows:
    """Yields the rows of a file of one of KINDS. wanted: the fields that will be used, None for all; others may come as
    None.
    """
    kind = kind_of(path)
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
            together = rows_at_once(sum(group.total_byte_size for group in groups), file.metadata.num_rows)
            for batch in file.iter_batches(together, columns=columns_read(names, wanted)):
                for row in converted_rows(partial(_to_python, batch), 0, len(batch), names):
                    number += 1
                    yield Location(str(path), number), row
    except (pa.ArrowException, OSError) as error:
        problem = f"{path}: broken Parquet file after row {number} ({type(error).__name__}: {first_line(error)})"
        raise DataError(f"{problem}; copy or download it again") from error


def rows_at_once(size: int, rows: int) -> int:
    """Returns how many rows of so many bytes are converted at a time."""
    return max(1, min(BATCH, rows * BATCH_BYTES // max(size, 1)))


def columns_read(names: list[str], wanted: Collection[str] | None) -> list[str]:
    """Returns the columns that are asked for; in others there may be what Python cannot hold: dates beyond its range,
    bytes that are not UTF-8.
    """
    return [name for name in names if wanted is None or name in wanted] or names[:1]  # one still counts the rows


def _to_python(batch: pa.RecordBatch, start: int, stop: int) -> list[dict]:
    return batch.slice(start, stop - start).to_pylist()


def converted_rows(
    read: Callable[[int, int], list[dict]], start: int, stop: int, names: list[str]
) -> list[dict[str, Any] | BadRow]:
    """Rows start to stop, with None in columns left out; one by one where they cannot be converted together."""
    empty = dict.fromkeys(names)
    try:
        return [empty | {name: without_nulls(value) for name, value in row.items()} for row in read(start, stop)]
    except (ValueError, OverflowError) as error:
        if stop - start > 1:
            return [row for i in range(start, stop) for row in converted_rows(read, i, i + 1, names)]
        if isinstance(error, UnicodeDecodeError):
            problem = f"not UTF-8 at byte {error.start} of {shorten(error.object)}; save the text as UTF-8"
            return [BadRow("not UTF-8", problem)]
        return [BadRow("not readable", f"a value cannot be read ({type(error).__name__}: {first_line(error)})")]
