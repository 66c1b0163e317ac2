"""Names what a user can cause: each UserError becomes one line on rank 0 and exit code 2."""


from __future__ import annotations

from typing import Any


class UserError(ValueError):
    """A mistake in what the user gave; the message names the file, the row, the value, the rule and the remedy.

    As text it is one line that every terminal takes, whatever the names in it: what cannot be printed is escaped.
    """

    def __str__(self) -> str:
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in super().__str__())


class ConfigError(UserError):
    """A key, value or combination in YAML, on the command line or in a DeepSpeed JSON file."""


class CutOff(ConfigError):
    """A rank that cannot reach rank 0 and has to speak for itself."""


class DataError(UserError):
    """A file or row of the user's data."""


class ModelError(UserError):
    """A model or tokenizer folder that cannot be used."""


class TrainingError(RuntimeError):
    """The run cannot go on, on all ranks alike; the last checkpoint stays."""


def first_line(error: BaseException) -> str:
    """Returns the first line of what an exception says; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def shorten(value: Any, width: int = 60) -> str:
    """Returns a value as Python writes it, cut to `width` characters, for a message."""
    shown = repr(value)
    return shown if len(shown) <= width else shown[: width - 1] + "…"
