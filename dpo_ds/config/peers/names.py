"""Answers keys of TRL, LLaMA-Factory and Axolotl with what they are here (`names.yaml`)."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import NamedTuple

import yaml


class Answer(NamedTuple):
    """key: ours, "" where there is none. remark: what is different, or a whole sentence where there is no key."""

    key: str
    remark: str

    def __str__(self) -> str:
        if not self.key:
            return self.remark if self.remark.startswith("not here") else f"here: {self.remark}"
        return f"here: --{self.key}{f' ({self.remark})' if self.remark else ''}"


@cache
def names() -> dict[str, Answer]:
    """Returns the answer to every foreign key that we know of."""
    given = yaml.safe_load(files(__package__).joinpath("names.yaml").read_text(encoding="utf-8"))
    return {name: _answer(told) for name, told in given.items()}


def answer_to(name: str) -> Answer | None:
    """Returns what a key is here that was given as one of ours, dashes for underscores too; None if nobody's."""
    return names().get(name.replace("-", "_").rsplit(".", 1)[-1])


def _answer(told: str | list[str]) -> Answer:
    if isinstance(told, list):
        return Answer(*told)
    return Answer("", told) if " " in told else Answer(told, "")
