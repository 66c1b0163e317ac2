"""Breaks a two-rank job in random ways, resumes it, and compares it with the run that nothing happened to.

`make faults N=20`, or `python -m tests.faults 20 [--seed S]`: every fault prints its seed, which alone repeats it. Exit
code 1 if any run ends with other weights or other metrics, or a message is missing.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.faults.faults import FAULTS, NOT_TRIED, Broken, Job
from tests.forkserver import fork_server
from tests.small_jobs import make_world


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("count", type=int, nargs="?", default=20)
    parser.add_argument("--seed", type=int, help="of the first fault; the others count on from it")
    args = parser.parse_args()
    first = args.seed if args.seed is not None else random.SystemRandom().randrange(10**6)
    failures, untried, started = [], 0, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dpo_ds-faults-") as folder, fork_server() as forks:
        job = Job(forks, make_world(Path(folder), hidden=16, layers=1))
        job.run_whole()
        for number in range(args.count):
            rng = random.Random(first + number)
            fault = FAULTS[(first + number) % len(FAULTS)]
            out = f"fault-{number}"
            try:
                outcome = fault(job, out, rng)
                untried += NOT_TRIED in outcome
            except Broken as broken:
                failures.append(first + number)
                outcome = f"FAILED: {broken}"
            print(f"{number + 1}/{args.count} seed {first + number} {fault.__name__}: {outcome}", flush=True)
            shutil.rmtree(job.world / out, ignore_errors=True)
    held = args.count - len(failures) - untried
    seconds = time.monotonic() - started
    print(f"{held} of {args.count} faults held, {untried} did not come about, {seconds:.0f} s", flush=True)
    for seed in failures:
        print(f"repeat: python -m tests.faults 1 --seed {seed}", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
