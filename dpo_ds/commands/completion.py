"""`dpo-ds --completion SHELL`: a script by which a shell completes commands, keys, choices and files."""

from __future__ import annotations

import argparse
import types
import typing

import shtab

from dpo_ds import config
from dpo_ds.errors import ConfigError, shorten

SHELLS = ("bash", "zsh", "fish")


def script(shell: str, parsers: dict[str, argparse.ArgumentParser], summaries: dict[str, str]) -> str:
    """Returns the script. parsers and summaries: of every command.

    Raises:
        ConfigError: a shell for which there is none.
    """
    if shell not in SHELLS:
        raise ConfigError(f"--completion {shorten(shell)}: expected one of {', '.join(SHELLS)}")
    whole = argparse.ArgumentParser("dpo-ds")
    whole.add_argument("--completion", choices=SHELLS, help="print the script that completes for this shell")
    whole.add_argument("--version", action="store_true", help="print the version")
    commands = whole.add_subparsers()
    for name, parser in parsers.items():
        fields = config.keys(config.COMMANDS.get(name, config.TrainConfig))  # plan and doctor have those of train
        for action in parser._actions:
            _tell_values(action, fields.get(action.dest))
        commands.add_parser(name, parents=[parser], add_help=False, help=summaries[name])
    return shtab.complete(whole, shell=shell)


def _tell_values(action: argparse.Action, field) -> None:
    """Gives an action the choices of its key, or says that it takes a file: only here, where nothing is parsed."""
    if field is None:
        if action.dest in ("config", "verify", "yaml", "write"):
            action.complete = shtab.FILE
        return
    if config.is_bool(field):
        action.choices, action.nargs = ["true", "false"], None
    elif names := _choices(field.annotation):
        action.choices = names
    elif "path" in action.dest or action.dest in ("data.train", "data.eval", "source", "file", "output_dir"):
        action.complete = shtab.FILE


def _choices(annotation) -> list[str]:
    """Returns the words that a type allows, those of a union's and a list's parts together."""
    if typing.get_origin(annotation) is typing.Literal:
        return list(typing.get_args(annotation))
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, list):
        return list(dict.fromkeys(name for part in typing.get_args(annotation) for name in _choices(part)))
    return []
