"""Goes through the rows of a source: what a reader makes of each, and what becomes of those that it cannot use."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from dpo_ds.data.census import Census
from dpo_ds.data.files import Rows
from dpo_ds.data.formats import FIELDS
from dpo_ds.data.rows import BadRow, Location, Row, shorten, unreadable

BATCH = 1000  # rows that are read, then tokenised together
LETTERS = 1 << 23  # of a batch, but for a longer row: a tokenizer takes some 100 bytes for each
# Columns of public data sets that change what is said, to whom, or what of it is better: never dropped in silence.
MEANINGFUL = frozenset(
    "system system_prompt history context input tools functions images image videos video audios audio "
    "chosen_score rejected_score".split()
)
T = TypeVar("T")


def usable(
    rows: Rows, columns: Mapping[str, str], parse: Callable[[Row], T], bad: Callable[[Location, BadRow], None]
) -> Iterator[tuple[Location, T]]:
    """Yields what `parse` makes of each row under our names (`columns` maps ours to theirs).

    bad: told of the rows that the source or `parse` finds wrong; it raises, or counts them.
    """
    for location, values in rows:
        try:
            if isinstance(values, BadRow):
                raise values
            parsed = parse(Row(values, columns))
        except BadRow as error:
            bad(location, error)
        except RecursionError as error:
            bad(location, unreadable(error))
        else:
            yield location, parsed


@dataclass
class Intake:
    """Takes rows in as data.columns, data.on_bad_row and data.ignore_columns say, and counts them in the census."""

    columns: Mapping[str, str]
    on_bad_row: str
    ignored: Collection[str] = ()
    census: Census = field(default_factory=Census)

    def batches(self, rows: Rows, parse: Callable[[Row], T]) -> Iterator[list[tuple[Location, T]]]:
        """Yields what `parse` makes of BATCH rows or LETTERS at a time, less those that are bad.

        A row is bad too where `parse` has not read a column of MEANINGFUL that holds something.
        """

        def checked(row: Row) -> T:
            parsed = parse(row)
            unused = row.values.keys() - row.used
            if lost := sorted(name for name in unused & MEANINGFUL if row.values[name] and name not in self.ignored):
                problem = f"{lost[0]!r} is {shorten(row.values[lost[0]])}, which nothing here can use"
                raise BadRow("meaning not used", f"{problem}; leave it out with --data.ignore_columns {_listed(lost)}")
            self.census.see(row.values, row.used)
            return parsed

        for raw in _portions(rows):
            yield list(usable(self._without_ignored(raw), self.columns, checked, self.bad))

    def bad(self, location: Location, error: BadRow) -> None:
        """Counts a bad row where they are skipped; else raises DataError with its place."""
        if self.on_bad_row == "error":
            raise error.at(location) from None
        self.census.drop(location, error.reason, str(error))

    def wanted(self, *more: str) -> set[str]:
        """Returns the columns that must be read from a file that can leave columns unread."""
        return (FIELDS | MEANINGFUL | {*self.columns.values(), *more}) - {*self.ignored}

    def _without_ignored(self, raw: list) -> Rows:
        """Counts the rows; what is ignored holds nothing."""
        for location, values in raw:
            self.census.rows_read += 1
            if self.ignored and not isinstance(values, BadRow):
                values = {name: None if name in self.ignored else value for name, value in values.items()}
            yield location, values


def _portions(rows: Rows) -> Iterator[list]:
    """Cuts rows into lists of BATCH or, where they are long, of LETTERS or a little more."""
    portion: list = []
    letters = 0
    for row in rows:
        portion.append(row)
        letters += _letters(row[1])
        if len(portion) == BATCH or letters >= LETTERS:
            yield portion
            portion, letters = [], 0
    if portion:
        yield portion


def _letters(value: Any) -> int:
    """Counts the letters of all texts within a row."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_letters, value.values()))
    return sum(map(_letters, value)) if isinstance(value, list) else 0


def _listed(names: list[str]) -> str:
    return f"'[{', '.join(names)}]'"
