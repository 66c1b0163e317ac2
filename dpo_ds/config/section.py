"""Makes what every section of the config is, and the checks that several share."""

from __future__ import annotations

import difflib
import os
import types
import typing

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator, BaseModel, ConfigDict, field_validator

from dpo_ds.errors import shorten


def is_bool(field) -> bool:
    return field.annotation is bool or bool in typing.get_args(field.annotation)


LARGEST = 2**32 - 1  # of any number: what seeds may be, and more steps, tokens or seconds than anybody has
NAME_BYTES, PATH_BYTES = 255, 4096  # Linux's limits
MOST_LISTED = 24  # names in a message
DEEPEST = 8  # lists and mappings in each other; sources are two


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _as_meant(cls, value, info):
        """`true` is no number, and ~ is a home folder in every path."""
        if is_section(cls.model_fields[info.field_name]):
            return value
        if isinstance(value, bool) and not is_bool(cls.model_fields[info.field_name]):
            raise ValueError(f"{str(value).lower()!r} is neither a number nor text")
        return _texts_checked(value)

    @field_validator("*", mode="after")
    @classmethod
    def _within_reason(cls, value):
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, int | float) and abs(number) > LARGEST:
                raise ValueError(f"{shorten(number)} is beyond {LARGEST}, the most that any number here may be")
        return value


def _texts_checked(value, depth: int = 0):
    """Returns the value with home folders in place of ~; raises ValueError for text that no file's name can be."""
    if depth > DEEPEST:  # also a YAML list that holds itself
        raise ValueError("is nested too deeply")
    if isinstance(value, list):
        return [_texts_checked(item, depth + 1) for item in value]
    if isinstance(value, dict):
        return {key: _texts_checked(item, depth + 1) for key, item in value.items()}
    if not isinstance(value, str):
        return value
    if "\0" in value:
        raise ValueError(f"{shorten(value)} holds a NUL")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError(f"{shorten(value)} holds half a surrogate pair, which no file can; write it as UTF-8")
    if not value.startswith("~"):
        return value
    path = os.path.expanduser(value)
    if path == value:
        raise ValueError(f"{shorten(value)}: there is no user {value[1:].split('/')[0]!r} on this machine")
    return path


def _path_checked(path: str) -> str:
    longest = max(len(os.fsencode(name)) for name in path.split("/"))
    if longest > NAME_BYTES or len(os.fsencode(path)) >= PATH_BYTES:
        raise ValueError(f"{shorten(path)} is too long: {NAME_BYTES} bytes a name, {PATH_BYTES} in all")
    return path


def path_of(given) -> str:
    """Returns a path as a section would hold it; raises ValueError for what cannot be one."""
    if not isinstance(given, str):
        raise ValueError(f"{shorten(given)} is no path")
    return _path_checked(_texts_checked(given))


FilePath = typing.Annotated[str, AfterValidator(_path_checked)]


def is_section(field) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, Section)


def kind(field) -> str:
    """Returns the type and range of a key's values as one reads them: `int >= 1`, `{packed,padded}`, `text or null`."""
    return _kind(field.annotation, field.metadata)


def _kind(annotation, bounds) -> str:
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _kind(parts[0], bounds)
    if origin is typing.Literal:
        return f"{{{','.join(parts)}}}"
    if origin in (typing.Union, types.UnionType):
        kinds = [_kind(part, bounds) for part in parts]
        return " or ".join("list of them" if kind == f"list of {kinds[0]}" else kind for kind in kinds)
    if origin is list:
        inner = _kind(parts[0], [])
        return f"list of ({inner})" if " or " in inner else f"list of {inner}"
    if origin is tuple:
        return f"[{', '.join(_kind(part, bounds) for part in parts)}]"
    if annotation in (int, float):
        return _range(annotation, bounds)
    return {bool: "{true,false}", str: "text", type(None): "null"}.get(annotation, "mapping")


def _range(number: type, bounds) -> str:
    """`0 <= float < 1` from pydantic's bounds; of whole numbers, those above 0 are >= 1."""
    least = next((f"{bound.ge} <=" for bound in bounds if isinstance(bound, Ge)), "")
    least = next((f"{bound.gt} <" for bound in bounds if isinstance(bound, Gt)), least)
    if number is int:
        least = next((f"{bound.gt + 1} <=" for bound in bounds if isinstance(bound, Gt)), least)
    most = next((f"<= {bound.le}" for bound in bounds if isinstance(bound, Le)), "")
    most = next((f"< {bound.lt}" for bound in bounds if isinstance(bound, Lt)), most)
    if least and not most:
        value, sign = least.split()
        return f"{number.__name__} {sign.replace('<', '>')} {value}"
    return f"{least} {number.__name__} {most}".strip()


def above_zero(what: str, given, of: str) -> float:
    try:
        number = float(given)  # YAML reads 1e-1 as text
    except (TypeError, ValueError, OverflowError):
        number = 0.0
    if not 0 < number <= LARGEST:
        raise ValueError(f"{what} {shorten(given)} of {of[:80]} must be a number above 0 and at most {LARGEST}")
    return number


def checked_source(source):
    """A path or Hub id, or a list of them with weights."""
    items = source if isinstance(source, list) else [source]
    if not items:
        raise ValueError("an empty list; name at least one path or Hub id")
    for item in items:
        if not isinstance(item, dict):
            _path_checked(item or "")
            continue
        if set(item) - {"path", "weight"} or not isinstance(item.get("path"), str):
            raise ValueError(f"{shorten(item)} is not a source; write {{path: ..., weight: 1.0}}")
        _path_checked(item["path"])
        item["weight"] = above_zero("weight", item.get("weight", 1.0), item["path"])
    return source


def did_you_mean(word: str, choices: typing.Iterable[str]) -> str:
    """`did you mean 'x'?`, else the whole list; a key's last part alone counts too, and the letters its words begin
    with (lr).
    """
    choices = list(choices)
    section, _, leaf = word.rpartition(".")
    close = [choice for choice in choices if len(leaf) > 1 and choice.startswith(section) and leaf == _letters(choice)]
    by_leaf = {choice.rsplit(".", 1)[-1]: choice for choice in reversed(choices)}
    close = close or difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    close = close or [by_leaf[leaf] for leaf in difflib.get_close_matches(leaf, by_leaf, n=1)]
    if close:
        return f"did you mean {close[0]!r}?"
    more = f" and {len(choices) - MOST_LISTED} more" if len(choices) > MOST_LISTED else ""
    return f"known: {', '.join(choices[:MOST_LISTED])}{more}"


def _letters(key: str) -> str:
    return "".join(part[0] for part in key.rpartition(".")[2].split("_") if part)
