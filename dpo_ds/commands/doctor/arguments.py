"""The flags of `dpo-ds doctor` that are not keys of the run's config. Imports no torch."""

from __future__ import annotations

import argparse

from dpo_ds.config import CHECKS, TRAINING, DoctorConfig, did_you_mean
from dpo_ds.errors import ConfigError

CONFIG = DoctorConfig
COMMANDS = TRAINING  # that it looks at
USAGE = "dpo-ds doctor RUN.YAML [--lenient CHECK,...] [--json] [--section.key value ...]"
EPILOG = "Command line beats YAML beats defaults. Exit code 0: no check failed; 1: one did; 2: a mistake."


def add_to(parser: argparse._ArgumentGroup) -> None:
    """Gives `parser` what DoctorConfig has beside the run."""
    what = f"checks whose failure is to be a warning: {', '.join(CHECKS)}"
    parser.add_argument("--lenient", metavar="CHECK,...", default="", help=what)
    parser.add_argument("--json", action="store_true", dest="as_json", help="print one JSON object in place of lines")


def taken_from(given: argparse.Namespace) -> dict:
    """Returns DoctorConfig's own fields and takes them out of `given`.

    Raises:
        ConfigError: no such check.
    """
    own = {name: vars(given).pop(name) for name in ("lenient", "as_json")}
    lenient = tuple(filter(None, own["lenient"].split(",")))
    for name in lenient:
        if name not in CHECKS:
            raise ConfigError(f"--lenient {name}: no such check; {did_you_mean(name, CHECKS)}")
    return own | {"lenient": lenient}
