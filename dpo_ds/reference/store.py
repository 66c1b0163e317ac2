"""A finished cache as flat, memory-mapped files under DPO_DS_CACHE: any row in microseconds, memory flat as it grows.

Parquet is what lasts and travels; this copy is derived from it, once a node, and may be deleted at any time.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from dpo_ds.cluster.derived import cache_root, derive
from dpo_ds.data import GroupDataset
from dpo_ds.reference.cache import KeyIndex, Manifest, completion_keys, pair_keys, read_shards, sort_keys

KEYS, PLACES, VALUES = "keys.npy", "places.npy", "values.f32"
ARRAY = "array.npy"


class Store:
    """Log-probs by row; a row is an index among the sorted keys.

    keys [2, rows] uint64; places [rows, 4] int64: start and length of chosen, then of rejected, in the values, float32.
    has_pairs: rows of before, of two completions each, are among them.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.index = KeyIndex(np.load(folder / KEYS, mmap_mode="r"))
        self._places = np.load(folder / PLACES, mmap_mode="r")
        self._values = np.memmap(folder / VALUES, dtype=np.float32, mode="r")
        self.has_pairs = bool((self._places[:, 3] > 0).any())

    def logps(self, row: int, side: int) -> np.ndarray:
        """Returns the log-probs of every token of a completion, float32, as a view; side 1 is a pair's rejected."""
        start, length = self._places[row][2 * side : 2 * side + 2]
        return self._values[start : start + length]

    def find(self, data: GroupDataset, keys: np.ndarray) -> np.ndarray:  # [completions, 2] int64
        """Returns the row and side of every completion, whose keys are given; -1 where there is none."""
        rows = self.index.find(keys)
        found = np.stack([rows, np.zeros_like(rows)], axis=1)
        if self.has_pairs:
            sides = np.arange(len(keys)) - np.repeat(data.first_completions, data.completions)
            of_pair = np.where(data.completions == 2, self.index.find(pair_keys(data)), -1)
            of_pair = np.repeat(of_pair, data.completions)
            lacks = (rows < 0) & (of_pair >= 0)
            found[lacks] = np.stack([of_pair, sides], axis=1)[lacks]
        return found


def open_store(manifest: Manifest, build: bool) -> Store:
    """Returns the copy of this cache; the rank with `build` makes it where there is none, the others wait for it."""
    folder = _root() / manifest.id
    derive(folder, "the copy of the reference cache", lambda work: _fill(work, manifest), build)
    return Store(folder)


def data_keys(data: GroupDataset, build: bool) -> np.ndarray:  # [completions, 2] uint64
    """Returns `completion_keys`, memory-mapped and computed once a data set and node."""
    return _array(f"completion-keys-{data.digest}", lambda: completion_keys(data), build)


def data_rows(store: Store, data: GroupDataset, build: bool) -> np.ndarray:  # [completions, 2] int64
    """Returns the store's row and side of every completion, -1 where it has none; memory-mapped, computed once a data
    set, cache and node.
    """
    keys = data_keys(data, build)
    return _array(f"places-{store.folder.name}-{data.digest}", lambda: store.find(data, keys), build)


def _fill(folder: Path, manifest: Manifest) -> None:
    keys, places, written = [], [], 0
    with (folder / VALUES).open("wb") as values:
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
    np.save(folder / KEYS, np.ascontiguousarray(all_keys[order].T))
    np.save(folder / PLACES, np.concatenate(places)[order])


def _array(name: str, compute: Callable[[], np.ndarray], build: bool) -> np.ndarray:
    folder = _root() / name
    derive(folder, "a table of the reference cache", lambda work: np.save(work / ARRAY, compute()), build)
    return np.load(folder / ARRAY, mmap_mode="r")


def _root() -> Path:
    return cache_root() / "reference"
