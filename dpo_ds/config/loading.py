"""From YAML and command line to a validated config, and back to text."""

from __future__ import annotations

import json
import shlex
import types
import typing
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dpo_ds.config import yaml_file
from dpo_ds.config.commands import COMMANDS, RECORDED
from dpo_ds.config.peers.names import answer_to
from dpo_ds.config.section import Section, did_you_mean, is_section, kind
from dpo_ds.errors import ConfigError, shorten

OF_SHAPE = {"missing", "too_long", "tuple_type", "list_type", "dict_type", "string_type"}  # said by our kinds


def keys(config: type[Section], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> pydantic field, in the order of declaration, a section's required keys first: what flags and README
    are made from.
    """
    found = {}
    fields = config.model_fields.items()
    for name, field in sorted(fields, key=lambda item: prefix != "" and not item[1].is_required()):
        if is_section(field):
            found |= keys(field.annotation, f"{prefix}{name}.")
        else:
            found[prefix + name] = field
    return found


def load(command: str, yaml_path: str | None, overrides: dict[str, str]) -> tuple[Section, list[str]]:
    """The validated config, and lines that tell the user what of the YAML file this command does not use.

    Args:
        overrides: dotted key -> text as given on the command line; wins over YAML, which wins over defaults.
    Raises:
        ConfigError: one line that names the key, the value, the rule and the nearest key.
    """
    config = COMMANDS[command]
    values, notes = ({}, []) if yaml_path is None else _read_yaml(command, config, Path(yaml_path))
    known, in_file = keys(config), set(_dotted(values))
    for key, text in overrides.items():
        if key not in known:
            raise ConfigError(f"unknown key --{key}; {known_instead(key, known)}")
        section, leaf = _section_of(values, key, yaml_path)
        section[leaf] = _from_text(text, known[key].annotation, key)
    given = {key: f"{yaml_path}: {key}" for key in in_file} | {key: f"--{key}" for key in overrides}
    return _validated(config, values, given), notes


def nested(flat: dict[str, Any]) -> dict:
    """{"data.limit": 3} -> {"data": {"limit": 3}}."""
    values: dict = {}
    for key, value in flat.items():
        section, leaf = _section_of(values, key, None)
        section[leaf] = value
    return values


def _section_of(values: dict, key: str, file: str | None) -> tuple[dict, str]:
    """Returns the section of `values` that a dotted key belongs to, made where there is none, and the key's last part.

    Raises:
        ConfigError: what stands in its place came from `file`, and is none.
    """
    *sections, leaf = key.split(".")
    node = values
    for section in sections:
        if node.get(section) is None:
            node[section] = {}
        node = node[section]
        if not isinstance(node, dict):
            raise ConfigError(f"{file}: {section}: {shorten(node)} is no section, so --{key} has no place in it")
    return node, leaf


def check(command: str, values: dict, file: str) -> None:
    """Raises ConfigError, as `load` does, where nested values from a file make no config of `command`."""
    _validated(COMMANDS[command], values, {key: f"{file}: {key}" for key in _dotted(values)})


def _validated(config: type[Section], values: dict, given: dict[str, str]) -> Section:
    try:
        return config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_first_line(error, keys(config), given)) from None


def known_instead(key: str, known: typing.Collection[str], also: typing.Collection[str] = ()) -> str:
    """Returns what to write in the place of a key that nobody knows: what another trainer's key is here, else the
    nearest of the known ones. also: names of sections, for keys without a dot.
    """
    answer = answer_to(key)
    if answer is None:
        return did_you_mean(key, known if "." in key or not also else also)
    return str(answer) if not answer.key or answer.key in known else f"{answer}, which this command does not have"


def to_plain(config: Section) -> dict:
    """Nested dict of plain YAML types, every key resolved."""
    return config.model_dump(mode="json")


def command_line(command: str, run: Section) -> str:
    """Returns what a user types for `command` with the settings of `run` that it knows and that are not the defaults.
    """
    words = ["dpo-ds", command]
    for key, field in keys(COMMANDS[command]).items():
        value = run
        for part in key.split("."):
            value = getattr(value, part, None)
        if value is not None and (field.is_required() or value != field.get_default(call_default_factory=True)):
            words += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    return shlex.join(words)


def flatten(values: dict, prefix: str = "", depth: int = 2) -> dict[str, Any]:
    """{"data": {"limit": 3}} -> {"data.limit": 3}; dicts that are values (data.columns) stay whole."""
    flat = {}
    for name, value in values.items():
        if isinstance(value, dict) and depth > 1:
            flat |= flatten(value, f"{prefix}{name}.", depth - 1)
        else:
            flat[prefix + name] = value
    return flat


def _read_yaml(command: str, config: type[Section], path: Path) -> tuple[dict, list[str]]:
    values = yaml_file.read_mapping(path, "config")
    values.pop(RECORDED, None)
    elsewhere = {name for other in COMMANDS.values() for name in _names_below(other)}
    unused = sorted(set(values) & (elsewhere - set(config.model_fields) - set(keys(config))))
    for name in unused:
        del values[name]
    for name, value in values.items():
        if name in config.model_fields and is_section(config.model_fields[name]):
            values[name] = {} if value is None else value  # `train:` with nothing under it
            if not isinstance(values[name], dict):
                example = next(key for key in keys(config) if key.startswith(f"{name}."))
                raise ConfigError(f"{path}: {name} is {shorten(value)}, expected keys below it, such as {example}")
    for key in list(_unknown(values, config)):
        if key in elsewhere and key not in values:
            unused.append(key)
            _remove(values, key)
            continue
        if key in keys(config):
            raise ConfigError(f"{path}: {key!r} is written with a dot; nest it: {key.replace('.', ': {', 1)}: ...}}")
        instead = known_instead(key, keys(config), also=config.model_fields)
        raise ConfigError(f"{path}: unknown key {shorten(key)}; {instead}")
    return values, [f"{path}: {command} does not use {', '.join(unused)}"] if unused else []


def _names_below(config: type[Section], prefix: str = "") -> typing.Iterator[str]:
    """Every key and every section, dotted."""
    for name, field in config.model_fields.items():
        yield prefix + name
        if is_section(field):
            yield from _names_below(field.annotation, f"{prefix}{name}.")


def _remove(values: dict, key: str) -> None:
    *sections, leaf = key.split(".")
    for section in sections:
        values = values[section]
    del values[leaf]


def _unknown(values: dict, config: type[Section], prefix: str = "") -> typing.Iterator[str]:
    for name, value in values.items():
        field = config.model_fields.get(name)
        if field is None:
            yield f"{prefix}{name}"
        elif isinstance(value, dict) and is_section(field):
            yield from _unknown(value, field.annotation, f"{prefix}{name}.")


def _from_text(text: str, annotation: Any, key: str) -> Any:
    """Command-line text as a value: null, lists and dicts are YAML, all else is left to pydantic's own conversion."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    if text == "null" and union and type(None) in typing.get_args(annotation):
        return None
    kinds = {typing.get_origin(part) for part in (annotation, *typing.get_args(annotation))}
    if kinds & {list, dict, tuple} and text[:1] in ("[", "{"):
        try:
            return yaml_file.parse(text)
        except yaml_file.YAMLError as error:
            problem = yaml_file.problem_of(error)
            raise ConfigError(f"--{key} {shorten(text)}: not a YAML list or mapping ({problem})") from None
    return text


def _dotted(values: dict, prefix: str = "") -> typing.Iterator[str]:
    """Yields the key of every value, and of every section."""
    for name, value in values.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{name}.")


def _first_line(error: ValidationError, known: dict, given: dict[str, str]) -> str:
    """Returns pydantic's first finding as one line: where it was given, the key, the value, the rule.

    given: by key, how a value was given that was not left to its default; of a section, where it stands in a file.
    """
    findings = error.errors()
    finding = findings[0]
    missing = [_key_of(finding, known) for finding in findings if finding["type"] == "missing"]
    needed = [key for key in known if known[key].is_required()]
    required = [key for key in needed if any(f"{key}.".startswith(f"{prefix}.") for prefix in missing)]
    if finding["type"] == "missing" and len(required) == 1:
        return f"{required[0]} is required; give it as --{required[0]} or in --config"
    if finding["type"] == "missing" and required:
        return f"{', '.join(required)} are required; give them as --{required[0]} ..., or in --config"
    key = _key_of(finding, known)
    rule = finding["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    rule = "a number of fewer digits" if finding["type"] == "int_parsing_size" else rule
    wanted = kind(known[key]) if key in known else ""
    if finding["type"] in OF_SHAPE and wanted:
        rule = "a mapping, as {key: value}" if wanted == "mapping" else wanted
    if finding["type"] == "literal_error" and wanted.endswith(" or null"):
        rule += " or null"
    if finding["type"] != "value_error":
        return f"{given.get(key, key)}: {shorten(finding['input'])} should be {rule}"
    if key in known:
        return f"{given.get(key, key)}: {rule.removeprefix(f'{key}: ').removeprefix(f'{key} ')}"
    named = [name for name in given if name in known and f" {name} " in f" {rule} "]
    places = {given[name].removesuffix(name) for name in named}  # "--", or the file
    return f"{places.pop()}{rule}" if len(places) == 1 and "--" not in places else rule


def _key_of(finding, known: dict) -> str:
    """Returns the key that a finding is about, or the section."""
    dotted = ".".join(str(part) for part in finding["loc"])
    return next((key for key in known if f"{dotted}.".startswith(f"{key}.")), dotted)
