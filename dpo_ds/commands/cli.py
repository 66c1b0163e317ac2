"""`dpo-ds COMMAND [--config run.yaml] [--section.key value ...]`, the same under every launcher.

Building a parser imports neither torch nor deepspeed. A user's mistake is one line from rank 0 and exit code 2.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

from dpo_ds import __version__, config
from dpo_ds.cluster import signals
from dpo_ds.cluster.launch import ALONE, Launch, from_environment
from dpo_ds.cluster.launch import notes as launch_notes
from dpo_ds.cluster.signals import EXIT_STOPPED
from dpo_ds.commands.doctor import arguments as doctor
from dpo_ds.commands.plan import arguments as plan
from dpo_ds.config import yaml_file
from dpo_ds.errors import ConfigError, CutOff, TrainingError, UserError

EXIT_DONE, EXIT_FAULT, EXIT_USER = 0, 1, 2


class Command(NamedTuple):
    """Names a command in the overview, and `module:function` below dpo_ds.commands, which takes its config.

    by_one: what one process does; under a launcher that is rank 0, and the other ranks have nothing to do.
    """

    summary: str
    start: str
    by_one: bool = False


COMMANDS = {
    "sft": Command("supervised fine-tuning on chosen completions", "train:start"),
    "reward": Command("a Bradley-Terry reward model on pairs", "train:start"),
    "train": Command("preference optimisation on pairs (DPO)", "train:start"),
    "rl": Command("reinforcement learning from a score (PPO and others)", "rl.command:start"),
    "evaluate": Command("accuracy, KL, rewards and win rates, with a report", "evaluate.command:start"),
    "export": Command("a sharded checkpoint as a Hugging Face model", "export:start", by_one=True),
    "sample": Command("completions of prompts, scored and ranked into pairs", "sample.command:start"),
    "convert": Command("a config of TRL, LLaMA-Factory or Axolotl as one of ours", "convert:start", by_one=True),
    "plan": Command("memory, time and cost of a training run, before it", "plan.command:start", by_one=True),
    "precompute": Command("the reference's log-probs, stored for reference.kind cached", "precompute:start"),
    "doctor": Command("looks at cluster, data and model before a long run, and makes one step", "doctor.command:start"),
}
ABOUT_A_RUN = {"plan": plan, "doctor": doctor}  # they take another command's config, and flags of their own
VERIFY, VERIFY_START = "precompute --verify", "precompute:start_verify"
POSITIONAL = {"export": ("source", "CHECKPOINT"), "convert": ("file", "FILE")}  # a key that needs no flag
LONGEST_KIND = 48  # characters of a key's type behind its flag; a longer one is told below


class _Parser(argparse.ArgumentParser):
    """argparse whose mistakes are one line that names the nearest key, as all of ours are."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str):
        raise ConfigError(message)


def parser_for(command: str) -> argparse.ArgumentParser:
    """The parser of one command; its flags are the config's keys."""
    settings = config.COMMANDS[command]
    parser = _Parser(
        prog=f"dpo-ds {command}",
        usage=f"dpo-ds {command} [--config RUN.YAML] [--section.key value ...]",
        description=settings.__doc__,
        epilog="Command line beats YAML beats defaults; a flag given twice: the last wins.",
    )
    parser.add_argument("--config", metavar="RUN.YAML", help="a YAML file whose sections nest as the dots below")
    if command == "precompute":
        what = "check every hash of a finished cache, print a summary and stop"
        parser.add_argument("--verify", metavar="FOLDER", default=argparse.SUPPRESS, help=what)
    if command in POSITIONAL:
        key, metavar = POSITIONAL[command]
        what = f"the same as --{key}"
        parser.add_argument(key, nargs="?", metavar=metavar, default=argparse.SUPPRESS, help=what)
    parser.add_argument("--print_config", action="store_true", help="print the resolved config as YAML and stop")
    for key, field in config.keys(settings).items():
        default = "required" if field.is_required() else f"default {default_of(field)}"
        kind, description = config.kind(field), field.description
        if len(kind) > LONGEST_KIND:
            kind, description = key.rsplit(".", 1)[-1].upper(), f"{description}: {kind.replace(',', ', ')}"
        parser.add_argument(
            f"--{key}",
            metavar=kind,
            default=argparse.SUPPRESS,
            help=f"{description} ({default})".replace("%", "%%"),
            **({"nargs": "?", "const": "true"} if config.is_bool(field) else {}),
        )
    return parser


def parse(argv: Sequence[str]) -> tuple[str, config.Section, list[str], bool]:
    """Command, its config, notes for the user, and whether only the config is to be printed.

    Raises:
        ConfigError: an unknown command, key or value.
    """
    argv = [arg for arg in argv if not arg.startswith(("--local_rank=", "--local-rank="))]  # the launcher's
    if not argv or argv[0] in ("-h", "--help"):
        _print_overview()
        raise SystemExit(EXIT_DONE if argv else EXIT_USER)
    if argv[0] in ("-V", "--version"):
        print(f"dpo-ds {__version__}")
        raise SystemExit(EXIT_DONE)
    if argv[0].split("=")[0] == "--completion":
        from dpo_ds.commands import completion

        shell = " ".join([*argv[0].split("=")[1:], *argv[1:]])
        parsers = {name: _parser_about("train", name) if name in ABOUT_A_RUN else parser_for(name) for name in COMMANDS}
        print(completion.script(shell, parsers, {name: command.summary for name, command in COMMANDS.items()}))
        raise SystemExit(EXIT_DONE)
    command = argv[0]
    if command not in COMMANDS:
        raise ConfigError(f"unknown command {command!r}; {config.did_you_mean(command, COMMANDS)}")
    if command in ABOUT_A_RUN:
        return _parse_about(command, argv[1:])
    return _resolved(command, *parser_for(command).parse_known_args(argv[1:]))


def _parser_about(command: str, looks: str) -> argparse.ArgumentParser:
    """The parser of `command`, with the flags of the one that looks at it beforehand."""
    parser, about = parser_for(command), ABOUT_A_RUN[looks]
    parser.prog, parser.usage, parser.epilog = f"dpo-ds {looks}", about.USAGE, about.EPILOG
    parser.description = about.CONFIG.__doc__
    own = parser.add_argument_group(f"{looks}'s own")
    own.add_argument("yaml", nargs="?", metavar="RUN.YAML", help="the same as --config; the keys above override it")
    what = "the run's (default: by the sections that its file has; train where those do not tell)"
    own.add_argument("--command", choices=about.COMMANDS, help=what)
    about.add_to(own)
    return parser


def _parse_about(looks: str, argv: Sequence[str]) -> tuple[str, config.Section, list[str], bool]:
    """The config of the run that is looked at, with the settings of the command that looks around it."""
    told = _first_look(looks, argv)
    command = told.command or _command_of(told.yaml or told.config, told)
    if command not in ABOUT_A_RUN[looks].COMMANDS:
        known = ", ".join(ABOUT_A_RUN[looks].COMMANDS)
        raise ConfigError(f"this is a run of dpo-ds {command}, by its sections; dpo-ds {looks} looks at {known}")
    given, unknown = _parser_about(command, looks).parse_known_args(argv)
    path, _ = vars(given).pop("yaml"), vars(given).pop("command")
    if path and given.config:
        raise ConfigError(f"--config {given.config} and {path}: give the config once")
    given.config = path or given.config
    own = ABOUT_A_RUN[looks].taken_from(given)
    _, run, notes, print_config = _resolved(command, given, unknown)
    if print_config:
        return command, run, notes, True
    return looks, ABOUT_A_RUN[looks].CONFIG(run=run, **own), notes, False


def _first_look(looks: str, argv: Sequence[str]) -> argparse.Namespace:
    """Reads the command line before it is known which command's keys it has: those of all of them are known here."""
    parser = _parser_about("train", looks)
    others = {key for command in ABOUT_A_RUN[looks].COMMANDS for key in config.keys(config.COMMANDS[command])}
    for key in others - config.keys(config.COMMANDS["train"]).keys():
        parser.add_argument(f"--{key}", default=argparse.SUPPRESS)
    return parser.parse_known_args(argv)[0]


def _command_of(path: str | None, told: argparse.Namespace) -> str:
    """Returns which training command a config is for, by its sections, those on the command line included."""
    sections = {} if path is None else yaml_file.read_mapping(Path(path).expanduser(), "config")
    sections = {*sections, *(key.split(".")[0] for key in vars(told) if "." in key)}
    if "rl" in sections:
        return "rl"
    return "reward" if "reward" in sections and not {"loss", "reference"} & sections else "train"


def _resolved(
    command: str, given: argparse.Namespace, unknown: Sequence[str]
) -> tuple[str, config.Section, list[str], bool]:
    for arg in unknown:
        key = arg.split("=", 1)[0].lstrip("-")
        known = config.keys(config.COMMANDS[command])
        if arg.startswith("--"):
            raise ConfigError(f"unknown key --{key}; {config.known_instead(key, known)}")
        raise ConfigError(f"unexpected argument {arg!r}; settings are given as --section.key value")
    overrides = vars(given)
    yaml_path, print_config = overrides.pop("config"), overrides.pop("print_config")
    if "verify" in overrides:
        return VERIFY, config.VerifyConfig(verify=overrides["verify"]), [], False
    run, notes = config.load(command, yaml_path and os.path.expanduser(yaml_path), overrides)
    if command == "train":
        from dpo_ds.losses import with_reference_of_loss

        run = with_reference_of_loss(run)
    if command == "rl" and run.rl.algorithm == "online_dpo":
        from dpo_ds.losses import check_online

        check_online(run)
    return command, run, notes, print_config


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command on this rank; returns its exit code. Signals are heard where this is the main thread."""
    with signals.taken():
        return _run(sys.argv[1:] if argv is None else argv)


def _run(argv: Sequence[str]) -> int:
    launch, meeting, has_started, code = ALONE, None, False, EXIT_FAULT
    _quiet_torch()
    try:
        launch, wrong_launch = _launch()
        command, run, notes, print_config = parse(argv)
        if launch.is_first:
            for note in notes:
                print(f"dpo-ds: {note}", file=sys.stderr)
        if print_config:
            if launch.is_first:
                print(yaml.safe_dump(config.to_plain(run), sort_keys=False), end="")
            code = EXIT_DONE
            return code
        if wrong_launch is not None:
            raise wrong_launch
        by_one = command in COMMANDS and COMMANDS[command].by_one
        if by_one and not launch.is_first:
            code = EXIT_DONE
            return code
        for note in launch_notes():
            print(f"dpo-ds: {note}", file=sys.stderr, flush=True)
        if launch.world_size > 1 and not by_one:
            meeting = _meet(launch)
            meeting.compare(config.flatten(config.to_plain(run)), lets_code_differ=command == "doctor")
        has_started = True
        code = _start(command, run)
        signals.leave_to_others()
        if code and meeting:
            meeting.let_rank_0_go_first()
    except signals.Stopped as stopped:
        signals.leave_to_others()
        code = EXIT_STOPPED
        if launch.is_first:
            print(f"dpo-ds: {stopped.line()}", flush=True)
        if meeting:
            meeting.stop(str(stopped))
    except UserError as mistake:
        signals.leave_to_others()
        code = EXIT_USER
        if isinstance(mistake, CutOff):
            speaks = launch.is_first_on_node
        else:
            speaks = meeting.speaks(str(mistake)) if meeting else launch.is_first
        if launch.is_first and not has_started and not (argv and argv[0] in ABOUT_A_RUN):
            _leave_status(argv, str(mistake))
        if speaks:
            print(f"dpo-ds: error: {mistake}", file=sys.stderr, flush=True)
    except TrainingError as end:  # on every rank alike
        signals.leave_to_others()
        if os.environ.get("DPO_DS_VERBOSE"):
            raise
        if launch.is_first:
            print(f"dpo-ds: error: {end}", file=sys.stderr, flush=True)
    except Exception as fault:
        signals.leave_to_others()
        if meeting:
            meeting.watch.fault(fault)
        raise
    finally:
        if meeting:
            meeting.close(code)
    return code


def _launch() -> tuple[Launch, ConfigError | None]:
    """Returns which rank this is; where the environment is wrong, a process alone that says so once it has to."""
    try:
        return from_environment(), None
    except ConfigError as mistake:
        return ALONE, mistake


def _quiet_torch() -> None:
    """Before torch is imported: else its C++ half tells of every socket, and of the GPU it guesses for one rank."""
    if not os.environ.get("DPO_DS_VERBOSE"):
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def _meet(launch: Launch):
    """Returns the meeting of all ranks. Brings torch in."""
    from dpo_ds.cluster import rendezvous

    return rendezvous.meet(launch)


def _start(command: str, run: config.Section) -> int:
    """Starts the work of a command; its module, which brings torch in, is imported here, after parsing."""
    module, function = (VERIFY_START if command == VERIFY else COMMANDS[command].start).split(":")
    start = getattr(importlib.import_module(f"dpo_ds.commands.{module}"), function)
    return start(run)


def _leave_status(argv: Sequence[str], mistake: str) -> None:
    """Replaces what an earlier run left in STATUS.json, lest it pass for this one's, also if the keys could not be
    read.

    Without an earlier run it is written for torchrun's sake, which returns 1 whatever the ranks do.
    """
    given = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    given.add_argument("--output_dir")
    given.add_argument("--config")
    if argv and argv[-1] in ("--output_dir", "--config"):
        argv = argv[:-1]  # its value is what is missing
    found, _ = given.parse_known_args(argv)
    output_dir = found.output_dir
    if output_dir is None and found.config is not None:
        with contextlib.suppress(ConfigError):  # the file itself may be the mistake
            output_dir = yaml_file.read_mapping(Path(found.config), "config").get("output_dir")
    try:
        folder = Path(config.path_of(output_dir))
    except ValueError:  # the mistake may be this very path
        return
    if not (folder / "STATUS.json").is_file() and "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    from dpo_ds.cluster.shared_files import is_at_work
    from dpo_ds.training.output_dir import is_a_runs, write_status  # torch comes in with it

    if not is_a_runs(folder):
        if "TORCHELASTIC_RUN_ID" not in os.environ or any(folder.glob("*")):
            return
        with contextlib.suppress(OSError):  # write_status says so
            folder.mkdir(parents=True, exist_ok=True)
    if not is_at_work(folder):
        write_status(folder, "failed", mistake, exit_code=EXIT_USER)


def _print_overview() -> None:
    print("usage: dpo-ds COMMAND [--config run.yaml] [--section.key value ...]\n\ncommands:")
    for name, command in COMMANDS.items():
        print(f"  {name:<12}{command.summary}")
    print("\n`dpo-ds COMMAND --help` lists the keys of a command.")
    print("`dpo-ds --completion {bash,zsh,fish}` prints a script for your shell that completes them.")


def default_of(field) -> str:
    """Returns a key's default as YAML has it."""
    default = field.get_default(call_default_factory=True)
    if default is None or isinstance(default, bool):
        return "null" if default is None else str(default).lower()
    return f"[{', '.join(map(str, default))}]" if isinstance(default, list | tuple) else str(default)
