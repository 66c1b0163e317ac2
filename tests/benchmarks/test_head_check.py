"""The head's check for a GPU, in Triton's interpreter."""

import json
import os
import subprocess
import sys

import pytest

from tests.ranks import ROOT


def run(*argv, **environment):
    command = [sys.executable, "tests/benchmarks/logprobs.py", "--gpu-check", *argv]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)


@pytest.mark.timeout(600)
def test_in_miniature(tmp_path):
    pytest.importorskip("triton")
    out = tmp_path / "head.json"
    done = run("--shapes", "16,32,512", "--json", str(out), TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(out.read_text())
    *ours, naive = report["errors"]
    assert len(ours) == 6 and all(row["log-prob"] < 5e-5 < naive["log-prob"] for row in ours)
    assert all(row["d hidden"] < 2**-7 and row["d weight"] < 2**-7 for row in ours)
    assert [row["what"] for row in report["contenders"]][:2] == ["ours, kept", "ours, 1 GiB kept"]
    assert {"fold", "fold, kept", "gradient"} < {row["what"] for row in report["kernels"]}
    assert "descriptors and pointers equal to the bit" in done.stdout


def test_without_a_gpu_it_says_so():
    pytest.importorskip("triton")
    done = run(TRITON_INTERPRET="0", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and "--gpu-check needs a GPU" in done.stderr
