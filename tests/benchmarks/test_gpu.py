"""The command for a machine with a GPU, in miniature on this one, and the processes that it is made of."""

import json
import math
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.benchmarks import gpu, jobs
from tests.ranks import ROOT


def test_step_in_miniature(tmp_path):
    command = [sys.executable, "tests/benchmarks/gpu.py", "step", "--small", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    live, cached = (case["results"] for case in report["parts"]["step"]["cases"])
    names = ["packed, live reference", "TRL, live reference", "packed, live reference, not compiled"]
    assert list(live) == [name for name in names if find_spec("trl") or "TRL" not in name]
    for result in live.values():  # policy and reference are the same model: every margin is 0
        assert result["first_loss"] == pytest.approx(math.log(2), abs=1e-4)
    # The drawn cache says -10 for every token, the model about -ln 5000 = -8.5: the first loss is no ln 2.
    assert cached["packed, cached reference"]["first_loss"] != pytest.approx(math.log(2), abs=1e-4)
    assert all(case["memory_bytes"] > 0 < case["tokens_per_second"] for case in (*live.values(), *cached.values()))
    assert "| packed, live reference |" in (tmp_path / "gpu.md").read_text()


def test_a_part_that_fails_or_has_no_time_leaves_the_others_theirs(tmp_path, monkeypatch, capsys):
    def broken(run):
        raise RuntimeError("no such kernel")

    parts = {"head": gpu.Part(broken, 1), "attention": gpu.Part(lambda run: {"table": "| 1 ms |"}, 1)}
    monkeypatch.setattr(gpu, "PARTS", parts | {"step": gpu.Part(broken, 10**6)})
    assert gpu.main(["--out", str(tmp_path)]) == 1
    text = (tmp_path / "gpu.md").read_text()
    assert "no such kernel" in text and "| 1 ms |" in text and "skipped: 5" in text
    assert "Traceback" in capsys.readouterr().err
    assert gpu.main(["attention", "--out", str(tmp_path)]) == 0


def raises():
    print("about to fail")
    raise ValueError("seven is no even number")


def test_a_failure_says_what_the_process_said(tmp_path):
    with pytest.raises(jobs.JobFailed, match=r"raises ended early, exit codes \[1\]") as failure:
        jobs.call(raises, log=tmp_path / "log")
    assert "about to fail" in str(failure.value) and "seven is no even number" in str(failure.value)


def waits(pid_file: Path):
    pid_file.write_text(str(subprocess.Popen(["sleep", "600"]).pid))
    time.sleep(600)


def test_what_takes_too_long_is_ended_with_all_that_it_started(tmp_path):
    with pytest.raises(jobs.JobFailed, match="took too long"):
        jobs.call(waits, tmp_path / "pid", log=tmp_path / "log", seconds=3)
    pid = int((tmp_path / "pid").read_text())
    for _ in range(50):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":  # nobody may be there to take its exit code
            return
        time.sleep(0.1)
    raise AssertionError(f"process {pid} still runs")


def add(a, b):
    print(f"{a} + {b}")
    return a + b


@pytest.mark.parametrize("touched", [False, True], ids=["fork", "spawn"])
def test_an_answer_comes_back_also_from_a_fresh_process(tmp_path, monkeypatch, capsys, touched):
    monkeypatch.setattr(jobs, "HAS_GPU", True)
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: touched)
    driver = SimpleNamespace(cuDeviceGetCount=lambda count: 3)  # CUDA_ERROR_NOT_INITIALIZED
    monkeypatch.setattr(jobs.ctypes, "CDLL", lambda name: driver)
    assert jobs.call(add, 2, 3, log=tmp_path / "log", shown=True) == 5
    assert "2 + 3" in capsys.readouterr().out and "2 + 3" in (tmp_path / "log").read_text()
