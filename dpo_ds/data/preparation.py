"""Turns a data source into tokenised groups on disk, once: later runs, ranks and nodes find them by a digest."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dpo_ds.batch import PAIR, Group
from dpo_ds.cluster.derived import cache_root, derive
from dpo_ds.data.census import Census
from dpo_ds.data.dataset import CENSUS, GroupDataset, GroupWriter
from dpo_ds.data.formats import Conversation, check_columns, check_name, check_renamed, detect, read
from dpo_ds.data.gathering import gathered
from dpo_ds.data.reading import Intake
from dpo_ds.data.rows import BadRow, Location, Row
from dpo_ds.data.sources import Files, HuggingFace, open_source
from dpo_ds.data.tokenize import GroupTokenizer, Tokenized, fingerprint
from dpo_ds.errors import ConfigError, DataError

FORMAT_VERSION = 6  # of the cache: raise it when the same rows would give other tokens, columns or counts
EQUAL, EQUAL_IN_TEMPLATE = "equal after the cut", "equal after the chat template"
NOTHING_LEFT = "no trained token left after the cut"

TOLD = 50_000  # rows between two lines that count them
logger = logging.getLogger(__name__)


class Options(Protocol):
    """The run config's data section, as far as it is read here; the config has checked ranges and choices."""

    format: str
    columns: Mapping[str, str]
    max_length: int
    max_prompt_length: int
    limit: int | None
    on_bad_row: str
    ignore_columns: Sequence[str]
    prompt_rendering: str


def prepare(
    source: str | Sequence[str | Mapping[str, Any]],
    *,
    options: Options,
    tokenizer: Any,
    sides: tuple[str, ...] = PAIR,
    split: str = "train",
    build: bool = True,
    margin_column: str | None = None,
) -> GroupDataset:
    """The tokenised groups of `source`: a path or Hub id, or a list of them or of {"path", "weight"}.

    split, "train" or "eval", picks among the splits of a folder or Hub data set. margin_column: the raw column that
    says how much better chosen is; null and absent are mistakes in a row. Raises ConfigError, ModelError or DataError
    for what the user can mend, DataError too where `build` is false and the rank that tokenises has ended
    without a data set; TimeoutError where it does not finish.
    """
    check_name(options.format, sides)
    check_columns(options.columns)
    limits = options.max_length, options.max_prompt_length
    tokenize = GroupTokenizer(tokenizer, *limits, options.prompt_rendering)
    items = [source] if isinstance(source, str) else source
    items = [{"path": item} if isinstance(item, str) else item for item in items]
    paths = [item["path"] for item in items]
    sources = [open_source(path, split) for path in paths]
    group = getattr(options, "group", "none")  # not of the data that commands evaluate on
    digest = _digest(sources, options, sides, tokenizer, margin_column)
    folder = cache_root() / "tokenized" / digest

    def fill(work: Path) -> None:
        _build(work, Reader(sources, paths, options, sides, margin_column), tokenize)
        if _digest(sources, options, sides, tokenizer, margin_column) != digest:
            raise DataError(f"{', '.join(paths)}: changed while it was read; start again when it is whole")

    check_group(group, sides)
    derive(folder, "the tokenised data", fill, build)
    data = GroupDataset(folder, [item.get("weight", 1.0) for item in items])
    data.census["files_left_out"] = [str(name) for source in sources for name in source.left_out]  # as of now
    return data


def check_group(group: str, sides: tuple[str, ...]) -> None:
    """Raises ConfigError for data.group where rows have nothing that would be put together."""
    if group == "prompt" and sides != PAIR:
        raise ConfigError("data.group prompt: for rows that compare or label completions; sft has none, leave it out")


@dataclass
class Reader:
    """Reads the sources' rows as conversations, in batches."""

    sources: Sequence[Files | HuggingFace]
    paths: Sequence[str]
    options: Options
    sides: tuple[str, ...]
    margin_column: str | None = None
    formats: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.intake = Intake(self.options.columns, self.options.on_bad_row, self.options.ignore_columns)

    @property
    def census(self) -> Census:
        return self.intake.census

    def batches(self, i: int) -> Iterator[list[tuple[Location, Conversation]]]:
        """Yields the conversations of source `i`; its format is decided once, on the first row that shows one."""
        limit = None if self.options.limit is None else self.options.limit - self.census.rows_read
        wanted = self.intake.wanted(*filter(None, [self.margin_column]))
        before, name = self.census.rows_read, self.options.format

        def parse(row: Row) -> Conversation:
            nonlocal name
            name = detect(row, self.sides) if name == "auto" else name
            return read(row, name, self.sides, self.margin_column)

        yield from self.intake.batches(islice(self.sources[i].rows(wanted), limit), parse)
        if limit == 0:  # used up by the sources before
            return
        if self.census.rows_read == before:
            raise DataError(f"{self.paths[i]}: holds no row; a data set needs at least one")
        if name not in self.formats:
            self.formats.append(name)


def _build(work: Path, reader: Reader, tokenize: GroupTokenizer) -> None:
    """Fills a folder with the groups and the census."""
    census = _write(work, reader, tokenize)
    (work / CENSUS).write_text(json.dumps(census))
    if getattr(reader.options, "group", "none") == "prompt":
        _gather(work, census, reader.margin_column is not None)


def _gather(work: Path, census: dict[str, Any], with_margins: bool) -> None:
    """Puts rows of one prompt together, within each source."""
    rows = work / "rows"
    rows.mkdir()
    for path in [path for path in work.iterdir() if path.is_file()]:
        path.rename(rows / path.name)
    before, written, ends, sizes = GroupDataset(rows, [1.0] * len(census["source_ends"])), 0, [], []
    with GroupWriter(work, with_margins) as writer:
        for start, stop, _ in before.sources:
            prompts = (prompt.tobytes() for prompt, *_ in islice(before.token_ids(), start, stop))
            for first, group in gathered(prompts, lambda i, start=start: before[start + i]):
                file, _, row = before.location(start + first).rpartition(":")
                writer.write([group], [Location(file, int(row))])
                sizes.append((len(group.completions), len(group.comparisons)))
                written += 1
            ends.append(written)
    completions, comparisons = np.array(sizes).T
    census |= {
        "gathered": len(before), "gathered_into": written, "groups": int((completions > 2).sum()),
        "completions": int(completions.sum()), "comparisons": int(comparisons.sum()),
        "source_ends": ends, "location_files": writer.files,
    }  # fmt: skip
    shutil.rmtree(rows)
    (work / CENSUS).write_text(json.dumps(census))


def _write(work: Path, reader: Reader, tokenize: GroupTokenizer) -> dict[str, Any]:
    census, ends, told = reader.census, [], 0
    lengths: dict[str, list[int]] = {part: [] for part in ("prompt", *PAIR)}
    with GroupWriter(work, reader.margin_column is not None) as writer:
        for i in range(len(reader.sources)):
            for batch in reader.batches(i):
                groups, locations = [], []
                for (location, conversation), result in zip(batch, tokenize([c for _, c in batch]), strict=True):
                    if isinstance(result, BadRow):
                        reader.intake.bad(location, result)
                        continue
                    result, reason = usable(result)
                    if reason is not None:
                        census.drop(location, reason, reason)
                        continue
                    census.keep(location, result, conversation)
                    groups.append(result.group)
                    locations.append(location)
                    lengths["prompt"].append(len(result.group.prompt))
                    for side, completion in zip(_sides(result.group), result.group.completions, strict=True):
                        lengths[side].append(len(completion))
                if groups:
                    writer.write(groups, locations)
                if census.rows_read // TOLD > told:
                    told = census.rows_read // TOLD
                    logger.info("tokenised %d rows", census.rows_read)
            ends.append(writer.rows)
    check_renamed(reader.options.columns, census.columns)
    if not writer.rows:
        raise DataError(_none_kept(reader))
    return {
        **census.summary({part: np.array(counts, dtype=np.int32) for part, counts in lengths.items() if counts}),
        "format": ", ".join(reader.formats),
        "files": [name for source in reader.sources for name in source.names],
        "location_files": writer.files,
        "source_ends": ends,
    }


def usable(result: Tokenized) -> tuple[Tokenized, str | None]:
    """Returns the group without comparisons that say nothing after the cut, and why nothing is left of it, if so: one
    of equal completions, or of one without a trained token. A completion that no comparison is left of is left out.
    """
    group, comparisons = result.group, result.group.comparisons
    has_target = np.array([len(group.target_positions(i)) > 0 for i in range(len(group.completions))])
    equal = np.array([np.array_equal(*(group.completions[i] for i in two)) for two in comparisons], bool)
    keep = has_target[comparisons].all(1) & ~equal
    if keep.all() and has_target.all():
        return result, None
    if not keep.any():
        if not has_target.all() or not len(comparisons):
            return result, NOTHING_LEFT
        return result, EQUAL if result.completions_cut else EQUAL_IN_TEMPLATE  # it trims, or leaves out
    used = np.unique(comparisons[keep])
    group = replace(
        group,
        completions=tuple(group.completions[i] for i in used),
        masks=tuple(group.masks[i] for i in used),
        comparisons=np.searchsorted(used, comparisons[keep]),
        margins=None if group.margins is None else group.margins[keep],
    )
    return result._replace(group=group), None


def _sides(group: Group) -> list[str]:
    """Returns where each completion's length is counted: the first as chosen, or all that are said to be desirable."""
    is_chosen = group.labels if group.labels is not None else np.arange(len(group.completions)) == 0
    return [PAIR[0] if first else PAIR[1] for first in is_chosen]


def _none_kept(reader: Reader) -> str:
    reasons = ", ".join(f"{reason} {count}" for reason, count in reader.census.dropped.most_common())
    first = reader.census.bad_rows[0]
    return (
        f"{', '.join(reader.paths)}: none of {reader.census.rows_read} rows can be used ({reasons}); "
        f"the first is {first['location']}: {first['reason']}"
    )


def _digest(
    sources: Sequence[Files | HuggingFace], options: Options, sides: tuple[str, ...], tokenizer: Any,
    margin_column: str | None,
) -> str:  # fmt: skip
    wanted = [options.format, dict(options.columns), options.max_length, options.max_prompt_length]
    wanted += [options.limit, options.on_bad_row, sorted(options.ignore_columns), sides, options.prompt_rendering]
    wanted += filter(None, [margin_column])
    wanted += [{"group": options.group}] if getattr(options, "group", "none") != "none" else []
    identities = [source.identity() for source in sources]
    text = json.dumps([FORMAT_VERSION, identities, wanted, fingerprint(tokenizer)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
