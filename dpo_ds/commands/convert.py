"""`dpo-ds convert FILE`: a config file of TRL, LLaMA-Factory or Axolotl as a run config of ours, on standard output."""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

from dpo_ds import config
from dpo_ds.config import ConvertConfig
from dpo_ds.config.peers.translation import Translation, translate


def start(run: ConvertConfig) -> int:
    """Prints the YAML, and on standard error what was left out.

    Raises:
        ConfigError: a file of nobody's, or one that makes no usable config, with the key that is missing or wrong.
    """
    done = translate(Path(run.file), run.gpus)
    known = config.keys(config.COMMANDS[done.command])
    for key in [key for key in done.values if key not in known]:
        done.note(key, done.values.pop(key), f"dpo-ds {done.command} has no such key")
    values = config.nested(done.values)
    config.check(done.command, values, str(run.file))
    print(_page(done, values, run.file), end="")
    for note in done.notes:
        print(f"dpo-ds: {run.file}: {note}", file=sys.stderr)
    return 0


def _page(done: Translation, values: dict, file: str) -> str:
    head = f"# Translated from {file} ({done.peer}) by dpo-ds convert, to be run with\n"
    head += f"# dpo-ds {done.command} --config run.yaml\n"
    left = [f"# - {' '.join(note.split())}\n" for note in done.notes]
    rest = ["# What to know, and what is not translated:\n", *left] if left else []
    return head + yaml.safe_dump(values, sort_keys=False, allow_unicode=True) + "".join(rest)
