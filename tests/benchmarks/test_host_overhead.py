"""The measurement of a step's host time runs, and sees what ZeRO-3 adds to a plain model's step."""

import json
import os
import statistics
import subprocess
import sys

from tests.ranks import ROOT


def test_every_contender_takes_its_rounds(tmp_path):
    out = tmp_path / "host.json"
    command = [sys.executable, "tests/benchmarks/host_overhead.py", "--rounds", "3", "--steps", "2", "--out", str(out)]
    command += ["--set", "train.max_grad_norm=0"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    cpu = json.loads(out.read_text())["cpu_seconds"]
    assert list(cpu) == [
        "bare model and AdamW",
        "dpo-ds train",
        "dpo-ds train, modules fetched alone",
        "dpo-ds train, train.max_grad_norm=0",
    ]
    assert all(len(seconds) == 3 for seconds in cpu.values())
    assert statistics.median(cpu["dpo-ds train"]) > statistics.median(cpu["bare model and AdamW"]) > 0.001
