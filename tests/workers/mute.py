"""`dpo-ds` whose terminal is lost: main(COMMAND LINE, WHERE) prints into a closed "pipe" or onto a "full" disk."""

from __future__ import annotations

import json
import os

from dpo_ds.cluster import terminal
from dpo_ds.commands import cli


def main(command: str, where: str) -> int:
    if where == "full":
        nowhere = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, nowhere = os.pipe()
        os.close(reader)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    terminal.protect()
    code = cli.main(json.loads(command))
    terminal.finish()
    return code
