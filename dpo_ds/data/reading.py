"""Goes through the rows of a source: what a reader makes of each, and what becomes of those that it cannot use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeVar

from dpo_ds.data.census import Census
from dpo_ds.data.rows import BadRow, Location, Row, unreadable
from dpo_ds.data.sources import Rows

BATCH = 1000  # rows that are read, then tokenised together
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
    """Takes rows in as data.columns and data.on_bad_row say, and counts them in the census."""

    columns: Mapping[str, str]
    on_bad_row: str
    census: Census = field(default_factory=Census)

    def batches(self, rows: Rows, parse: Callable[[Row], T]) -> Iterator[list[tuple[Location, T]]]:
        """Yields what `parse` makes of BATCH rows at a time, less those that are bad."""
        while raw := list(islice(rows, BATCH)):
            yield list(usable(self._counted(raw), self.columns, parse, self.bad))

    def bad(self, location: Location, error: BadRow) -> None:
        """Counts a bad row where they are skipped; else raises DataError with its place."""
        if self.on_bad_row == "error":
            raise error.at(location) from None
        self.census.drop(location, error.reason, str(error))

    def _counted(self, raw: list) -> Rows:
        for row in raw:
            self.census.rows_read += 1
            yield row
