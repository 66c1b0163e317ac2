"""A raw row under our names: its fields, checked for presence and type as they are read, and what is wrong with one."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dpo_ds.errors import DataError, shorten

Messages = list[dict[str, Any]]  # {"role", "content"} and, on some, "tool_calls", "name", ...

REASONING = ("reasoning_content", "reasoning", "thinking")  # keys of a turn that templates know
TRAINED = "trained"  # our key of a message that is not to be trained: False
MAX_MARGIN = 1e6  # exact enough in float32
REMEDY = "drop such rows with --data.on_bad_row skip"
ROLES = {  # ShareGPT's names, and others that data sets use
    "human": "user", "gpt": "assistant", "ai": "assistant", "bot": "assistant", "chatgpt": "assistant",
    "model": "assistant", "observation": "tool", "function": "tool", "function_response": "tool",
    "tool_response": "tool", "tool_result": "tool", "tool_results": "tool", "ipython": "tool", "environment": "tool",
    "prompter": "user", "function_call": "assistant", "tool_call": "assistant",
}  # fmt: skip
ARGUMENTS = ("arguments", "parameters")  # a call's, of which a null may be meant
CALLING = ("function_call", "tool_call")  # roles whose text is a call
UNTRAINED = ("weight", "loss", "train", TRAINED)  # keys by which data sets say that a turn is not to be trained
KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool")


class Location(NamedTuple):
    """A row: `row` counts from 1 and is the line number in JSON lines."""

    file: str
    row: int

    def __str__(self) -> str:
        return f"{self.file}:{self.row}"


class BadRow(DataError):
    """A mistake in one row, which `--data.on_bad_row skip` may drop. `reason` is the heading it is counted under."""

    def __init__(self, reason: str, problem: str):
        super().__init__(problem)
        self.reason = reason

    def at(self, location: Location) -> DataError:
        return DataError(f"{location}: {self} ({REMEDY})")


class Row:
    """A raw row under our names: `columns` maps ours to theirs. Reading a field checks its presence and type.

    used: their names of the fields that were read.
    """

    def __init__(self, values: Mapping[str, Any], columns: Mapping[str, str]):
        self.values = values
        self.columns = columns
        self.used: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self.values or self.columns.get(name) in self.values

    def get(self, name: str) -> Any:
        """The value, or None where it is absent or null."""
        theirs = self.columns.get(name, name)
        key = theirs if theirs in self.values else name
        self.used.add(key)
        return self.values.get(key)

    def __getitem__(self, name: str) -> Any:
        value = self.get(name)
        if value is not None:
            return value
        theirs = self.columns.get(name)
        renamed = f" (data.columns takes it from {theirs!r})" if theirs else ""
        if name in self:
            raise BadRow(f"{name} is null", f"{name!r}{renamed} is null; it must hold text or messages")
        there = ", ".join(map(repr, self.values)) or "nothing"
        raise BadRow(f"no {name}", f"lacks {name!r}{renamed}; it has {there} (rename columns with data.columns)")

    def text(self, name: str) -> str:
        return as_text(name, self[name])

    def optional_text(self, name: str) -> str:
        return "" if self.get(name) is None else self.text(name)

    def margin(self, name: str) -> float:
        value = self[name]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise wrong_type(name, value, "a number")
        if not 0 <= value <= MAX_MARGIN:  # also when it is not a number
            raise BadRow("margin out of range", f"{name!r} is {value}; a margin must be between 0 and {MAX_MARGIN:g}")
        return float(value)

    def first_of(self, *names: str) -> str:
        """Returns the first of these fields that is there and not null, else the first."""
        return next((name for name in names if self.get(name) is not None), names[0])

    def is_text(self, name: str) -> bool:
        """Tells whether a field that holds text or messages holds text."""
        if not isinstance(self[name], str | list):
            raise wrong_type(name, self[name], "text or a list of messages {role, content}")
        return isinstance(self[name], str)

    def messages(self, name: str) -> Messages:
        if not isinstance(self[name], list):
            raise wrong_type(name, self[name], "a list of messages {role, content}")
        return [as_message(f"{name}[{i}]", item) for i, item in enumerate(self[name])]

    def tools(self) -> list | None:
        """Tool descriptions: a list, or JSON text of one."""
        tools = self.get("tools")
        if isinstance(tools, str) and tools.strip():
            tools = _json("tools", tools)
        if not tools:
            return None
        if not isinstance(tools, list):
            raise wrong_type("tools", tools, "a list of tools, or JSON text of one")
        for i, tool in enumerate(tools):
            if not isinstance(tool, dict):
                raise wrong_type(f"tools[{i}]", tool, "an object that describes a tool")
        return without_nulls(tools)


def unreadable(error: ValueError | RecursionError) -> BadRow:
    """JSON that is right but more than Python reads."""
    if isinstance(error, RecursionError):
        return BadRow("nested too deep", "lists and objects are nested too deep to be read")
    return BadRow("number too long", f"a whole number has more than {sys.get_int_max_str_digits()} digits")


def as_message(name: str, value: Any) -> dict[str, Any]:
    """{"role", "content"} or ShareGPT's {"from", "value"}; other keys stay where not null (tool_calls, name, ...).

    Calls have their arguments as an object, also where a row gives JSON text of it. An assistant's turn that is not to
    be trained has TRAINED False.
    """
    if not isinstance(value, dict):
        raise wrong_type(name, value, "a message {role, content} or {from, value}")
    message = without_nulls(value, but=ARGUMENTS)
    keys = ("from", "value") if "from" in message else ("role", "content")
    if keys[0] not in message:
        raise BadRow("message without a role", f"{name} lacks a role ({shorten(value)}); a message needs role, content")
    their_role, content = message.pop(keys[0]), message.pop(keys[1], None)
    their_role = their_role.strip().lower() if isinstance(their_role, str) else their_role
    role = ROLES.get(their_role, their_role) if isinstance(their_role, str) else None
    if role not in KNOWN_ROLES:
        known = ", ".join([*KNOWN_ROLES, *ROLES])
        raise BadRow("unknown role", f"{name} has the unknown role {shorten(their_role)}; known: {known}")
    if message.get("function_call") and not message.get("tool_calls"):  # OpenAI's, of before tools
        message["tool_calls"] = message.pop("function_call")
    if message.get("tool_calls"):
        message["tool_calls"] = _calls(f"{name}.tool_calls", message["tool_calls"])
    if content is None and not message.get("tool_calls"):
        raise BadRow("message without content", f"{name} has no content, or null ({shorten(value)})")
    content = "" if content is None else _content(f"{name}.{keys[1]}", content)
    if their_role in CALLING:
        message["tool_calls"], content = _calls(name, content), ""
    flags = {key: message.pop(key) for key in UNTRAINED if key in message}
    if role == "assistant" and not all([_is_trained(f"{name}.{key}", key, flag) for key, flag in flags.items()]):
        message[TRAINED] = False
    return {"role": role, "content": content, **message}


def _is_trained(name: str, key: str, value: Any) -> bool:
    if value not in (0, 1):  # True and False are
        rule = "1 or 0: a turn is trained or not" if key == "weight" else "true or false"
        raise wrong_type(name, value, rule)
    return bool(value)


def _calls(name: str, calls: Any) -> list[dict[str, Any]]:
    """Returns calls, one or a list of them or JSON text of either, as {"type": "function", "function": {"name",
    "arguments": object}}, with what else they have."""
    calls = without_nulls(_json(name, calls), but=ARGUMENTS) if isinstance(calls, str) else calls
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise wrong_type(name, calls, "a call {name, arguments}, or a list of them")
    calls = [call if "function" in call else {"type": "function", "function": call} for call in calls]
    return [call | {"function": _with_arguments(f"{name}[{i}].function", call)} for i, call in enumerate(calls)]


def _with_arguments(name: str, call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    if not isinstance(function, dict):
        raise wrong_type(name, function, "an object {name, arguments}")
    if "arguments" not in function and "parameters" in function:
        function = {{"parameters": "arguments"}.get(key, key): value for key, value in function.items()}
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        return function
    try:
        read = json.loads(arguments, object_pairs_hook=unique_keys) if arguments.strip() else {}
    except (ValueError, RecursionError, BadRow):
        return function  # a model's call can be wrong, which a rejected side is to show
    return function | {"arguments": read} if isinstance(read, dict) else function


def _content(name: str, content: Any) -> str:
    """Returns text, or the text of parts [{"type": "text", "text": ...}], as models that also see have it."""
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        return as_text(name, content)
    for i, part in enumerate(content):
        if part.get("type", "text") != "text" or "text" not in part:
            problem = f"{name}[{i}] is {shorten(part)}; only parts {{type: text, text: ...}} can be trained on"
            raise BadRow("a part that is no text", problem)
    return "".join(as_text(f"{name}[{i}].text", part["text"]) for i, part in enumerate(content))


def as_text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise wrong_type(name, value, "text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
            problem = f"{name!r} holds half a surrogate pair, {value[error.start]!r}, at character {error.start}"
            raise BadRow("not Unicode", problem) from None
    return value


def _json(name: str, text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except json.JSONDecodeError as error:
        raise BadRow("broken JSON in a field", f"{name!r} must be JSON but is {shorten(text)} ({error})") from None
    except (ValueError, RecursionError) as error:
        raise unreadable(error) from None


def wrong_type(name: str, value: Any, wanted: str) -> BadRow:
    return BadRow("wrong type", f"{name!r} is {type(value).__name__} {shorten(value)}; it must be {wanted}")


def without_nulls(value: Any, but: Sequence[str] = ()) -> Any:
    """Returns nested values without keys that are null, as Arrow gives every struct of a column all keys; a template
    would render those. What stands under the keys `but` is left as it is: a call's argument may mean its null.
    """
    if isinstance(value, dict):
        items = ((key, item) for key, item in value.items() if item is not None)
        return {key: item if key in but else without_nulls(item, but) for key, item in items}
    return [without_nulls(item, but) for item in value] if isinstance(value, list) else value


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Makes an object of JSON's pairs; BadRow where a key comes twice, of which Python would take the last."""
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for i, key in enumerate(keys) if key in keys[:i])
        raise BadRow("a key twice", f"the key {twice!r} comes twice in one object; keep the one that is meant")
    return value
