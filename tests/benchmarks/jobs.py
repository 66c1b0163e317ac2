"""Processes of benchmarks: forks of one that has imported everything, so that nothing is imported twice or held on to.

The imports alone take half a minute on a slow host. Where something has touched the GPU before, forks could not use it;
then processes start afresh.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from dpo_ds.cluster.launch import free_port
from tests.benchmarks.machine import HAS_GPU

FOREVER = 10**6  # seconds
TAIL = 5000  # characters of a process's output in the message of its failure
LOOK_SECONDS = 0.5  # between looks at the output of a process that is shown


class JobFailed(RuntimeError):
    """A process of a benchmark ended early or took too long; the end of its output is in the message."""


def context():
    return multiprocessing.get_context("spawn" if HAS_GPU and forks_lack_the_gpu() else "fork")


def forks_lack_the_gpu() -> bool:
    """Tells whether anything in this process has initialised CUDA, which a process does once for all its forks."""
    import torch

    pid = os.fork()
    if pid == 0:
        os._exit(torch.cuda._is_in_bad_fork())  # as torch sees it
    if os.waitpid(pid, 0)[1]:
        return True
    driver = ctypes.CDLL("libcuda.so.1")  # whoever else it was
    return driver.cuDeviceGetCount(ctypes.byref(ctypes.c_int())) == 0  # else 3, CUDA_ERROR_NOT_INITIALIZED


def call(function: Callable, *args, log: Path, seconds: float = FOREVER, shown: bool = False) -> Any:
    """Returns function(*args), computed in a process of its own whose output goes to `log`, and here too if `shown`.

    Raises:
        JobFailed: it raised, exited, or was ended after `seconds`.
    """
    receiver, sender = context().Pipe(duplex=False)
    log.write_bytes(b"")
    process = context().Process(target=_answer, args=(sender, function, args, log))
    process.start()
    sender.close()
    ends = time.monotonic() + seconds
    try:
        with log.open("rb") as output:
            answered: Sequence = []
            while not answered and time.monotonic() < ends:
                answered = wait([receiver, process.sentinel], min(LOOK_SECONDS, seconds))
                if shown:
                    print(output.read().decode(errors="replace"), end="", flush=True)
        return _receive(receiver, function.__name__, [process], log, bool(answered))
    finally:
        _end(process)


class Job:
    """A contender's ranks. It computes only between `go` and the report that follows."""

    def __init__(self, name: str, run: Callable, work, folder: Path):
        self.name, self.log = name, folder / f"{name}.log"
        self.ranks, self.connections, port = [], [], str(free_port())
        for rank in range(work.ranks):
            ours, theirs = context().Pipe()
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(work.ranks), "MASTER_PORT": port}
            share = work.ranks if HAS_GPU else max(work.ranks, os.cpu_count())  # on a CPU a rank gets one thread
            place |= {"LOCAL_WORLD_SIZE": str(share), "MASTER_ADDR": "127.0.0.1"}
            log = self.log if rank == 0 else folder / f"{name}, rank {rank}.log"
            self.ranks.append(context().Process(target=_rank, args=(run, work, theirs, place, log)))
            self.ranks[-1].start()
            self.connections.append(ours)
            theirs.close()

    def report(self, seconds: float = FOREVER) -> dict:
        """Waits for what rank 0 says of the round that it has ended.

        Raises:
            JobFailed: a rank has ended, or nothing came for so many seconds.
        """
        answered = wait([self.connections[0], *(process.sentinel for process in self.ranks)], max(0, seconds))
        return _receive(self.connections[0], self.name, self.ranks, self.log, bool(answered))

    def go(self) -> None:
        for connection in self.connections:
            connection.send("go")

    def end(self) -> None:
        for process in self.ranks:
            _end(process)


def measure(
    work, contenders: dict[str, Callable], folder: Path, together: bool, seconds: float = FOREVER
) -> dict[str, list[dict]]:
    """Runs every contender's rounds and returns rank 0's reports. Round 0 is the warm-up, with all that led to it.

    together: all stay alive and take turns, so that a machine's moods strike all of them. Otherwise they come one after
    the other, each with the whole memory. seconds: for all of them.
    """
    jobs: dict[str, Job] = {}
    rounds: dict[str, list[dict]] = {}
    ends = time.monotonic() + seconds

    def take_round(job: Job) -> None:
        job.go()
        rounds[job.name].append(job.report(ends - time.monotonic()))

    try:
        for name, run in contenders.items():
            started = time.monotonic()
            jobs[name] = Job(name, run, work, folder)
            rounds[name] = [jobs[name].report(seconds)]
            cpu = rounds[name][0]["cpu_seconds"]
            print(f"ready after {time.monotonic() - started:.0f} s, {cpu:.0f} s of CPU: {name}", flush=True)
            if not together:
                for _ in range(work.rounds):
                    take_round(jobs[name])
                jobs.pop(name).end()
        for number in range(1, work.rounds + 1) if together else ():
            for job in jobs.values():
                take_round(job)
            times = ", ".join(f"{name} {seen[-1]['seconds']:.2f}" for name, seen in rounds.items())
            print(f"round {number}, seconds: {times}", flush=True)
    finally:
        for job in jobs.values():
            job.end()
    return rounds


def _receive(connection: Connection, name: str, processes: list[BaseProcess], log: Path, answered: bool) -> Any:
    with suppress(EOFError):
        if connection.poll():
            return connection.recv()
    problem = "took too long"
    if answered:
        for process in processes:
            process.join(1)
        problem = f"ended early, exit codes {[process.exitcode for process in processes]}"
    raise JobFailed(f"{name} {problem}:\n{log.read_text(errors='replace')[-TAIL:]}")


def _answer(sender: Connection, function: Callable, args: tuple, log: Path) -> None:
    _become(log)
    answer = function(*args)
    sys.stdout.flush()
    sender.send(answer)


def _rank(run: Callable, work, results: Connection, place: dict[str, str], log: Path) -> None:
    _become(log)
    os.environ.update(place)
    run(work, results)


def _become(log: Path) -> None:
    """Gives a process a group of its own, so that `_end` ends whatever it starts, and its output to `log`."""
    os.setpgid(0, 0)
    send_output(log)


def send_output(log: Path) -> None:
    """Sends all further output of this process to the end of a file."""
    with log.open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1, closefd=False) for stream in (1, 2))


def _end(process: BaseProcess) -> None:
    """Ends the process and all that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()
