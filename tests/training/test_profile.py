"""Which steps are recorded, what is written, and what is told."""

import gzip
import json

import torch

from dpo_ds.training.profile import TRACE, StepProfile


def run(folder, steps, last) -> list[str]:
    said = []
    profile = StepProfile(folder / "profile", steps, said.append)
    for step in range(1, last + 1):
        with profile.around(step), torch.profiler.record_function(f"step {step}"):
            torch.ones(64, 64) @ torch.ones(64, 64)
    profile.finish()
    return said


def recorded(folder) -> set[str]:
    trace = json.loads(gzip.open(folder / "profile" / TRACE).read())
    return {event["name"] for event in trace["traceEvents"] if event.get("name", "").startswith("step ")}


def test_two_steps_in_the_middle(tmp_path):
    first, *rows, last = run(tmp_path, (2, 3), last=5)
    assert first.startswith("2 steps of ") and "the CPU worked" in first
    assert any("aten::mm" in row and "%" in row and " 1 calls" in row for row in rows) and len(rows) <= 12
    assert TRACE in last and recorded(tmp_path) == {"step 2", "step 3"}


def test_a_run_that_ends_before_writes_what_there_is(tmp_path):
    assert run(tmp_path, (2, 9), last=3)[0].startswith("2 steps of ")
    assert recorded(tmp_path) == {"step 2", "step 3"}


def test_a_run_without_these_steps_says_so(tmp_path):
    assert run(tmp_path, (7, 9), last=3) == ["train.profile_steps [7, 9]: the run had none of these steps"]
    assert run(tmp_path, None, last=3) == [] and not list(tmp_path.iterdir())
