"""Serves one tracker in a process of its own: `python -m dpo_ds.training.trackers NAME SOCKET`, started by remote.py.

It reads messages, a JSON object a line, and answers each with one; the first says which run it is. Where messages end
without a word, the run has died, and this process ends soon after.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import PartialState

from dpo_ds.cluster.foreign import told
from dpo_ds.cluster.shared_files import write_text
from dpo_ds.cluster.signals import SIGNALS
from dpo_ds.training.trackers.services import FOLDER, SERVICES, Run, start

ORPHAN_SECONDS = 30  # to end a tracker whose run has died


class Served:
    """A tracker at work. Each method takes what a message holds under its name."""

    def __init__(self, name: str, begin: dict[str, Any]):
        """Starts it. begin: project, name, folder; resumes: whether the run goes on, with the id that is kept in
        trackers/NAME.json.
        """
        self._service = SERVICES[name]
        folder = Path(begin["folder"])
        kept = folder / FOLDER / f"{name}.json"
        known = json.loads(kept.read_text(encoding="utf-8"))["id"] if begin["resumes"] and kept.is_file() else None
        self._run = Run(begin["project"], begin["name"], folder, known)
        self._tracker = start(name, self._run)
        own = self._tracker.tracker
        self.found = {"id": self._service.identity(own), "address": self._service.address(own)}
        write_text(kept, json.dumps(self.found) + "\n")

    def configure(self, config: dict[str, Any]) -> None:
        """Shows the run's config, where it is not shown yet."""
        if self._run.id is None:
            self._tracker.store_init_configuration(config)

    def log(self, line: dict[str, float]) -> None:
        if self._service.repeats:
            self._tracker.log({name: value for name, value in line.items() if name != "step"}, step=line["step"])
        else:
            self._tracker.log(line)

    def show(self, samples: dict[str, Any]) -> None:
        if self._service.show is not None:
            self._service.show(self._tracker, samples["step"], samples["rows"], self._run)

    def finish(self, has_failed: bool) -> None:
        if has_failed:
            self._service.fail(self._tracker)
        else:
            self._tracker.finish()


def messages(own: socket.socket) -> Iterator[tuple[str, Any]]:
    """Yields what the run says, until it says no more."""
    with contextlib.suppress(ConnectionError):  # it has died before it has read an answer
        for line in own.makefile("r", encoding="utf-8"):
            if line.endswith("\n"):
                yield from json.loads(line).items()


def serve(name: str, own: socket.socket) -> None:
    """Answers message by message until there is none, or the tracker is finished."""
    served = None
    for kind, content in messages(own):
        answer: dict[str, Any] = {"problem": None}
        try:
            if kind == "begin":
                served = Served(name, content)
                answer |= served.found
            else:
                getattr(served, kind)(content)
        except (Exception, SystemExit) as error:
            answer["problem"] = told(error)
        with contextlib.suppress(OSError):  # the run has died; its lines are still here
            own.sendall((json.dumps(answer) + "\n").encode())
        if kind == "finish" or served is None:
            return
    signal.alarm(ORPHAN_SECONDS)
    served.finish(has_failed=True)


def main(name: str, descriptor: str) -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # the run's: its last lines are still to come
    PartialState(cpu=True)  # accelerate's trackers ask it before they log
    with socket.socket(fileno=int(descriptor)) as own:
        serve(name, own)
    sys.stdout.flush()
    os._exit(0)  # what libraries have registered for the end waits for servers


if __name__ == "__main__":
    main(*sys.argv[1:])
