"""YAML as people mean it: a key given twice is an error; dates, 1:30, 010 and no are text. Imports no torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from yaml import YAMLError

from dpo_ds.config.text_file import read_text
from dpo_ds.errors import ConfigError

PLAIN = {  # of what stands without quotes; all else is text, which a key that wants a number still reads as one
    "tag:yaml.org,2002:null": (re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    "tag:yaml.org,2002:bool": (re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    "tag:yaml.org,2002:int": (re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789")),
    "tag:yaml.org,2002:float": (
        re.compile(r"^[-+]?(?:(?:0|[1-9][0-9]*)\.[0-9]*(?:[eE][-+][0-9]+)?|\.[0-9]+|\.inf|\.nan)$"),
        list("-+.0123456789"),
    ),
    "tag:yaml.org,2002:merge": (re.compile(r"^<<$"), ["<"]),
}


class _Loader(yaml.SafeLoader):
    """SafeLoader with the plain values above, that refuses a repeated key and keys that are no single values."""

    yaml_implicit_resolvers: dict = {}

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                problem = "a list or mapping cannot be a key"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            if key_node.value in seen:
                problem = f"{key_node.value!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


for _tag, (_pattern, _first) in PLAIN.items():
    _Loader.add_implicit_resolver(_tag, _pattern, _first)


def parse(text: str) -> Any:
    """Returns the value of a YAML text. Raises YAMLError, also for what is too deep or too long for Python."""
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise YAMLError("nested too deeply") from None
    except ValueError as error:  # of int and float
        raise YAMLError(str(error).split(":")[0]) from None


def problem_of(error: YAMLError) -> str:
    """Returns what is wrong, without the lines that YAML adds."""
    return getattr(error, "problem", None) or str(error).splitlines()[0]


def read_mapping(path: Path, key: str) -> dict:
    """Returns the mapping in a YAML file; an empty file is an empty one.

    Raises:
        ConfigError: no file that can be read, not YAML or no mapping, naming --key, file, line and column.
    """
    try:
        values = parse(read_text(path, key))
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        position = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise ConfigError(f"--{key} {path}{position}: not usable YAML ({problem_of(error)})") from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ConfigError(f"--{key} {path}: holds a {type(values).__name__}, expected sections such as 'model:'")
    return values
