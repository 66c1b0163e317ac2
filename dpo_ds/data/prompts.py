"""Prompts to complete: rows with a `prompt`, the prompts of preference data, or a text file with one a line."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from dpo_ds.batch import CHOSEN_ONLY, PAIR
from dpo_ds.data.census import Census, listed
from dpo_ds.data.chat.render import render_prompt
from dpo_ds.data.files import Rows
from dpo_ds.data.formats import ANSWERS, check_columns, check_name, detect, read
from dpo_ds.data.formats.joining import with_system
from dpo_ds.data.reading import Intake
from dpo_ds.data.rows import BadRow, Location, Row
from dpo_ds.data.sources import Files, HuggingFace, open_source
from dpo_ds.data.tokenize import GroupTokenizer
from dpo_ds.errors import DataError

TEXT = ".txt"
COMPLETED = ("chosen", "rejected", *ANSWERS, "conversations", "instruction", "messages")  # more than a prompt
UNLIMITED = 1 << 40  # tokens: the prompt's own limit decides


class Options(Protocol):
    """The run config's data section, as far as prompts go."""

    format: str
    columns: Mapping[str, str]
    max_prompt_length: int
    on_bad_row: str
    ignore_columns: Sequence[str]


class Prompt(NamedTuple):
    """text: whole, chat template applied; ids: its tokens, int64, cut from the start; location: "file:row"."""

    text: str
    ids: np.ndarray
    location: str


@dataclass(frozen=True)
class TextFile:
    """Gives each line of a file as a row with a prompt."""

    path: Path
    left_out: tuple = ()

    def rows(self, wanted: Collection[str] | None = None) -> Rows:
        """Yields lines without their end; blank ones are none."""
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                location = Location(str(self.path), number)
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    problem = f"not UTF-8 at byte {error.start} of the line; save the file as UTF-8"
                    yield location, BadRow("not UTF-8", problem)
                    continue
                if text.strip():
                    yield location, {"prompt": text}


@dataclass
class Prompts:
    """In the order of the source. left_out: files and splits beside those that were read."""

    rows: list[Prompt] = field(default_factory=list)
    census: Census = field(default_factory=Census)
    left_out: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """One line for the terminal."""
        counts = [f"{len(self.rows):,} prompts"]
        if self.census.prompts_cut:
            counts.append(f"{self.census.prompts_cut:,} cut from their start")
        for reason, count in self.census.dropped.most_common():
            counts.append(f"{count:,} dropped: {reason}")
        first = f" (first: {self.census.bad_rows[0]['location']})" if self.census.bad_rows else ""
        unused = f"; columns not used: {listed(self.census.columns_not_used)}" if self.census.columns_not_used else ""
        left_out = f"; not read: {listed(self.left_out)}" if self.left_out else ""
        return f"{', '.join(counts)}{first}{unused}{left_out}"


def read_prompts(
    source: str | Sequence[str | Mapping[str, Any]],
    *,
    options: Options,
    tokenizer: Any,
    split: str = "train",
    limit: int | None = None,
) -> Prompts:
    """The prompts of `source`: a path or Hub id, or a list of them or of {"path", "weight"}.

    A row that has a prompt and no completion, or messages without an answer, is taken as it is: text verbatim, messages
    through the chat template. Of other rows the prompt is that of training (dpo_ds/data/formats/). A weight is how
    often a source's prompts come: 0.5 is the first half. limit: of rows read. What comes twice is completed twice.

    Raises:
        UserError: nothing to read, a row that is wrong under on_bad_row error, no prompt at all.
    """
    check_name(options.format, CHOSEN_ONLY)
    check_columns(options.columns)
    tokenize = GroupTokenizer(tokenizer, UNLIMITED, options.max_prompt_length)
    items = [source] if isinstance(source, str) else source
    items = [{"path": item} if isinstance(item, str) else item for item in items]
    intake = Intake(options.columns, options.on_bad_row, options.ignore_columns)
    prompts = Prompts(census=intake.census)
    for item in items:
        source = _open(item["path"], split)
        prompts.left_out += map(str, source.left_out)
        found = list(_prompts_of(source, intake, options, tokenize, limit))
        wanted = round(item.get("weight", 1.0) * len(found))
        prompts.rows += [found[i % len(found)] for i in range(wanted)]
    if not prompts.rows:
        bad = prompts.census.bad_rows[:1]
        why = f"; the first row: {bad[0]['location']}: {bad[0]['reason']}" if bad else ""
        names = ", ".join(item["path"] for item in items)
        raise DataError(f"{names}: gives no prompt out of {prompts.census.rows_read} rows{why}")
    return prompts


def _prompts_of(
    source: TextFile | Files | HuggingFace, intake: Intake, options: Options, tokenize: GroupTokenizer,
    limit: int | None,
) -> Iterator[Prompt]:  # fmt: skip
    census, name = intake.census, options.format
    rows = islice(source.rows(intake.wanted()), None if limit is None else limit - census.rows_read)

    def text_of(row: Row) -> str:
        nonlocal name
        bare = _bare_field(row)
        if bare is not None:
            return _bare_prompt(row, bare, tokenize, census)
        name = detect(row, CHOSEN_ONLY) if name == "auto" else name
        return _prompt(row, name, tokenize, census)

    for batch in intake.batches(rows, text_of):
        texts = [text for _, text in batch]
        for (location, text), (ids, cut) in zip(batch, tokenize.prompts(texts), strict=True):
            census.prompts_cut += cut
            if len(ids):
                yield Prompt(text, ids, str(location))
            else:
                problem = "the prompt is empty and the tokenizer adds no BOS; a model needs a token to go on from"
                intake.bad(location, BadRow("empty prompt", problem))


def _open(path: str, split: str) -> TextFile | Files | HuggingFace:
    local = Path(path).expanduser()
    return TextFile(local) if local.suffix == TEXT and local.is_file() else open_source(path, split)


def _bare_field(row: Row) -> str | None:
    """Finds where the prompt of a row without a completion stands."""
    there = [field for field in COMPLETED if field in row]
    if there == ["messages"] and isinstance(row.get("messages"), list):
        roles = [message["role"] for message in row.messages("messages")]
        return "messages" if roles and "assistant" not in roles else None
    return None if there else "prompt"


def _bare_prompt(row: Row, field: str, tokenize: GroupTokenizer, census: Census) -> str:
    if row.is_text(field):
        return row.text(field)
    census.message_lists += 1
    return render_prompt(tokenize.tokenizer, with_system(row, field, row.messages(field)), row.tools())


def _prompt(row: Row, name: str, tokenize: GroupTokenizer, census: Census) -> str:
    """As training reads it: what both sides begin with, where the row has two."""
    conversation = read(row, name, PAIR if row.get("rejected") is not None else CHOSEN_ONLY)
    if isinstance(conversation.prompt, str):
        return conversation.prompt
    census.message_lists += 1
    return render_prompt(tokenize.tokenizer, conversation.prompt, conversation.tools)
