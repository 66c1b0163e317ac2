"""Nobody reads what is printed, or no disk takes it: the program goes on."""

import os
import subprocess
import sys

import pytest

from tests.ranks import ROOT

PROGRAM = """
import sys
from dpo_ds.cluster import terminal
terminal.protect()
for number in range(5000):
    print("line", number, flush=number % 3 == 0)
print("für", file=sys.stderr)
terminal.finish()
open(sys.argv[1], "w").write("came to its end")
"""


@pytest.mark.parametrize("end", ["| head -n 1", ">/dev/full", "2>/dev/full >/dev/full", ">&- 2>&- <&-", "| true"])
def test_a_lost_terminal_costs_nothing(tmp_path, end):
    done = tmp_path / "done"
    command = f'"{sys.executable}" -c "$PROGRAM" "{done}" {end}; echo "${{PIPESTATUS[0]}}" >"{tmp_path}/code"'
    env = os.environ | {"PROGRAM": PROGRAM, "PYTHONPATH": str(ROOT)}
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    result = subprocess.run(["bash", "-c", command], env=env, text=True, **streams)
    assert (tmp_path / "code").read_text() == "0\n", result.stderr
    assert done.read_text() == "came to its end", "and no line landed in the file"
    assert "Traceback" not in result.stderr and "Exception ignored" not in result.stderr


def test_a_terminal_that_is_ascii(tmp_path):
    env = os.environ | {"PYTHONIOENCODING": "ascii:strict", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", PROGRAM, tmp_path / "done"], env=env, capture_output=True)
    assert done.returncode == 0 and done.stderr == b"f\\xfcr\n"


LOST_BEFORE = """
import os, sys
from dpo_ds.cluster import terminal
sys.stdout = os.fdopen(os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT), "w")
print("begun", end="", flush=sys.argv[2] == "file")  # else: the stream holds it
reader, writer = os.pipe()
os.close(reader)
os.dup2(writer, sys.stdout.fileno())
terminal.protect()
print("line")
terminal.finish()
"""


@pytest.mark.parametrize("begun", ["file", "held"])
def test_a_terminal_lost_before_it_is_protected(tmp_path, begun):
    """The stream was a file's, which tells where it stands, and is now a pipe that nobody reads."""
    command, env = [sys.executable, "-c", LOST_BEFORE, tmp_path / "log", begun], os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
