"""Tokenised groups on disk: Arrow streams, memory-mapped, so that memory stays flat as data grows.

A pair is a row of prompt, chosen and rejected. Where a row holds more completions, they stand end to end in `rejected`,
and a second stream, of as many rows, says how long each is, which is better than which, and which are desirable.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa

from dpo_ds.batch import NO_COMPARISON, OF_A_PAIR, Group
from dpo_ds.cluster.derived import remembered
from dpo_ds.data.rows import Location

PARTS = ("prompt", "chosen", "rejected")
MASKS = ("chosen_mask", "rejected_mask")
MARGIN = "margin"  # a column of its own, only where one was asked for
ARROW, GROUPS, CENSUS = "pairs.arrow", "groups.arrow", "census.json"
SCHEMA = pa.schema(
    [(part, pa.list_(pa.int32())) for part in PARTS]
    + [(mask, pa.list_(pa.uint8())) for mask in MASKS]
    + [(f"{part}_length", pa.int32()) for part in PARTS]
    + [("file", pa.int32()), ("row", pa.int64())]
)
GROUP_SCHEMA = pa.schema([(name, pa.list_(kind)) for name, kind in (
    ("lengths", pa.int32()), ("comparisons", pa.int32()), ("margins", pa.float32()), ("labels", pa.uint8())
)])  # fmt: skip


class GroupWriter:
    """Writes groups in batches; `file` of a location is kept as an index into `files`."""

    def __init__(self, folder: Path, with_margins: bool = False):
        self.files: list[str] = []
        self._schema = SCHEMA.append(pa.field(MARGIN, pa.float32())) if with_margins else SCHEMA
        self.rows = 0
        self._has_groups = False
        self._groups_path = folder / GROUPS
        self._sinks = [pa.OSFile(str(folder / name), "wb") for name in (ARROW, GROUPS)]
        self._streams = [
            pa.ipc.new_stream(sink, schema)
            for sink, schema in zip(self._sinks, (self._schema, GROUP_SCHEMA), strict=True)
        ]

    def __enter__(self) -> GroupWriter:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for file in (*self._streams, *self._sinks):
            file.close()
        if not self._has_groups:
            self._groups_path.unlink()

    def write(self, groups: Sequence[Group], locations: Sequence[Location]) -> None:
        parts = [(group.prompt, group.completions[0], _end_to_end(group.completions[1:])) for group in groups]
        masks = [(group.masks[0], _end_to_end(group.masks[1:])) for group in groups]
        columns = [_lists(column, np.int32) for column in zip(*parts, strict=True)]
        columns += [_lists(column, np.uint8) for column in zip(*masks, strict=True)]
        columns += [_numbers(list(map(len, column)), np.int32) for column in zip(*parts, strict=True)]
        columns.append(_numbers([self._file(location.file) for location in locations], np.int32))
        columns.append(_numbers([location.row for location in locations], np.int64))
        margins = [np.zeros(0) if group.margins is None else group.margins for group in groups]
        if MARGIN in self._schema.names:
            columns.append(_numbers([of_one[0] if len(of_one) else 0.0 for of_one in margins], np.float32))
        self._streams[0].write_batch(pa.RecordBatch.from_arrays(columns, schema=self._schema))
        known = [
            _lists([np.array(list(map(len, group.completions[1:]))) for group in groups], np.int32),
            _lists([group.comparisons.ravel() for group in groups], np.int32),
            _lists(margins, np.float32),
            _lists([np.zeros(0) if group.labels is None else group.labels for group in groups], np.uint8),
        ]
        self._streams[1].write_batch(pa.RecordBatch.from_arrays(known, schema=GROUP_SCHEMA))
        self._has_groups = self._has_groups or not all(_is_plain(group) for group in groups)
        self.rows += len(groups)

    def _file(self, name: str) -> int:
        if name not in self.files[-1:]:  # rows come file by file
            self.files.append(name)
        return len(self.files) - 1


class GroupDataset:
    """A prepared data set, in the order of its source.

    prompt_lengths [rows], completion_lengths [rows, n]: tokens, int32; 0 where a row has fewer than n completions.
    comparisons [rows]: how many each row has, int64. margins [rows]: float32, those of pairs; None if no column of them
    was asked for. sources: (start, stop, weight), the rows of each source given. census: see `Census`. digest: of the
    files, options and tokenizer it was made from, no weights.
    """

    def __init__(self, folder: Path, weights: Iterable[float]):
        self.census: dict[str, Any] = json.loads((folder / CENSUS).read_text())
        self.digest = folder.name
        self.first_index = 0  # among all rows of a run: those of evaluation data count on from the training data's
        self._files: list[str] = self.census.pop("location_files")
        ends = self.census.pop("source_ends")
        self.sources = list(zip([0, *ends[:-1]], ends, weights, strict=True))
        self._paths = [path for path in (folder / ARROW, folder / GROUPS) if path.exists()]
        self._table, *groups = (pa.ipc.open_stream(pa.memory_map(str(path))).read_all() for path in self._paths)
        self._rows = [self._table.column(name) for name in (*PARTS, *MASKS)]
        self._groups = [groups[0].column(name) for name in GROUP_SCHEMA.names] if groups else None
        self.margins = self._whole(MARGIN) if MARGIN in self._table.column_names else None
        self.prompt_lengths, chosen, rejected = (self._whole(f"{part}_length") for part in PARTS)
        self.completion_lengths = np.stack([chosen, rejected], axis=1)
        self.comparisons = (rejected > 0).astype(np.int64)
        if self._groups:
            counts, others = _flat(self._groups[0])
            self.completion_lengths = np.zeros((len(chosen), 1 + counts.max(initial=0)), np.int32)
            self.completion_lengths[:, 0] = chosen
            self.completion_lengths[:, 1:][np.arange(counts.max(initial=0)) < counts[:, None]] = others
            self.comparisons = _flat(self._groups[1])[0].astype(np.int64) // 2

    def __len__(self) -> int:
        return self._table.num_rows

    @cached_property
    def completions(self) -> np.ndarray:  # [rows]
        """How many each row has."""
        return (self.completion_lengths > 0).sum(1)

    @cached_property
    def first_completions(self) -> np.ndarray:  # [rows]
        """The place of each row's first completion among those of all rows."""
        return np.cumsum(self.completions) - self.completions

    def __getitem__(self, i: int) -> Group:
        values = [np.from_dlpack(column[i].values) for column in self._rows]
        prompt, chosen, others = (ids.astype(np.int64) for ids in values[: len(PARTS)])
        chosen_mask, other_masks = (mask.astype(bool) for mask in values[len(PARTS) :])
        index = self.first_index + int(i) % len(self)
        if self._groups is None:
            several = len(others) > 0
            completions = (chosen, others)[: 1 + several]
            margins = None if self.margins is None or not several else self.margins[[i]]
            known = OF_A_PAIR if several else NO_COMPARISON
            return Group(prompt, completions, (chosen_mask, other_masks)[: 1 + several], known, margins, None, index)
        lengths, comparisons, margins, labels = (np.from_dlpack(column[i].values) for column in self._groups)
        cuts = np.cumsum(lengths)[:-1]
        completions, masks = (
            (first, *(np.split(rest, cuts) if len(lengths) else ()))
            for first, rest in ((chosen, others), (chosen_mask, other_masks))
        )
        known = comparisons.astype(np.int64).reshape(-1, 2)
        margins = None if self.margins is None else margins
        return Group(prompt, completions, masks, known, margins, labels.astype(bool) if len(labels) else None, index)

    def content(self) -> str:
        """Returns the SHA-256 of all tokens, masks, margins and comparisons, wherever the rows came from."""
        return remembered(self._paths, "pairs", self._content)

    def _content(self) -> str:
        digests = {name: hashlib.sha256() for name in (*PARTS, *MASKS, MARGIN)}
        for batch in self._table.to_batches():
            for name in (*PARTS, *MASKS):  # lists: where each ends decides, too
                column = batch.column(name)
                offsets = np.from_dlpack(column.offsets)
                digests[name].update(np.diff(offsets).astype(np.int64))
                digests[name].update(np.ascontiguousarray(np.from_dlpack(column.values)[offsets[0] : offsets[-1]]))
        digests[MARGIN].update(b"" if self.margins is None else np.ascontiguousarray(self.margins))
        for column in self._groups or ():
            for part in _flat(column):
                digests[MARGIN].update(np.ascontiguousarray(part))
        return hashlib.sha256("".join(digest.hexdigest() for digest in digests.values()).encode()).hexdigest()

    def token_ids(self) -> Iterator[tuple[np.ndarray, ...]]:
        """The prompt and the completions of every row in turn, int32 each, without a copy."""
        if self._groups is None:
            for prompt, chosen, rejected in self._token_parts():
                yield (prompt, chosen, rejected) if len(rejected) else (prompt, chosen)
            return
        lengths = iter(self.completion_lengths)
        for prompt, chosen, others in self._token_parts():
            of_others = next(lengths)[1:]
            cuts = np.cumsum(of_others[of_others > 0])
            yield prompt, chosen, *np.split(others, cuts)[: len(cuts)]

    def _token_parts(self) -> Iterator[tuple[np.ndarray, ...]]:
        for batch in self._table.to_batches():
            lists = [batch.column(part) for part in PARTS]
            values = [np.from_dlpack(column.values) for column in lists]
            offsets = np.stack([np.from_dlpack(column.offsets) for column in lists], axis=1)
            for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
                yield tuple(ids[a:b] for ids, a, b in zip(values, start, stop, strict=True))

    def _whole(self, column: str) -> np.ndarray:
        return np.concatenate([np.from_dlpack(chunk) for chunk in self._table.column(column).chunks])

    def location(self, i: int) -> str:
        """ "file:row" of the raw row."""
        return str(Location(self._files[self._table["file"][i].as_py()], self._table["row"][i].as_py()))


def _is_plain(group: Group) -> bool:
    """Tells whether a row without more says it all: a pair whose first is better, or one completion alone."""
    expected = OF_A_PAIR if len(group.completions) == 2 else NO_COMPARISON
    return group.labels is None and len(group.completions) <= 2 and np.array_equal(group.comparisons, expected)


def _end_to_end(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0, np.int64)


def _flat(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the lengths of lists and their values end to end."""
    chunks = [chunk for chunk in column.chunks if len(chunk)]
    lengths = [np.diff(np.from_dlpack(chunk.offsets)) for chunk in chunks]
    return np.concatenate(lengths), np.concatenate([np.from_dlpack(chunk.flatten()) for chunk in chunks])


# Arrays are made from bytes and read through DLPack: `pa.array` and `to_numpy` import pandas, which takes a second.


def _lists(arrays: Sequence[np.ndarray], kind: type[np.integer]) -> pa.ListArray:
    offsets = np.cumsum([0, *map(len, arrays)])
    return pa.ListArray.from_arrays(_numbers(offsets, np.int32), _numbers(np.concatenate(arrays), kind))


def _numbers(values: Sequence[float] | np.ndarray, kind: type[np.number]) -> pa.Array:
    data = np.asarray(values, dtype=kind)
    return pa.Array.from_buffers(pa.from_numpy_dtype(kind), len(data), [None, pa.py_buffer(data)])
