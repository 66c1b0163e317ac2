"""Hands a run's metrics to a tracker (wandb, mlflow, ...) that works in a process of its own.

A tracker's library talks to a server, starts threads, registers work for the end of the program and, through
accelerate, asks for the process group. In its own process it can hang, fail or be killed, and training goes on:
nothing here ever waits, but for a few seconds at the end of the run.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dpo_ds.training.samples import Sample
from dpo_ds.training.trackers.services import CLASSES, FOLDER

LIMIT = 16 << 20  # bytes that may wait for the process to take them
SILENT_SECONDS = 60  # without an answer, after which the user is told
LAST_SECONDS = 30  # for the last lines, at the end of the run
IN_VAIN_SECONDS = 3  # where lines were lost already, or the run is ending in a hurry
# What launchers say of this rank: accelerate would look for the others.
RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_", "PMI", "MPI_", "OMPI_", "MV2_")


class RemoteTracker:
    """Sends what it is given without waiting, and keeps what the process has not taken. What goes wrong is told once.

    begin: what trackers/__main__.py wants to know of the run, beside its config. say: for lines to the user.
    """

    def __init__(
        self, name: str, output_dir: Path, begin: dict[str, Any], config: dict[str, Any], say: Callable[[str], None]
    ):
        self.name, self._say = name, say
        self._begin, self._config, self._folder = begin, config, output_dir / FOLDER
        self._process: subprocess.Popen | None = None
        self._unsent, self._answers = bytearray(), b""
        self._asked: deque[str] = deque()  # of what has no answer yet: what it means if it gets none
        self._heard = 0.0  # the last answer, or the first question after silence
        self._has_failed, self._has_ended = False, False

    def start(self) -> None:
        """Starts the process; the tracker itself comes up while training begins."""
        package, nothing = CLASSES.get(self.name, self.name), "shows nothing of this run"
        found = find_spec(package)
        if found is None or found.origin is None:  # None: a folder of this name, as wandb makes one
            self._fail(nothing, f"it is not installed: pip install {package}")
            return
        self._folder.mkdir(exist_ok=True)
        self._socket, theirs = socket.socketpair()
        self._socket.setblocking(False)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(RANKS)}
        with theirs, (self._folder / f"{self.name}.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "dpo_ds.training.trackers", self.name, str(theirs.fileno())],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[theirs.fileno()], start_new_session=True,
                env=kept | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        self._send("begin", self._begin, nothing)
        self._send("configure", self._config, "lacks the run's config")

    def add(self, line: dict[str, float]) -> None:
        self._send("log", line, _without(line["step"]))

    def show(self, step: int, samples: Sequence[Sample]) -> None:
        rows = [[sample.prompt, sample.completion] for sample in samples]
        self._send("show", {"step": step, "rows": rows}, _without(step))

    def finish(self, step: int, has_failed: bool = False) -> None:
        """Asks for the end after `step`, which `close` waits for; has_failed: what is said of the run."""
        self._send("finish", has_failed, _without(step))

    def close(self, in_a_hurry: bool = False) -> None:
        """Waits a little for what is left, less in a hurry or where it is in vain, and ends the process."""
        if self._process is None:
            return
        seconds = IN_VAIN_SECONDS if in_a_hurry or self._has_failed else LAST_SECONDS
        deadline = time.monotonic() + seconds
        while not self._has_ended and self._asked and (left := deadline - time.monotonic()) > 0:
            select.select([self._socket], [self._socket] if self._unsent else [], [], left)
            self._exchange()
        if not self._has_ended and self._asked:
            self._fail(self._asked[0], f"they are not taken after {seconds} s")
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._socket.close()

    def _send(self, kind: str, content: Any, otherwise: str) -> None:
        if self._process is None or self._has_ended:
            return
        if not self._asked:
            self._heard = time.monotonic()
        if len(self._unsent) < LIMIT:
            self._asked.append(otherwise)
            self._unsent += (json.dumps({kind: content}) + "\n").encode()
        else:
            self._fail(otherwise, "they come faster than they are taken")
        self._exchange()
        if self._asked and time.monotonic() - self._heard > SILENT_SECONDS:
            self._fail(self._asked[0], f"no answer for {SILENT_SECONDS} s")

    def _exchange(self) -> None:
        """Sends what the process takes now, and reads what it has answered by now."""
        try:
            with contextlib.suppress(BlockingIOError):
                while self._unsent:
                    del self._unsent[: self._socket.send(self._unsent)]
            with contextlib.suppress(BlockingIOError):
                while received := self._socket.recv(1 << 16):
                    self._answers += received
                self._has_ended = True
        except OSError:  # it has died with something unread
            self._has_ended = True
        *answers, self._answers = self._answers.split(b"\n")
        for answer in answers:
            self._take(json.loads(answer), self._asked.popleft())
        if self._has_ended and self._asked:
            self._fail(self._asked[0], f"its process has ended, see {self._folder / self.name}.log")

    def _take(self, answer: dict[str, Any], otherwise: str) -> None:
        self._heard = time.monotonic()
        if answer["problem"] is not None:
            self._fail(otherwise, answer["problem"])
        elif "id" in answer:
            self._say(f"{self.name}: run {self._begin['name']}, {answer['address'] or answer['id']}")

    def _fail(self, what: str, why: str) -> None:
        if not self._has_failed:
            self._say(f"{self.name} {what} ({why}); output_dir has it all")
        self._has_failed = True


def _without(step: int) -> str:
    return f"loses lines from step {step} on"
