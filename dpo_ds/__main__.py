"""`python -m dpo_ds`, which the deepspeed launcher, torchrun and srun start, and the script `dpo-ds`."""

import os
import sys
from typing import NoReturn

from dpo_ds.cluster import signals, terminal


def program() -> NoReturn:
    """Runs the command line in a process of its own; the first thing it does is to take signals."""
    signals.take()
    terminal.protect()
    try:
        from dpo_ds.commands.cli import main

        code = main()
    except signals.Stopped as stopped:  # while `main` was imported
        code = signals.EXIT_STOPPED
        if os.environ.get("RANK", "0") == "0":
            print(f"dpo-ds: {stopped.line()}", flush=True)
    finally:
        signals.ignore()
    terminal.finish()
    sys.exit(code)


if __name__ == "__main__":
    program()
