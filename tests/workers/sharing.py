"""`dpo-ds` with the Hub and the packages that this job's environment names, read anew: sharing.py ARGUMENT..."""

import os
import sys

from huggingface_hub import constants

from dpo_ds.commands import cli


def main(*argv: str) -> int:
    sys.path[:0] = os.environ["PYTHONPATH"].split(os.pathsep)
    constants.ENDPOINT, constants.HF_HUB_DISABLE_XET = os.environ["HF_ENDPOINT"], True
    return cli.main(list(argv))
