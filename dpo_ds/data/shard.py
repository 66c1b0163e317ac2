"""Parquet files that appear whole and can tell whether they still are.

A shard's footer holds its head, the settings that made it, and a digest of its rows. It is on the disk when `write`
returns, under its name by one rename, and no time, rank or host name is in it: whoever makes it makes the same bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_ds.cluster.shared_files import write_whole
from dpo_ds.errors import DataError, first_line

HEAD = b"dpo_ds"
SHARD_NAME = r"shard-\d{6,}\.parquet"  # a regular expression of `shard_name`
UNREADABLE = (OSError, ValueError, KeyError, TypeError, IndexError)  # from a Parquet file with bytes changed
T = TypeVar("T")


class DamagedShard(DataError):
    """Tells of a file that is not the shard that was written."""


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.parquet"


def shard_files(folder: Path) -> list[Path]:
    """Returns the shards in `folder`, in order."""
    return sorted(path for path in folder.glob("shard-*") if re.fullmatch(SHARD_NAME, path.name))


def head_of(path: Path) -> dict | None:
    """Returns a shard's head, None if the file is damaged or none of ours; reads no rows."""
    try:
        return json.loads(pq.read_schema(path).metadata[HEAD])
    except UNREADABLE:
        return None


@dataclass(frozen=True)
class ShardKind(Generic[T]):
    """Turns what a kind of shard holds into a table and back; `digest` is of all that it holds.

    options: of pyarrow's write_table. sort_head: writes the head's keys in the order of the alphabet.
    """

    to_table: Callable[[T], pa.Table]
    from_table: Callable[[pa.Table], T]
    digest: Callable[[T], str]
    options: Mapping[str, Any] = field(default_factory=dict)
    sort_head: bool = False

    def encode(self, content: T, head: Mapping[str, Any]) -> pa.Buffer:
        """Returns the bytes of the shard's file."""
        footer = json.dumps({**head, "content": self.digest(content)}, sort_keys=self.sort_head)
        return encode(self.to_table(content).replace_schema_metadata({HEAD: footer}), **self.options)

    def write(self, path: Path, content: T, head: Mapping[str, Any]) -> None:
        write_whole(path, self.encode(content, head))

    def read(self, path: Path) -> tuple[T, dict]:
        """Returns what the shard holds, memory-mapped where `from_table` makes no copy, and its head.

        Raises:
            DamagedShard: there is no such file, or it is not what was written.
        """
        try:
            table = pq.ParquetFile(path, memory_map=True).read()
            head, content = json.loads(table.schema.metadata[HEAD]), self.from_table(table)
            is_whole = head["content"] == self.digest(content)
        except UNREADABLE as error:
            problem = f"{type(error).__name__}: {first_line(error)}"
            raise DamagedShard(f"{path}: missing, damaged or no shard ({problem})") from error
        if not is_whole:
            raise DamagedShard(f"{path}: damaged, its rows do not have the digest that was written with them")
        return content, head


def encode(table: pa.Table, **options: Any) -> pa.Buffer:
    """Returns `table` as the bytes of a Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **options)
    return sink.getvalue()
