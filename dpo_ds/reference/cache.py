"""The reference's log-probs on disk: Parquet shards and, written last, MANIFEST.json that says what they hold.

A row is one completion behind its prompt: its key (`completion_keys`) and, as `chosen`, one float32 log-prob a token,
whatever the masks; a token that nothing precedes has none and is NaN. Caches of before have rows of pairs, with
`rejected` beside `chosen` and keys of both (`pair_keys`); they serve pairs as they did. A shard appears whole, by one
rename, and is what rows and settings make it, whoever computes it: no time, rank or host name is in it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import Field

from dpo_ds.batch import PAIR
from dpo_ds.cluster.records import Count, Damaged, FileName, Record, Sha256, read_object, record_of
from dpo_ds.cluster.shared_files import write_whole
from dpo_ds.data import GroupDataset
from dpo_ds.data.shard import SHARD_NAME, DamagedShard, ShardKind, head_of, shard_files
from dpo_ds.errors import ConfigError
from dpo_ds.models.fingerprint import file_digest

FORMAT = 1
MANIFEST = "MANIFEST.json"
KEY_BYTES = 16
QUANTIZE = "quantize"  # the key's value, in the manifest and in shards of a reference that was quantised
MEND = "delete it and run dpo-ds precompute again: whole shards are kept"
SIDES = [(side, pa.list_(pa.float32())) for side in PAIR]
SCHEMA = pa.schema([("key", pa.binary(KEY_BYTES)), *SIDES])


class ShardRecord(Record):
    """Says what a shard of a finished cache must be."""

    file: FileName
    rows: Count
    tokens: Count
    bytes: Count
    sha256: Sha256


class BuildRecord(Record):
    """Describes the shards that one `dpo-ds precompute` added, and what computed them."""

    id: str
    dtype: str
    layout: str
    attention: str
    logprobs: str
    device: str
    threads: Count
    versions: dict[str, str]
    shards: list[ShardRecord]


class CacheRecord(Record):
    """Describes a finished cache: its MANIFEST.json."""

    id: str
    reference: str
    weights: str
    tokenizer: str
    rows: Count
    tokens: Count
    builds: list[BuildRecord] = Field(min_length=1)


class Shard(NamedTuple):
    """keys [rows, 2] uint64; lengths [rows, 2] int64, tokens of chosen and of rejected, 0 in rows of one completion;
    chosen, rejected: log-probs of all rows end to end, float32."""

    keys: np.ndarray
    lengths: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray

    @property
    def has_pairs(self) -> bool:
        """Tells whether rows of pairs are among these, as in caches of before."""
        return bool(self.lengths[:, 1].any())


@dataclass(frozen=True)
class Manifest:
    """A finished cache, as its MANIFEST.json describes it."""

    folder: Path
    values: dict

    @property
    def id(self) -> str:
        return self.values["id"]

    @property
    def ids(self) -> list[str]:
        """Returns the ids of this cache and of those it has grown from: what they hold, it holds."""
        return [build["id"] for build in self.values["builds"]]

    @property
    def shards(self) -> list[dict]:
        return [shard for build in self.values["builds"] for shard in build["shards"]]


def completion_keys(data: GroupDataset) -> np.ndarray:  # [completions, 2] uint64
    """The key of every completion: 128 bits of BLAKE2b over the lengths and token ids of prompt and completion."""
    keys = [_key(prompt, ids) for prompt, *completions in data.token_ids() for ids in completions]
    return np.frombuffer(b"".join(keys), np.uint64).reshape(-1, 2)


def pair_keys(data: GroupDataset) -> np.ndarray:  # [rows, 2] uint64
    """The key of every pair in a cache of before; of groups, keys that no cache has."""
    return np.frombuffer(b"".join(_key(*ids) for ids in data.token_ids()), np.uint64).reshape(-1, 2)


def _key(prompt: np.ndarray, first: np.ndarray, *others: np.ndarray) -> bytes:
    digest = hashlib.blake2b(np.array([len(prompt), len(first)], dtype="<i8"), digest_size=KEY_BYTES)
    for ids in (prompt, first, *others):
        digest.update(ids)
    return digest.digest()


class KeyIndex:
    """Finds keys among many: `columns` [2, rows], the halves of the keys in ascending order, memory-mapped or not."""

    def __init__(self, columns: np.ndarray):
        self.first, self.second = columns

    def find(self, keys: np.ndarray) -> np.ndarray:  # [len(keys)] int64
        """Returns the index of each key among the columns, -1 where it is missing."""
        places = np.searchsorted(self.first, keys[:, 0])
        found = np.full(len(keys), -1)
        open_ = np.arange(len(keys))
        while len(open_):  # once, unless the first 64 bits of two keys are equal
            open_ = open_[places[open_] < len(self.first)]
            open_ = open_[self.first[places[open_]] == keys[open_, 0]]
            hit = self.second[places[open_]] == keys[open_, 1]
            found[open_[hit]] = places[open_[hit]]
            open_ = open_[~hit]
            places[open_] += 1
        return found


def sort_keys(keys: np.ndarray) -> np.ndarray:  # [rows] int64
    """The order that KeyIndex wants."""
    return np.lexsort((keys[:, 1], keys[:, 0]))


def is_a_cache(folder: Path) -> bool:
    """Tells whether `dpo-ds precompute` has begun or filled this folder: all in it has the names that it gives, and the
    manifest or a shard is of its form.
    """
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    if not all(re.fullmatch(rf"({SHARD_NAME}|{re.escape(MANIFEST)})(\.[0-9a-f]{{8}}\.tmp)?", name) for name in names):
        return False
    try:
        return "builds" in read_object(folder / MANIFEST)
    except (FileNotFoundError, Damaged):
        return any("weights" in (head_of(path) or {}) for path in shard_files(folder))


def is_finished(path: Path, keys: np.ndarray, head: dict) -> bool:
    """Tells whether `path` is the whole shard of these pairs under this head, so that nobody need compute it again."""
    try:
        shard, _ = SHARDS.read(path)
    except DamagedShard:
        return False
    return np.array_equal(shard.keys, keys) and SHARDS.encode(shard, head).equals(pa.py_buffer(path.read_bytes()))


def read_manifest(folder: Path) -> Manifest | None:
    """None where there is none: no cache, or one that is not finished.

    Raises:
        ConfigError: it is damaged or of another format.
    """
    path = folder / MANIFEST
    try:
        values = read_object(path)
        if values.get("format") != FORMAT:
            raise ConfigError(f"{path}: format {values.get('format')}, this version reads {FORMAT}; use another folder")
        record_of(values, CacheRecord)
    except FileNotFoundError:
        return None
    except Damaged as problem:
        raise ConfigError(f"{path}: damaged, {problem}; {MEND}") from None
    if values != _with_ids(values):
        raise ConfigError(f"{path}: damaged, its id is not that of its content; {MEND}")
    return Manifest(folder, values)


def write_manifest(folder: Path, identity: dict, builds: Sequence[dict]) -> Manifest:
    """Makes the cache a finished one. `builds`: settings and shards of each build, a new shard by its name alone."""
    rows = tokens = 0
    hashed = []
    for build in builds:
        shards = [shard if "sha256" in shard else _described(folder / shard["file"]) for shard in build["shards"]]
        rows += sum(shard["rows"] for shard in shards)
        tokens += sum(shard["tokens"] for shard in shards)
        hashed.append({**build, "shards": shards})
    values = _with_ids({"format": FORMAT, **identity, "rows": rows, "tokens": tokens, "builds": hashed})
    write_whole(folder / MANIFEST, (json.dumps(values, indent=1) + "\n").encode())
    return Manifest(folder, values)


def check_shards(manifest: Manifest) -> None:
    """Every byte of every shard against the manifest.

    Raises:
        ConfigError: a shard is missing or is not what was written.
    """
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for problem in pool.map(lambda shard: _problem(manifest.folder / shard["file"], shard), manifest.shards):
            if problem:
                raise ConfigError(
                    f"{problem}; delete that file and {MANIFEST} and run dpo-ds precompute again: whole shards are kept"
                )


def read_shards(manifest: Manifest) -> Iterator[Shard]:
    return (SHARDS.read(manifest.folder / shard["file"])[0] for shard in manifest.shards)


def _with_ids(values: dict) -> dict:
    """`id` of the whole and of each build: a digest of the weights, the tokenizer and all shards up to there."""
    seen = hashlib.sha256(f"{values['format']} {values['weights']} {values['tokenizer']}".encode())
    builds = []
    for build in values["builds"]:
        seen.update("".join(shard["sha256"] for shard in build["shards"]).encode())
        builds.append({**build, "id": seen.hexdigest()[:32]})
    return {**values, "builds": builds, "id": builds[-1]["id"]}


def _described(path: Path) -> dict:
    shard, _ = SHARDS.read(path)
    counts = {"rows": len(shard.keys), "tokens": int(shard.lengths.sum()), "bytes": path.stat().st_size}
    return {"file": path.name, **counts, "sha256": file_digest(path)}


def _problem(path: Path, shard: dict) -> str:
    if not path.is_file():
        return f"{path}: missing, though {MANIFEST} lists it"
    size = path.stat().st_size
    if size != shard["bytes"]:
        return f"{path}: {size} bytes, {MANIFEST} says {shard['bytes']}"
    digest = file_digest(path)
    return "" if digest == shard["sha256"] else f"{path}: SHA-256 {digest[:12]}, {MANIFEST} says {shard['sha256'][:12]}"


def _to_table(shard: Shard) -> pa.Table:
    offsets = np.zeros((len(shard.keys) + 1, 2), dtype=np.int32)
    np.cumsum(shard.lengths, axis=0, out=offsets[1:])
    columns = [pa.Array.from_buffers(pa.binary(KEY_BYTES), len(shard.keys), [None, pa.py_buffer(shard.keys.tobytes())])]
    for side, values in enumerate((shard.chosen, shard.rejected)):
        columns.append(pa.ListArray.from_arrays(_array(offsets[:, side], pa.int32()), _array(values, pa.float32())))
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def _from_table(table: pa.Table) -> Shard:
    keys, chosen, rejected = (table.combine_chunks().column(name).chunk(0) for name in SCHEMA.names)
    lengths = np.stack([np.diff(np.from_dlpack(side.offsets)) for side in (chosen, rejected)], axis=1).astype(np.int64)
    flat = np.frombuffer(keys.buffers()[1], np.uint64)[2 * keys.offset :][: 2 * len(keys)]
    return Shard(flat.reshape(-1, 2), lengths, *(np.from_dlpack(side.flatten()) for side in (chosen, rejected)))


def _content(shard: Shard) -> str:
    digest = hashlib.sha256()
    for part in shard:
        digest.update(np.ascontiguousarray(part))
    return digest.hexdigest()


def _array(values: np.ndarray, kind: pa.DataType) -> pa.Array:
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(np.ascontiguousarray(values))])


SHARDS = ShardKind(
    _to_table, _from_table, _content, sort_head=True,
    options={"compression": "none", "use_dictionary": False, "write_statistics": False},
)  # fmt: skip
