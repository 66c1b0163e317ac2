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
