"""Runs one command of the demo under the deepspeed launcher, shows and logs its output, and says how it ended."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from dpo_ds.cluster.launch import free_port

RANKS = 2
FOLDERS = {"sample": "sample.to", "precompute": "reference.cache"}  # where it is not output_dir with its STATUS.json
GRACE_SECONDS = 20  # what ranks get to end by themselves once their launcher is gone


class JobFailed(Exception):
    """A command did not reach its end; the message says which, how it ended and where to read more."""


def launcher() -> str:
    """The `deepspeed` program that belongs to this Python, relative to the working folder where that is shorter.

    Raises:
        JobFailed: it is not installed beside this Python.
    """
    path = Path(sys.executable).parent / "deepspeed"  # not resolved: a virtual environment's python is a link
    if not path.exists():
        raise JobFailed(f"{path} does not exist: deepspeed is not installed for {sys.executable}; run `make install`")
    return min(str(path), os.path.relpath(path), key=len)


def run(command: str, keys: dict[str, object], folder: Path) -> None:
    """`dpo_ds COMMAND --key value ...` into `folder` on two CPU ranks; its output goes to the terminal and FOLDER.log.

    Raises:
        JobFailed: the command did not end with exit code 0 and "done" in its STATUS.json, or without its MANIFEST.json.
    """
    keys = keys | {FOLDERS.get(command, "output_dir"): folder}
    argv = [launcher(), "--num_gpus", str(RANKS), "--master_port", str(free_port()), "--log_level", "critical"]
    argv += ["--module", "dpo_ds", command]
    shown = "DS_ACCELERATOR=cpu " + shlex.join(argv)
    for key, value in keys.items():
        argv += [f"--{key}", str(value)]
        shown += f" \\\n    --{key} {shlex.quote(str(value))}"
    print(f"\n$ {shown}", flush=True)
    log_path = folder.with_name(f"{folder.name}.log")
    exit_code = _teed(argv, log_path)
    if command in FOLDERS:
        witness, is_done = folder / "MANIFEST.json", (folder / "MANIFEST.json").exists()
        told = "there" if is_done else "not there"
    else:
        witness, status = folder / "STATUS.json", _status(folder / "STATUS.json")
        is_done, told = status.get("state") == "done", _described(status)
    if exit_code != 0 or not is_done:  # the launcher ends with 0 when its own helper is killed
        raise JobFailed(
            f"`dpo_ds {command}` {_ending(exit_code)}\n"
            f"  command  {shlex.join(argv)}\n"
            f"  log      {log_path}\n"
            f"  status   {witness}: {told}"
        )


def _teed(argv: list[str], log_path: Path) -> int:
    """Exit code of `argv`, run in a process group of its own that is empty when this returns or raises."""
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONUNBUFFERED": "1"}
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            # A killed launcher leaves its ranks behind, which hold the pipe open: it ends when they notice or finish.
            for line in process.stdout:
                log.write(line)
                sys.stdout.buffer.write(line)
                sys.stdout.flush()
            return process.wait()
        finally:
            _end_group(process)


def _end_group(process: subprocess.Popen) -> None:
    """Ends whatever is left of the job: SIGTERM to the launcher and its ranks, SIGKILL after the grace time."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, signum)
        except ProcessLookupError:
            return
        try:
            process.communicate(timeout=GRACE_SECONDS)  # returns when the last rank has let go of the pipe
        except subprocess.TimeoutExpired:
            continue


def _ending(exit_code: int) -> str:
    """How a launcher's exit code reads: a rank that died of signal n comes back as 256 - n, the launcher as -n."""
    who, died = ("the launcher", -exit_code) if exit_code < 0 else ("a rank", 256 - exit_code)
    names = {signum.value: signum.name for signum in signal.Signals}
    if died in names:
        hint = "; out of memory?" if died == signal.SIGKILL else ""
        return f"ended because {who} was killed by {names[died]} (exit code {exit_code}{hint})"
    if exit_code == 0:
        return "ended before its work was done (exit code 0, as when the launcher's helper process is killed)"
    return f"ended with exit code {exit_code}"


def _status(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _described(status: dict) -> str:
    if not status:
        return "not there; the command failed before rank 0 began"
    reason = f": {status['reason']}" if status["reason"] else ""
    note = " (rank 0 had no chance to write more)" if status["state"] == "running" else ""
    return f"{status['state']}, step {status['step']}{reason}{note}"
