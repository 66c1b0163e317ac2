"""Commands and what they need: run once each, several side by side, shown as a user would type them."""

from __future__ import annotations

import hashlib
import json
import os
import queue
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

PROGRAM = (min(sys.executable, os.path.relpath(sys.executable), key=len), "-m", "dpo_ds")


class StepFailed(Exception):
    """A command did not end with exit code 0; the message says which and where its log is."""


@dataclass(frozen=True)
class Step:
    """`dpo-ds ARGV`, which fills the folder `output`, once the steps named in `needs` are done.

    reads: files and folders that no step makes.
    """

    name: str
    argv: tuple[str, ...]
    output: Path
    needs: tuple[str, ...] = ()
    reads: tuple[Path, ...] = ()


class Runner:
    """Runs steps in the order of their list, `jobs` side by side, each pinned to its share of the cores: dpo-ds takes a
    thread for every core that it may use.

    A step that ended leaves a mark with a digest of its command, what it reads and all that went before; while that
    stays the same it is not run again. One that was killed is started again as it was, and dpo-ds resumes.
    """

    def __init__(self, folder: Path, jobs: int):
        """folder: for marks and logs."""
        self.folder = folder
        self._shares: queue.Queue[list[int]] = queue.Queue()
        cores = sorted(os.sched_getaffinity(0))
        for slot in range(jobs := min(jobs, len(cores))):
            self._shares.put(cores[slot::jobs])
        self._running: set[subprocess.Popen] = set()
        self._stopped = False
        self._lock = threading.Lock()

    def run(self, steps: Sequence[Step]) -> dict[str, float]:
        """All of them; returns the wall time of each, in seconds, this time or when it was run.

        Raises:
            StepFailed: the first that did; those that run meanwhile are ended.
        """
        done: dict[str, Future] = {}
        with ThreadPoolExecutor(self._shares.qsize()) as pool:
            try:
                for step in steps:  # a step's needs were submitted before it, so a worker never waits for one to begin
                    done[step.name] = pool.submit(self._after, [done[name] for name in step.needs], step)
                finished, _ = wait(done.values(), return_when=FIRST_EXCEPTION)
                for future in finished:
                    future.result()
            finally:
                self._end(pool)
        return {step.name: json.loads(self._mark(step).read_text())["seconds"] for step in steps}

    def _after(self, needed: Sequence[Future], step: Step) -> str:
        """The step's digest, once it is done."""
        digest = _digest(step, [future.result() for future in needed])
        mark = self._mark(step)
        before = json.loads(mark.read_text()) if mark.exists() else {}
        if before == before | {"digest": digest, "done": True}:
            print(f"{step.name}: done before", flush=True)
            return digest
        if before.get("digest") != digest:
            shutil.rmtree(step.output, ignore_errors=True)
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text(json.dumps({"digest": digest, "done": False}))
        share = self._shares.get()
        try:
            seconds = self._execute(step, share)
        finally:
            self._shares.put(share)
        mark.write_text(json.dumps({"digest": digest, "done": True, "seconds": seconds}))
        return digest

    def _execute(self, step: Step, cores: Sequence[int]) -> float:
        argv = ["taskset", "-c", ",".join(map(str, cores)), *PROGRAM, *step.argv]
        log_path, started = self._mark(step).with_suffix(".log"), time.monotonic()
        with self._lock:  # else one could begin after _end
            if self._stopped:
                raise StepFailed(f"{step.name}: not started")
            print(f"\n$ {shown(argv)}", flush=True)
            with log_path.open("wb") as log:
                process = subprocess.Popen(argv, stdout=log, stderr=subprocess.STDOUT)
            self._running.add(process)
        code = process.wait()
        self._running.discard(process)
        if code:
            last = log_path.read_text(errors="replace").strip().splitlines()[-1:]
            raise StepFailed(f"{step.name} ended with exit code {code}: {' '.join(last)}\n  log  {log_path}")
        seconds = time.monotonic() - started
        print(f"{step.name}: done in {seconds:.0f} s", flush=True)
        return seconds

    def _end(self, pool: ThreadPoolExecutor) -> None:
        """Of what still runs, which after the last step is nothing."""
        with self._lock:
            self._stopped = True
            for process in list(self._running):
                process.terminate()
        pool.shutdown(cancel_futures=True)

    def _mark(self, step: Step) -> Path:
        return self.folder / f"{step.name}.json"


def shown(argv: Sequence[str]) -> str:
    """For a shell, every key on a line of its own."""
    return shlex.join(argv).replace(" --", " \\\n    --")


def _digest(step: Step, before: Sequence[str]) -> str:
    files = [path for given in step.reads for path in sorted([given, *given.rglob("*")]) if path.is_file()]
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    return hashlib.sha256(json.dumps([step.argv, hashes, *before]).encode()).hexdigest()
