"""`dpo-ds` on 29 February 2024: another_day.py ARGUMENT..."""

import datetime

from dpo_ds.commands import cli
from dpo_ds.data.chat import template


class LeapDay(datetime.date):
    @classmethod
    def today(cls) -> datetime.date:
        return cls(2024, 2, 29)


def main(*argv: str) -> int:
    template.date = LeapDay
    return cli.main(list(argv))
