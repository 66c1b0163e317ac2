"""A data source -> tokenised pairs on disk, once: later runs, ranks and nodes find them by a digest.

The rank with `build` tokenises under a file lock. The others watch for the finished folder, which appears by one
rename; they enter no collective, so nothing times out while millions of rows are read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from filelock import FileLock

from dpo_ds.batch import PAIR
from dpo_ds.data.census import Census
from dpo_ds.data.dataset import CENSUS, PairDataset, PairWriter
from dpo_ds.data.formats import BadRow, Conversation, Location, Row, check_name, detect, read
from dpo_ds.data.sources import Files, HuggingFace, open_source
from dpo_ds.data.tokenize import PairTokenizer, fingerprint
from dpo_ds.errors import ConfigError, DataError

FORMAT_VERSION = 1  # of the cache: raise it when the same rows would give other tokens or columns
BATCH = 1000  # rows tokenised together
POLL_SECONDS = 0.2
WAIT_SECONDS = 12 * 3600  # for the rank that tokenises
NOTHING_LEFT = "no trained token left after the cut"

logger = logging.getLogger(__name__)


class Options(Protocol):
    """The run config's data section, as far as it is read here."""

    format: str
    columns: Mapping[str, str]
    max_length: int
    max_prompt_length: int
    limit: int | None
    on_bad_row: str


def prepare(
    source: str | Sequence[str | Mapping[str, Any]],
    *,
    options: Options,
    tokenizer: Any,
    sides: tuple[str, ...] = PAIR,
    split: str = "train",
    build: bool = True,
) -> PairDataset:
    """The tokenised pairs of `source`: a path or Hub id, or a list of them or of {"path", "weight"}.

    split, "train" or "eval", picks among the splits of a folder or Hub data set. Raises ConfigError, ModelError or
    DataError for what the user can mend; TimeoutError where `build` is false and nobody finishes within WAIT_SECONDS.
    """
    check_name(options.format, sides)
    if options.on_bad_row not in ("error", "skip"):
        raise ConfigError(f"data.on_bad_row is {options.on_bad_row!r}; it must be error or skip")
    tokenize = PairTokenizer(tokenizer, options.max_length, options.max_prompt_length, sides)
    if options.limit is not None and options.limit < 1:
        raise ConfigError(f"data.limit is {options.limit}; it must be at least 1, or null for all rows")
    paths, weights = _items(source)
    sources = [open_source(path, split) for path in paths]
    folder = cache_root() / _digest(sources, options, sides, tokenizer)
    if build:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                _build(folder, _Reader(sources, paths, options, sides), tokenize)
    else:
        wait_for(folder)
    return PairDataset(folder, weights)


def cache_root() -> Path:
    return Path(os.environ.get("DPO_DS_CACHE") or "~/.cache/dpo_ds").expanduser() / "tokenized"


@dataclass
class _Reader:
    """Rows as conversations, in batches; counts the others or raises, as `on_bad_row` says."""

    sources: Sequence[Files | HuggingFace]
    paths: Sequence[str]
    options: Options
    sides: tuple[str, ...]
    census: Census = field(default_factory=Census)
    formats: list[str] = field(default_factory=list)

    def batches(self, i: int) -> Iterator[list[tuple[Location, Conversation]]]:
        """The conversations of source `i`; its format is decided once, on the first row that shows one."""
        limit = None if self.options.limit is None else self.options.limit - self.census.rows_read
        rows = islice(self.sources[i].rows(), limit)
        before, name = self.census.rows_read, self.options.format
        while raw := list(islice(rows, BATCH)):
            batch = []
            for location, values in raw:
                self.census.rows_read += 1
                try:
                    if isinstance(values, BadRow):
                        raise values
                    row = Row(values, self.options.columns)
                    name = detect(row, self.sides) if name == "auto" else name
                    batch.append((location, read(row, name, self.sides)))
                except BadRow as error:
                    self.bad(location, error)
            yield batch
        if limit == 0:  # used up by the sources before
            return
        if self.census.rows_read == before:
            raise DataError(f"{self.paths[i]}: holds no row; a data set needs at least one")
        if name not in self.formats:
            self.formats.append(name)

    def bad(self, location: Location, error: BadRow) -> None:
        if self.options.on_bad_row == "error":
            raise error.at(location) from None
        self.census.drop(location, error.reason, str(error))


def _build(folder: Path, reader: _Reader, tokenize: PairTokenizer) -> None:
    """Writes beside `folder` and renames; what an earlier, killed build left there is cleared."""
    work = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        census = _write(work, reader, tokenize)
        (work / CENSUS).write_text(json.dumps(census))
    except BaseException:
        shutil.rmtree(work)
        raise
    work.rename(folder)


def _write(work: Path, reader: _Reader, tokenize: PairTokenizer) -> dict[str, Any]:
    census, ends = reader.census, []
    lengths: dict[str, list[np.ndarray]] = {part: [] for part in ("prompt", *reader.sides)}
    with PairWriter(work) as writer:
        for i in range(len(reader.sources)):
            for batch in reader.batches(i):
                pairs, locations = [], []
                for (location, conversation), result in zip(batch, tokenize([c for _, c in batch]), strict=True):
                    if isinstance(result, BadRow):
                        reader.bad(location, result)
                    elif not all(len(result.pair.target_positions(side)) for side in reader.sides):
                        census.drop(location, NOTHING_LEFT, NOTHING_LEFT)
                    else:
                        census.keep(result.prompt_cut, result.completions_cut, conversation.prompts_differ)
                        pairs.append(result.pair)
                        locations.append(location)
                if pairs:
                    writer.write(pairs, locations)
                    for part, counts in lengths.items():
                        counts.append(np.array([len(getattr(pair, part)) for pair in pairs], dtype=np.int32))
                if census.rows_read % (50 * BATCH) == 0:
                    logger.info("tokenised %d rows", census.rows_read)
            ends.append(writer.rows)
    if not writer.rows:
        raise DataError(_none_kept(reader))
    return {
        **census.summary({part: np.concatenate(counts) for part, counts in lengths.items()}),
        "format": ", ".join(reader.formats),
        "files": [name for source in reader.sources for name in source.names],
        "files_left_out": [str(name) for source in reader.sources for name in source.left_out],
        "location_files": writer.files,
        "source_ends": ends,
    }


def _none_kept(reader: _Reader) -> str:
    reasons = ", ".join(f"{reason} {count}" for reason, count in reader.census.dropped.most_common())
    first = reader.census.bad_rows[0]
    return (
        f"{', '.join(reader.paths)}: none of {reader.census.rows_read} rows can be used ({reasons}); "
        f"the first is {first['location']}: {first['reason']}"
    )


def _items(source: str | Sequence[str | Mapping[str, Any]]) -> tuple[list[str], list[float]]:
    items = [source] if isinstance(source, str) else list(source)
    if not items:
        raise ConfigError("data.train or data.eval is an empty list; name at least one path or Hub id")
    paths, weights = [], []
    for item in items:
        item = {"path": item} if isinstance(item, str) else dict(item)
        path, weight = item.pop("path", None), item.pop("weight", 1.0)
        if item or not isinstance(path, str):
            wrong = f"{', '.join(item)} is unknown" if item else f"the path is {path!r}"
            raise ConfigError(f"a data source is a path, or path and weight: {wrong}")
        if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 < weight < float("inf"):
            raise ConfigError(f"the weight of data source {path} is {weight!r}; it must be a number above 0")
        paths.append(path)
        weights.append(float(weight))
    return paths, weights


def _digest(sources: Sequence[Files | HuggingFace], options: Options, sides: tuple[str, ...], tokenizer: Any) -> str:
    wanted = [options.format, dict(options.columns), options.max_length, options.max_prompt_length]
    wanted += [options.limit, options.on_bad_row, sides]
    identities = [source.identity() for source in sources]
    text = json.dumps([FORMAT_VERSION, identities, wanted, fingerprint(tokenizer)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def wait_for(folder: Path) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not folder.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{folder} did not appear within {WAIT_SECONDS} s: is the rank that tokenises gone?")
        time.sleep(POLL_SECONDS)
