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
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dpo_ds.training.samples import Sample

FOLDER = "trackers"  # in output_dir: what each prints, and its own id of the run
PACKAGES = {"comet": "comet_ml"}  # where it is not called like the tracker
LIMIT = 16 << 20  # bytes that may wait for the process to take them
SILENT_SECONDS = 60  # without an answer, after which the user is told
LAST_SECONDS = 30  # for the last lines, at the end of the run
IN_VAIN_SECONDS = 3  # where lines were lost already, or the run is ending in a hurry
# What launchers say of this rank: accelerate would look for the others.
RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_", "PMI", "MPI_", "OMPI_", "MV2_")


class RemoteTracker:
    """Sends what it is given without waiting, and keeps what the process has not taken. Methods return a problem.

    begin: what trackers/__main__.py wants to know of the run. say: for the line that tells where to look.
    """

    def __init__(self, name: str, output_dir: Path, begin: dict[str, Any], say: Callable[[str], None]):
        self.name, self._say = name, say
        self._begin, self._folder = begin, output_dir / FOLDER
        self._process: subprocess.Popen | None = None
        self._unsent, self._answers = bytearray(), b""
        self._asked, self._answered = 0, 0
        self._heard = time.monotonic()
        self._in_vain, self._has_ended = False, False

    def start(self) -> str | None:
        """Starts the process; the tracker itself comes up while training begins."""
        package = PACKAGES.get(self.name, self.name)
        if find_spec(package) is None:
            self._has_ended = True
            return f"it is not installed: pip install {package}"
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
        return self._send("begin", self._begin)

    def add(self, line: dict[str, float]) -> str | None:
        return self._send("log", line)

    def show(self, step: int, samples: Sequence[Sample]) -> str | None:
        return self._send("show", {"step": step, "rows": [[sample.prompt, sample.completion] for sample in samples]})

    def finish(self, in_order: bool) -> str | None:
        """Asks for the end, which `close` waits for; in_order: whether the run has come to its own."""
        self._in_vain |= not in_order
        return self._send("finish", None)

    def close(self) -> str | None:
        """Waits a little for what is left, and ends the process."""
        if self._process is None:
            return None
        seconds = IN_VAIN_SECONDS if self._in_vain else LAST_SECONDS
        deadline, problem = time.monotonic() + seconds, None
        while not self._has_ended and self._answered < self._asked and (left := deadline - time.monotonic()) > 0:
            select.select([self._socket], [self._socket] if self._unsent else [], [], left)
            problem = self._exchange() or problem
        if not self._has_ended and self._answered < self._asked:
            problem = problem or f"it did not take the last ones within {seconds} s"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._socket.close()
        return problem

    def _send(self, kind: str, content: Any) -> str | None:
        if self._has_ended:
            return None
        if self._answered == self._asked:
            self._heard = time.monotonic()  # silence counts from the first question
        if len(self._unsent) < LIMIT:
            self._asked += 1
            self._unsent += (json.dumps({kind: content}) + "\n").encode()
            problem = self._exchange()
        else:
            problem = self._exchange() or "it takes them slower than they come"
        if problem is None and self._answered < self._asked and time.monotonic() - self._heard > SILENT_SECONDS:
            problem = f"it has not answered for {SILENT_SECONDS} s"
        self._in_vain |= problem is not None
        return problem

    def _exchange(self) -> str | None:
        """Sends what the process takes now, and reads what it has answered by now."""
        problem = None
        try:
            with contextlib.suppress(BlockingIOError):
                while self._unsent:
                    del self._unsent[: self._socket.send(self._unsent)]
            with contextlib.suppress(BlockingIOError):
                while received := self._socket.recv(1 << 16):
                    self._answers += received
                self._has_ended = True
        except OSError:  # as when it has died with something unread
            self._has_ended = True
        *lines, self._answers = self._answers.split(b"\n")
        for line in lines:
            problem = self._take(json.loads(line)) or problem
        if self._has_ended and self._answered < self._asked:
            problem = problem or f"its process has ended; see {self._folder / self.name}.log"
        return problem

    def _take(self, answer: dict[str, Any]) -> str | None:
        self._answered, self._heard = self._answered + 1, time.monotonic()
        if "id" in answer:
            self._say(f"{self.name}: run {self._begin['name']}, {answer['address'] or answer['id']}")
        return answer["problem"]
