"""YAML as people mean it: a key given twice is an error, a date stays text. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from yaml import YAMLError

from dpo_ds.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a repeated key and knows no dates (an output_dir may look like one)."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                problem = f"{key_node.value!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def parse(text: str) -> Any:
    """The value of a YAML text. Raises YAMLError."""
    return yaml.load(text, Loader=_Loader)


def read_mapping(path: Path, key: str) -> dict:
    """The mapping in a YAML file; an empty file is an empty one.

    Raises:
        ConfigError: missing, not UTF-8, not YAML or no mapping, naming --key, file, line and column.
    """
    try:
        values = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"--{key} {path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"--{key} {path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--{key} {path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        position = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "unreadable"
        raise ConfigError(f"--{key} {path}{position}: not usable YAML ({problem})") from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ConfigError(f"--{key} {path}: holds a {type(values).__name__}, expected sections such as 'model:'")
    return values
