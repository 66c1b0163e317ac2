"""Trackers and completions beside training: what a server is told, and that its end is never the run's."""

import json
import os
import time
from importlib.util import find_spec

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dpo_ds.config import TrackingSection, keys
from dpo_ds.training.samples import Sample
from dpo_ds.training.trackers import remote
from dpo_ds.training.trackers.services import CLASSES, SERVICES
from dpo_ds.training.tracking import TENSORBOARD, Tracker
from tests.ranks import ROOT
from tests.stand_ins.http import address, serving
from tests.stand_ins.mlflow import new_mlflow

LINE = {"loss": 0.5, "pairs_per_second": 1.0}
CLIENT = [] if find_spec("mlflow") else [str(ROOT / "tests/stand_ins/client")]  # the real one where it is installed
PATHS = os.pathsep.join([str(ROOT), *CLIENT])
SECTION = TrackingSection(to=["tensorboard", "mlflow"], project="p", name="n")


@pytest.fixture
def mlflow(monkeypatch):
    for path in CLIENT:
        monkeypatch.syspath_prepend(path)
    monkeypatch.setenv("PYTHONPATH", PATHS)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


def told(tracker: Tracker, capsys, text: str) -> str:
    """What the user has read once `text` is in it."""
    read, deadline = "", time.monotonic() + 60
    while True:
        tracker._remotes[0]._exchange()
        read += capsys.readouterr().out
        if text in read:
            return read
        assert time.monotonic() < deadline, read
        time.sleep(0.02)


def test_every_tracker_of_accelerates_can_be_named():
    named = TrackingSection.model_fields["to"].annotation.__args__[0].__args__
    assert {CLASSES.get(name, name) for name in named} == set(LOGGER_TYPE_TO_CLASS)
    assert set(SERVICES) == {*named} - {TENSORBOARD}
    assert "tracking.to" in keys(TrackingSection, "tracking.")
    assert TrackingSection(to="wandb").to == ["wandb"]


def test_a_server_that_dies_costs_a_line_and_the_run_is_found_again(tmp_path, capsys, mlflow, monkeypatch):
    """Steps 1 and 2 arrive, the server dies at 3; another one, after resuming from 2, gives no answer from 4 on."""
    first, second = new_mlflow(dies_at=3), new_mlflow(dies_at=4, hangs=True)
    with serving(first) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address(server))
        with Tracker(tmp_path, 0, 9, section=SECTION, config={"train.seed": 7}) as tracker:
            for step in (1, 2):
                tracker.step({"step": step} | LINE)
            tracker.samples(2, [Sample("Say é.", " é", True, 2)])
            tracker.step({"step": 3} | LINE)
            read = told(tracker, capsys, "output_dir has it all")
            tracker.step({"step": 4} | LINE)
    assert f"mlflow: run n, {address(server)}/#/experiments/1/runs/r1\n" in read
    assert "mlflow loses lines from step 3 on (" in read and "loses" not in capsys.readouterr().out
    assert (first.starts, first.params) == (["n"], {"train.seed": "7"})
    assert first.metrics["loss"] == {1: 0.5, 2: 0.5}
    assert json.loads(first.artifacts["samples.jsonl"])["completion"] == " é"
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 4

    monkeypatch.setattr(remote, "SILENT_SECONDS", 0.2)
    with serving(second) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address(server))
        with Tracker(tmp_path, 2, 9, section=SECTION, config={"train.seed": 8}) as tracker:
            tracker.step({"step": 3} | LINE)
            while tracker._remotes[0]._asked:
                tracker._remotes[0]._exchange()
                time.sleep(0.02)
            tracker.step({"step": 4} | LINE)
            time.sleep(0.3)
            tracker.step({"step": 5} | LINE)
            started = time.monotonic()
    assert time.monotonic() - started < remote.IN_VAIN_SECONDS + 2
    assert "mlflow loses lines from step 4 on (no answer for 0.2 s)" in capsys.readouterr().out
    assert (second.starts, second.params, second.status) == ([], {}, "RUNNING"), "the same run, whose config is known"
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("loss")] == [1, 2, 3, 4, 5]
    assert [tensor.step for tensor in board.Tensors("samples/1/text_summary")] == [2]


def test_a_tracker_that_is_not_there_or_not_to_be(tmp_path, capsys):
    with Tracker(tmp_path, 0, 9, section=TrackingSection(to=["swanlab"])) as tracker:
        for step in (1, 2):
            tracker.step({"step": step} | LINE)
    read = capsys.readouterr().out
    line = "swanlab shows nothing of this run (it is not installed: pip install swanlab); output_dir has it all\n"
    assert read.startswith(line) and read.count("swanlab shows") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_run_that_dies_has_failed(tmp_path, capsys, mlflow, monkeypatch):
    server = new_mlflow()
    with serving(server) as at:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address(at))
        tracker = Tracker(tmp_path, 0, 9, section=SECTION)
        told(tracker, capsys, "mlflow: run n")
        (own,) = tracker._remotes
        own._socket.close()  # as the kernel does it
        assert own._process.wait(30) == 0 and server.status == "FAILED"


def test_a_process_that_dies_costs_a_line(tmp_path, capsys, mlflow, monkeypatch):
    monkeypatch.setattr(remote.sys, "executable", "/bin/false")
    with Tracker(tmp_path, 0, 9, section=SECTION) as tracker:
        tracker.step({"step": 1} | LINE)
        read = told(tracker, capsys, "its process has ended")
    assert f"mlflow shows nothing of this run (its process has ended, see {tmp_path}/trackers/mlflow.log)" in read
