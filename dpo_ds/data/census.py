"""Counts what became of the rows while a data set is prepared; saved as data_census.json, shown as a few lines."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dpo_ds.data.formats.conversation import Conversation
from dpo_ds.data.rows import Location, shorten
from dpo_ds.data.tokenize import Tokenized

LISTED_BAD_ROWS = 300
MOST_COLUMNS = 1000
SHOWN = 12  # names in a line for the terminal
DIFFERENCE = 40  # characters of two texts from where they differ
TEMPLATE_LINES = {
    "prompts_rendered_otherwise": "the prompt differs from what generation writes; data.prompt_rendering chooses",
    "content_left_out": "the chat template leaves part of an answer out, so that it is not trained on",
}


@dataclass
class Census:
    """Counts rows; rows_read = rows kept + rows dropped. All else is of the rows kept.

    message_lists: rows that went through the chat template. prompts_rendered_otherwise: of these, how many have a
    prompt that generation would write otherwise; content_left_out: how many have an answer that the template does not
    show whole; first_of: the first row of each, as a line. groups: rows with more than two completions. desirable,
    undesirable: completions that a row says so of. ties,
    equal_completions: comparisons that are left out: both sides are equally good; they are equal after the cut, or
    nothing is left of one.
    empty_prompts: rows without a token before their completions. largest_token: the largest token id. longest: tokens
    of the longest prompt with one of its completions.
    """

    rows_read: int = 0
    rows_cut: int = 0
    prompts_cut: int = 0
    completions_cut: int = 0
    prompts_differ: int = 0
    message_lists: int = 0
    prompts_rendered_otherwise: int = 0
    content_left_out: int = 0
    groups: int = 0
    completions: int = 0
    comparisons: int = 0
    desirable: int = 0
    undesirable: int = 0
    ties: int = 0
    equal_completions: int = 0
    first_of: dict[str, str] = field(default_factory=dict)
    empty_prompts: int = 0
    largest_token: int = 0
    longest: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    bad_rows: list[dict[str, str]] = field(default_factory=list)
    columns: set[str] = field(default_factory=set)
    columns_used: set[str] = field(default_factory=set)

    def see(self, columns: Iterable[str], used: Iterable[str]) -> None:
        """Counts the columns of a row; no more than MOST_COLUMNS, of JSON rows that each have names of their own."""
        if len(self.columns) < MOST_COLUMNS:
            self.columns.update(columns)
            self.columns_used.update(used)

    @property
    def columns_not_used(self) -> list[str]:
        return sorted(self.columns - self.columns_used)

    def drop(self, location: Location, reason: str, problem: str) -> None:
        self.dropped[reason] += 1
        if len(self.bad_rows) < LISTED_BAD_ROWS:
            self.bad_rows.append({"location": str(location), "reason": problem})

    def keep(self, location: Location, tokenized: Tokenized, conversation: Conversation) -> None:
        group, prompt_cut, completions_cut, asked, left_out = tokenized
        if asked is not None:
            self.prompts_rendered_otherwise += 1
            self.first_of.setdefault("prompts_rendered_otherwise", f"{location}: {_difference(*asked)}")
        if left_out is not None:
            self.content_left_out += 1
            self.first_of.setdefault("content_left_out", f"{location}: {shorten(left_out)}")
        self.rows_cut += prompt_cut or completions_cut > 0
        self.prompts_cut += prompt_cut
        self.completions_cut += completions_cut
        self.prompts_differ += conversation.prompts_differ
        self.message_lists += not isinstance(conversation.prompt, str)
        self.groups += len(group.completions) > 2
        self.completions += len(group.completions)
        self.comparisons += len(group.comparisons)
        self.desirable += sum(conversation.labels or ())
        self.undesirable += len(conversation.labels or ()) - sum(conversation.labels or ())
        self.ties += conversation.ties
        self.equal_completions += len(conversation.comparisons) - len(group.comparisons)
        self.empty_prompts += len(group.prompt) == 0
        self.longest = max(self.longest, len(group.prompt) + max(map(len, group.completions)))
        for ids in (group.prompt, *group.completions):
            self.largest_token = max(self.largest_token, int(ids.max(initial=0)))

    def summary(self, lengths: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """JSON-serialisable; `lengths` are the token counts of the rows kept, by part."""
        dropped = sum(self.dropped.values())
        return {
            "rows_read": self.rows_read,
            "rows_kept": self.rows_read - dropped,
            "rows_cut": self.rows_cut,
            "prompts_cut": self.prompts_cut,
            "completions_cut": self.completions_cut,
            "rows_dropped": dropped,
            "dropped": dict(self.dropped.most_common()),
            "bad_rows": self.bad_rows,
            "bad_rows_not_listed": dropped - len(self.bad_rows),
            "columns_not_used": self.columns_not_used,
            "prompts_differ": self.prompts_differ,
            "message_lists": self.message_lists,
            "prompts_rendered_otherwise": self.prompts_rendered_otherwise,
            "content_left_out": self.content_left_out,
            "groups": self.groups,
            "completions": self.completions,
            "comparisons": self.comparisons,
            "desirable": self.desirable,
            "undesirable": self.undesirable,
            "ties": self.ties,
            "equal_completions": self.equal_completions,
            "first_of": self.first_of,
            "empty_prompts": self.empty_prompts,
            "largest_token": self.largest_token,
            "longest": self.longest,
            "tokens": {part: _percentiles(counts) for part, counts in lengths.items()},
        }


def _percentiles(counts: np.ndarray) -> dict[str, float]:
    p50, p90, p99 = (float(p) for p in np.percentile(counts, [50, 90, 99]))
    return {"p50": p50, "p90": p90, "p99": p99, "max": int(counts.max()), "mean": float(counts.mean())}


def format_census(census: Mapping[str, Any]) -> str:
    """A few aligned lines for the terminal."""
    kept, read = census["rows_kept"], census["rows_read"]
    lines = [f"{read:>9,} rows read from {_files(census['files'])}, format {census['format']}", f"{kept:>9,} kept"]
    if "gathered" in census:
        what = f"{census['gathered']:,} rows of one prompt gathered into {census['gathered_into']:,}"
        lines.append(f"{census['gathered_into']:>9,} groups: {what}; which comparisons share a batch is another choice")
    if census.get("groups"):
        known = f"{census['completions']:,} completions in all, {_count(census['comparisons'], 'comparison')}"
        if census["ties"] + census["equal_completions"]:
            known += f" (left out: {census['ties']:,} tied, {census['equal_completions']:,} of equal ones)"
        lines.append(f"{census['groups']:>9,} of these with more than two completions; {known}")
    if census.get("desirable") or census.get("undesirable"):
        lines.append(f"{census['desirable']:>9,} of these desirable, {census['undesirable']:,} not")
    if census["prompts_differ"]:
        lines.append(f"{census['prompts_differ']:>9,} of these differ before the last turn")
    for key, what in TEMPLATE_LINES.items():
        if census.get(key):
            lines.append(f"{census[key]:>9,} of these: {what} (first: {census['first_of'][key]})")
    if census.get("empty_prompts"):
        what = "nothing stands before their completions (no prompt, no BOS), whose first token so has no log-prob"
        lines.append(f"{census['empty_prompts']:>9,} of these: {what}")
    if census["rows_cut"]:
        cuts = f"{_count(census['prompts_cut'], 'prompt')}, {_count(census['completions_cut'], 'completion')}"
        lines.append(f"{census['rows_cut']:>9,} of these cut to the maximum length ({cuts})")
    if census["rows_dropped"]:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in census["dropped"].items())
        first = listed([census["bad_rows"][0]["location"]])
        lines.append(f"{census['rows_dropped']:>9,} dropped: {reasons} (first: {first})")
    for what, key in (("columns not used", "columns_not_used"), ("not read", "files_left_out")):
        if census.get(key):
            lines.append(f"{'':>9} {what}: {listed(census[key])}")
    columns = ("p50", "p90", "p99", "max", "mean")
    lines.append(f"{'tokens':>9}  " + "".join(f"{column:>8}" for column in columns))
    for part, numbers in census["tokens"].items():
        lines.append(f"{part:>9}  " + "".join(f"{numbers[column]:>8,.0f}" for column in columns))
    return "\n".join(lines)


def _difference(as_conversation: str, as_generation: str) -> str:
    """Shows where two texts part."""
    at = len(os.path.commonprefix([as_conversation, as_generation]))
    ours, theirs = (text[at : at + DIFFERENCE] for text in (as_conversation, as_generation))
    return f"at character {at:,} {ours!r}, in generation {theirs!r}"


def listed(names: Sequence[str]) -> str:
    """Returns names for the terminal: the first few, on one line whatever is in them."""
    shown = [name if name.isprintable() else ascii(name) for name in names[:SHOWN]]
    return ", ".join(shown) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _files(files: list[str]) -> str:
    return listed(files) if len(files) == 1 else f"{len(files)} files ({listed(files[:1])}, ...)"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
