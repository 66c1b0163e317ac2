"""Reads back the JSON files that commands leave for each other, each against a pydantic model that says what it holds.

A file may have been cut, copied wrongly, edited or forged: whatever is in it, the reader returns a record that fits its
model or raises `Damaged` with one reason.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, lt=1 << 62, strict=True)]


def _plain_name(name: str) -> str:
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise ValueError("must be a file's plain name")
    return name


FileName = Annotated[str, AfterValidator(_plain_name)]


class Damaged(ValueError):
    """A file is not what was written; str() says why in a few words, without its path."""


class Record(BaseModel):
    """Keeps keys of later versions, so that a record written again loses nothing."""

    model_config = ConfigDict(extra="allow", frozen=True)


AnyRecord = TypeVar("AnyRecord", bound=Record)


def read_record(path: Path, model: type[AnyRecord]) -> AnyRecord:
    """Returns the record in a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        Damaged: the file cannot be read, is no JSON object, or does not fit the model.
    """
    return record_of(read_object(path), model)


def read_object(path: Path) -> dict:
    """Returns the object in a JSON file, whatever its keys; raises as `read_record` does."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Damaged(f"cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):  # no UTF-8, no JSON, or nested without end
        raise Damaged("not JSON") from None
    if not isinstance(values, dict):
        raise Damaged(f"holds a {type(values).__name__}, not an object")
    return values


def record_of(values: dict, model: type[AnyRecord]) -> AnyRecord:
    """Returns the values as a record; raises Damaged with the first key that does not fit."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise Damaged(f"{'.'.join(map(str, first['loc'])) or 'its content'}: {first['msg']}") from None
