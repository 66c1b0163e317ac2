"""Runs short jobs of two ranks, on a machine that has other work, and counts how they end.

`python -m tests.faults.ends 200`: every rank must end with 0 once its work is done, whatever threads of C++ libraries
are still about. Exit code 1 if any does not; its output is printed.
"""

from __future__ import annotations

import argparse
import collections
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.forkserver import fork_server
from tests.small_jobs import make_world, train_command

BUSY = "while True: sum(range(10**6))"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.ends", description=__doc__)
    parser.add_argument("count", type=int, nargs="?", default=200)
    parser.add_argument("--load", type=int, default=os.cpu_count(), help="busy processes beside the ranks")
    parser.add_argument("--seconds", type=float, default=1e9, help="no further job begins after so long")
    args = parser.parse_args()
    load = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(args.load)]
    ends: collections.Counter = collections.Counter()
    started = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="dpo_ds-ends-") as folder, fork_server() as forks:
            world = make_world(Path(folder), hidden=16, layers=1)
            for number in range(args.count):
                if time.monotonic() - started > args.seconds:
                    break
                command = train_command(world, f"run-{number}", train__max_steps=2, checkpoint__every=1)
                logs, env = world / "logs", {"DPO_DS_CACHE": str(world / "cache")}
                codes, output = forks.run(command, 2, logs, finalize=True, timeout=300, **env)
                ends[tuple(codes)] += 1
                if codes != [0, 0]:
                    print(f"job {number} ended with {codes}:\n{output}", flush=True)
                shutil.rmtree(world / f"run-{number}", ignore_errors=True)
    finally:
        for process in load:
            process.kill()
    seconds = time.monotonic() - started
    print(f"{ends.total()} jobs ended with {dict(ends)} in {seconds:.0f} s", flush=True)
    return 0 if set(ends) == {(0, 0)} else 1


if __name__ == "__main__":
    sys.exit(main())
