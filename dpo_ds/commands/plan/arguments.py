"""The flags of `dpo-ds plan` that are not keys of the run's config. Imports no torch."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable

from dpo_ds.config import TRAINING, PlanConfig, path_of
from dpo_ds.errors import shorten

EFFICIENCY = 0.4  # of a card's peak
MEASURED = "one H200 came to 0.31 to 0.44, several GPUs are unmeasured"  # tests/benchmarks/RESULTS.md
MOST_GPUS = 2**20
USAGE = "dpo-ds plan RUN.YAML --gpus N --gpu CARD [--write FITTED.YAML] [--section.key value ...]"
OWN = ("gpus", "gpu", "nodes", "host_memory", "price", "efficiency", "lengths", "write", "as_json")
CONFIG = PlanConfig
COMMANDS = (*TRAINING, "rl")  # that it plans
EPILOG = "Command line beats YAML beats defaults. Exit code 0: the run fits; 1: it does not; 2: a mistake."


def add_to(parser: argparse._ArgumentGroup) -> None:
    """Gives `parser` what PlanConfig has beside the run and its file."""
    add = parser.add_argument
    add("--gpus", type=_gpus, required=True, metavar="N", help="GPUs of the run in all; auto: the fewest that do")
    what = "h100, a100, l40s, ...; or by numbers: 96GB:400TFLOPS (bf16), for rl 96GB:400TFLOPS:2TB/s"
    add("--gpu", required=True, metavar="CARD", help=what)
    add("--nodes", type=_number(int), metavar="N", help="that they are spread over (default: at most 8 GPUs each)")
    what = "of a node's host, which must hold what lies there (default: told and not judged)"
    add("--host_memory", type=_number(float), metavar="GiB", help=what)
    add("--price", type=_number(float), metavar="X", help="of a GPU for an hour, in any currency")
    what = f"share of the card's peak that the run is to reach, its MFU (default {EFFICIENCY}: {MEASURED})"
    add("--efficiency", type=_number(float, 1), default=EFFICIENCY, metavar="X", help=what)
    what = "mean tokens of your data (default: the longest that the config allows)"
    add("--lengths", type=_lengths, metavar="PROMPT,COMPLETION", help=what)
    what = "write a config that fits there, and a DeepSpeed file beside it where that changes"
    add("--write", type=_path, metavar="FILE", help=what)
    add("--json", action="store_true", dest="as_json", help="print one JSON object")


def taken_from(given: argparse.Namespace) -> dict:
    """Returns PlanConfig's own fields and takes them out of `given`."""
    return {name: vars(given).pop(name) for name in OWN} | {"file": given.config}


def _gpus(text: str) -> int | None:
    return None if text == "auto" else _number(int, MOST_GPUS)(text)


def _number(kind: type, most: float = 10**9) -> Callable[[str], float]:
    def above_zero(text: str) -> float:
        with contextlib.suppress(ValueError, OverflowError):
            if 0 < (value := kind(text)) <= most:
                return value
        raise argparse.ArgumentTypeError(f"{shorten(text)} should be 0 < {kind.__name__} <= {most}")

    return above_zero


def _lengths(text: str) -> tuple[int, int]:
    parts = [_number(int, 2**26)(part) for part in text.split(",")]
    if len(parts) != 2:
        raise argparse.ArgumentTypeError(f"{shorten(text)} should be two numbers, as 200,150")
    return tuple(parts)


def _path(text: str) -> str:
    try:
        return path_of(text)
    except ValueError as problem:
        raise argparse.ArgumentTypeError(str(problem)) from None
