"""Tokenised pairs on disk: one Arrow stream, memory-mapped, so that memory stays flat as data grows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa

from dpo_ds.batch import PreferencePair
from dpo_ds.cluster.derived import remembered
from dpo_ds.data.rows import Location

PARTS = ("prompt", "chosen", "rejected")
MASKS = ("chosen_mask", "rejected_mask")
MARGIN = "margin"  # a column of its own, only where one was asked for
ARROW, CENSUS = "pairs.arrow", "census.json"
SCHEMA = pa.schema(
    [(part, pa.list_(pa.int32())) for part in PARTS]
    + [(mask, pa.list_(pa.uint8())) for mask in MASKS]
    + [(f"{part}_length", pa.int32()) for part in PARTS]
    + [("file", pa.int32()), ("row", pa.int64())]
)


class PairWriter:
    """Writes pairs in batches; `file` of a location is kept as an index into `files`."""

    def __init__(self, folder: Path, with_margins: bool = False):
        self.files: list[str] = []
        self._schema = SCHEMA.append(pa.field(MARGIN, pa.float32())) if with_margins else SCHEMA
        self.rows = 0
        self._sink = pa.OSFile(str(folder / ARROW), "wb")
        self._stream = pa.ipc.new_stream(self._sink, self._schema)

    def __enter__(self) -> PairWriter:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stream.close()
        self._sink.close()

    def write(
        self, pairs: Sequence[PreferencePair], locations: Sequence[Location], margins: Sequence[float] = ()
    ) -> None:
        """margins: one a pair if the writer was made `with_margins`."""
        columns = [_lists([getattr(pair, part) for pair in pairs], np.int32) for part in PARTS]
        columns += [_lists([getattr(pair, mask) for pair in pairs], np.uint8) for mask in MASKS]
        columns += [_numbers([len(getattr(pair, part)) for pair in pairs], np.int32) for part in PARTS]
        columns.append(_numbers([self._file(location.file) for location in locations], np.int32))
        columns.append(_numbers([location.row for location in locations], np.int64))
        columns += [_numbers(margins, np.float32)] if MARGIN in self._schema.names else []
        self._stream.write_batch(pa.RecordBatch.from_arrays(columns, schema=self._schema))
        self.rows += len(pairs)

    def _file(self, name: str) -> int:
        if name not in self.files[-1:]:  # rows come file by file
            self.files.append(name)
        return len(self.files) - 1


class PairDataset:
    """A prepared data set, in the order of its source.

    prompt_lengths, chosen_lengths, rejected_lengths: tokens, int32 [rows]. margins: float32 [rows], None if no column
    of them was asked for. sources: (start, stop, weight), the rows of each source given. census: see `Census`. digest:
    of the files, options and tokenizer it was made from, no weights.
    """

    def __init__(self, folder: Path, weights: Iterable[float]):
        self.census: dict[str, Any] = json.loads((folder / CENSUS).read_text())
        self.digest = folder.name
        self.first_index = 0  # among all rows of a run: those of evaluation data count on from the training data's
        self._files: list[str] = self.census.pop("location_files")
        ends = self.census.pop("source_ends")
        self.sources = list(zip([0, *ends[:-1]], ends, weights, strict=True))
        self._path = folder / ARROW
        self._table = pa.ipc.open_stream(pa.memory_map(str(self._path))).read_all()
        self._rows = [self._table.column(name) for name in (*PARTS, *MASKS)]
        self.prompt_lengths, self.chosen_lengths, self.rejected_lengths = (
            self._whole(f"{part}_length") for part in PARTS
        )
        self.margins = self._whole(MARGIN) if MARGIN in self._table.column_names else None

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, i: int) -> PreferencePair:
        values = [np.from_dlpack(column[i].values) for column in self._rows]
        prompt, chosen, rejected = (ids.astype(np.int64) for ids in values[: len(PARTS)])
        chosen_mask, rejected_mask = (mask.astype(bool) for mask in values[len(PARTS) :])
        index = self.first_index + int(i) % len(self)
        return PreferencePair(prompt, chosen, rejected, chosen_mask, rejected_mask, index)

    def content(self) -> str:
        """Returns the SHA-256 of all tokens, masks and margins, wherever the rows came from."""
        return remembered([self._path], "pairs", self._content)

    def _content(self) -> str:
        digests = {name: hashlib.sha256() for name in (*PARTS, *MASKS, MARGIN)}
        for batch in self._table.to_batches():
            for name in (*PARTS, *MASKS):  # lists: where each ends decides, too
                column = batch.column(name)
                offsets = np.from_dlpack(column.offsets)
                digests[name].update(np.diff(offsets).astype(np.int64))
                digests[name].update(np.ascontiguousarray(np.from_dlpack(column.values)[offsets[0] : offsets[-1]]))
        digests[MARGIN].update(b"" if self.margins is None else np.ascontiguousarray(self.margins))
        return hashlib.sha256("".join(digest.hexdigest() for digest in digests.values()).encode()).hexdigest()

    def token_ids(self) -> Iterator[tuple[np.ndarray, ...]]:
        """prompt, chosen and rejected of every row in turn, int32 each, without a copy."""
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


# Arrays are made from bytes and read through DLPack: `pa.array` and `to_numpy` import pandas, which takes a second.


def _lists(arrays: Sequence[np.ndarray], kind: type[np.integer]) -> pa.ListArray:
    offsets = np.cumsum([0, *map(len, arrays)])
    return pa.ListArray.from_arrays(_numbers(offsets, np.int32), _numbers(np.concatenate(arrays), kind))


def _numbers(values: Sequence[float] | np.ndarray, kind: type[np.number]) -> pa.Array:
    data = np.asarray(values, dtype=kind)
    return pa.Array.from_buffers(pa.from_numpy_dtype(kind), len(data), [None, pa.py_buffer(data)])
