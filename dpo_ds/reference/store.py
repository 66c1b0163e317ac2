"""A finished cache as flat, memory-mapped files under DPO_DS_CACHE: any row in microseconds, memory flat as it grows.

Parquet is what lasts and travels; this copy is derived from it, once a node, and may be deleted at any time.
"""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path

import numpy as np
from filelock import FileLock

from dpo_ds.data import PairDataset
from dpo_ds.data.preparation import cache_root, wait_for
from dpo_ds.reference.cache import KeyIndex, Manifest, pair_keys, read_shards, sort_keys

KEYS, PLACES, VALUES = "keys.npy", "places.npy", "values.f32"


class Store:
    """Log-probs by row; a row is a pair's place among the sorted keys.

    keys [2, rows] uint64; places [rows, 4] int64: start and length of chosen, then of rejected, in the values, float32.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.index = KeyIndex(np.load(folder / KEYS, mmap_mode="r"))
        self._places = np.load(folder / PLACES, mmap_mode="r")
        self._values = np.memmap(folder / VALUES, dtype=np.float32, mode="r")

    def logps(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Of every token of chosen and of rejected, float32, as views."""
        start, length, other_start, other_length = self._places[row]
        return self._values[start : start + length], self._values[other_start : other_start + other_length]


def open_store(manifest: Manifest, build: bool) -> Store:
    """The copy of this cache; the rank with `build` makes it where there is none, the others wait for it."""
    folder = _root() / manifest.id
    if build:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                _build(folder, manifest)
    else:
        wait_for(folder)
    return Store(folder)


def data_keys(data: PairDataset, build: bool) -> np.ndarray:  # [rows, 2] uint64
    """`pair_keys`, memory-mapped and computed once a data set and node."""
    return _saved(_root() / f"keys-{data.digest}.npy", lambda: pair_keys(data), build)


def data_rows(store: Store, data: PairDataset, build: bool) -> np.ndarray:  # [rows] int64
    """The store's row of every pair, -1 where it has none; memory-mapped, computed once a data set, cache and node."""
    path = store.folder / f"rows-{data.digest}.npy"
    return _saved(path, lambda: store.index.find(data_keys(data, build)), build)


def _build(folder: Path, manifest: Manifest) -> None:
    work = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(work, ignore_errors=True)  # of a build that was killed
    work.mkdir()
    keys, places, written = [], [], 0
    with (work / VALUES).open("wb") as values:
        for shard in read_shards(manifest):
            keys.append(np.array(shard.keys))
            columns = []
            for side, logps in enumerate((shard.chosen, shard.rejected)):
                ends = written + np.cumsum(shard.lengths[:, side])
                columns += [ends - shard.lengths[:, side], shard.lengths[:, side]]
                values.write(np.ascontiguousarray(logps))
                written += len(logps)
            places.append(np.stack(columns, axis=1))
    all_keys = np.concatenate(keys)
    order = sort_keys(all_keys)
    np.save(work / KEYS, np.ascontiguousarray(all_keys[order].T))
    np.save(work / PLACES, np.concatenate(places)[order])
    work.rename(folder)


def _saved(path: Path, compute, build: bool) -> np.ndarray:
    if build and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{secrets.token_hex(4)}.tmp")  # containers on two nodes may share a process id
        with temporary.open("wb") as file:
            np.save(file, compute())
        os.replace(temporary, path)
    elif not build:
        wait_for(path)
    return np.load(path, mmap_mode="r")


def _root() -> Path:
    return cache_root().parent / "reference"
