"""Signals from the first line of the program to the last, where no training takes them."""

import os
import signal
import subprocess
import sys
import time

import pytest

from dpo_ds.cluster import signals
from dpo_ds.cluster.signals import SIGNALS, Stopped, taken
from tests.ranks import ROOT


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_signal_ends_the_command_where_it_is(signum):
    handler = signal.getsignal(signum)
    with pytest.raises(Stopped, match=f"{signum.name} received"), taken():
        os.kill(os.getpid(), signum)
        signal.pause()
    assert signal.getsignal(signum) is handler


def test_a_storm_stops_once():
    """What tidies up after the first signal is not torn apart by the next ones."""
    with pytest.raises(Stopped, match="SIGTERM"), taken():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        finally:
            for _ in range(50):
                os.kill(os.getpid(), signal.SIGTERM)


def test_what_a_library_swallows_is_raised_again():
    with pytest.raises(Stopped), taken():
        try:
            os.kill(os.getpid(), signal.SIGUSR1)
            signal.pause()
        except BaseException:
            pass
        signals.check()


def test_nohup_stays_in_force(monkeypatch):
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with taken():
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.01)
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_the_line_says_how_to_go_on():
    assert Stopped("SIGHUP received").line() == "stopped: SIGHUP received; the same command starts it again"
    later = Stopped("SIGHUP received", 7)
    later.remedy = "the same command goes on from there"
    assert later.line() == "stopped after step 7: SIGHUP received; the same command goes on from there"


@pytest.mark.parametrize(
    "signum, delay", [(signal.SIGTERM, 0.1), (signal.SIGTERM, 0.6), (signal.SIGHUP, 0.3), (signal.SIGINT, 3)]
)
def test_the_first_seconds_of_a_program(tmp_path, signum, delay):
    """While it imports, reads its configuration, or anywhere: one line and 75. Python itself takes 0.05 s to start."""
    (tmp_path / "model").mkdir()
    keys = {"model.path": tmp_path / "model", "data.train": tmp_path, "output_dir": tmp_path / "out"}
    words = [text for key, value in keys.items() for text in (f"--{key}", str(value))]
    config = str(ROOT / "ds_configs/zero3_cpu.json")
    program = [sys.executable, "-c", PROGRAM, "train", *words, "--deepspeed.config", config]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stderr.readline() == "began\n"
    time.sleep(delay)
    for _ in range(50):
        process.send_signal(signum)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert output == f"dpo-ds: stopped: {signal.Signals(signum).name} received; the same command starts it again\n"
    assert "Traceback" not in errors


def test_a_program_ends_in_order_whatever_threads_are_left(tmp_path):
    """What was printed and registered for the end comes through; a thread in C++ or one without end does not matter."""
    code = "import atexit, sys, threading, time; from dpo_ds.__main__ import end; "
    code += f"atexit.register(lambda: open({str(tmp_path / 'registered')!r}, 'w').close()); "
    code += "threading.Thread(target=time.sleep, args=(60,)).start(); print('last words'); end(3)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (3, "last words\n", "")
    assert (tmp_path / "registered").exists()


def test_a_thread_within_a_store_does_not_abort_a_program_at_its_end():
    """With sys.exit it does, always: "terminate called without an active exception"."""
    code = "import threading, time, torch.distributed as dist; from dpo_ds.__main__ import end; "
    code += "store = dist.TCPStore('127.0.0.1', 0, 1, True, wait_for_workers=False); "
    code += "threading.Thread(target=lambda: [store.set('alive', '1') for _ in iter(int, 1)], daemon=True).start(); "
    code += "time.sleep(0.5); end(0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0 and "terminate" not in done.stderr, done.stderr


@pytest.mark.parametrize("words, code", [(["--version"], 0), (["train", "--help"], 0), ([], 2), (["trian"], 2)])
def test_commands_without_work_end_with_their_code(words, code):
    command = [sys.executable, "-m", "dpo_ds", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == code and (done.stdout if words != ["trian"] else done.stderr)


# `python -m dpo_ds`, which says when its first line has run, and whose import comes to no end.
PROGRAM = """
import sys, time
from dpo_ds import __main__
protect = __main__.terminal.protect
def began():
    protect()
    print("began", file=sys.stderr, flush=True)
__main__.terminal.protect = began
import importlib.abc
class Slow(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "dpo_ds.commands.preflight":
            time.sleep(60)
sys.meta_path.insert(0, Slow())
__main__.program()
"""
