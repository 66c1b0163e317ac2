"""Makes what every section of the config is made of, and the checks that several share."""

from __future__ import annotations

import difflib
import types
import typing
from pathlib import Path

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ConfigDict, field_validator


def is_bool(field) -> bool:
    return field.annotation is bool


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _as_meant(cls, value, info):
        """`yes` is no number, and ~ is the home folder in every path."""
        if isinstance(value, bool) and not is_bool(cls.model_fields[info.field_name]):
            raise ValueError(f"{str(value).lower()!r} is neither a number nor text")
        return str(Path(value).expanduser()) if isinstance(value, str) and value.startswith("~/") else value


def is_section(field) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, Section)


def kind(field) -> str:
    """Returns the type and range of a key's values as one reads them: `int >= 1`, `{packed,padded}`, `text or null`."""
    return _kind(field.annotation, field.metadata)


def _kind(annotation, bounds) -> str:
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
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
    least = next((f"{bound.ge:g} <=" for bound in bounds if isinstance(bound, Ge)), "")
    least = next((f"{bound.gt:g} <" for bound in bounds if isinstance(bound, Gt)), least)
    if number is int:
        least = next((f"{bound.gt + 1} <=" for bound in bounds if isinstance(bound, Gt)), least)
    most = next((f"<= {bound.le:g}" for bound in bounds if isinstance(bound, Le)), "")
    most = next((f"< {bound.lt:g}" for bound in bounds if isinstance(bound, Lt)), most)
    if least and not most:
        value, sign = least.split()
        return f"{number.__name__} {sign.replace('<', '>')} {value}"
    return f"{least} {number.__name__} {most}".strip()


def above_zero(what: str, given, of: str) -> float:
    try:
        number = float(given)  # YAML reads 1e-1 as text
    except (TypeError, ValueError):
        number = 0.0
    if not 0 < number < float("inf"):
        raise ValueError(f"{what} {given!r} of {of} must be a number above 0")
    return number


def checked_source(source):
    """A path or Hub id, or a list of them with weights."""
    items = source if isinstance(source, list) else [source]
    if not items:
        raise ValueError("an empty list; name at least one path or Hub id")
    for item in items:
        if not isinstance(item, dict):
            continue
        if set(item) - {"path", "weight"} or not isinstance(item.get("path"), str):
            raise ValueError(f"{item} is not a source; write {{path: ..., weight: 1.0}}")
        item["weight"] = above_zero("weight", item.get("weight", 1.0), item["path"])
    return source


def did_you_mean(word: str, choices: typing.Iterable[str]) -> str:
    """`did you mean 'x'?`, else the whole list; a key's last part alone counts too."""
    choices = list(choices)
    by_leaf = {choice.rsplit(".", 1)[-1]: choice for choice in reversed(choices)}
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    close = close or [by_leaf[leaf] for leaf in difflib.get_close_matches(word.rsplit(".", 1)[-1], by_leaf, n=1)]
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(choices)}"
