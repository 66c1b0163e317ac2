"""Jobs that others look at: completions while the policy trains, two trackers of which one dies, the Hub at the end."""

import json

import pytest
from huggingface_hub import constants
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dpo_ds.commands import export
from dpo_ds.config import ExportConfig
from tests.small_jobs import exact, make_world, run, status, train_command, weights
from tests.stand_ins.http import address, serving
from tests.stand_ins.hub import new_hub
from tests.stand_ins.mlflow import new_mlflow
from tests.training.test_trackers import PATHS

pytestmark = pytest.mark.distributed
SHARING = {
    "train__sample_every": 2, "train__sample_prompts": 3, "sample__max_new_tokens": 6, "checkpoint__every": 2,
    "tracking__to": "[tensorboard, mlflow]", "hub__push": "org/name",
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = make_world(tmp_path_factory.mktemp("sharing"))
    (folder / "prompts.txt").write_text("Review the Maple backpack.\nWrite.\n\nReview:\nOne beyond the third.\n")
    return folder


@pytest.fixture(scope="module")
def hub():
    own = new_hub()
    with serving(own) as server:
        own.address = address(server)
        yield own


@pytest.fixture(scope="module")
def plain(forks, world):
    """Six steps that nobody looks at."""
    codes, output = run(forks, world, "plain", train__max_steps=6, checkpoint__every=2)
    assert codes == [0, 0], output
    return world / "plain"


@pytest.fixture(scope="module")
def shown(forks, world, hub):
    """The same in two runs, of which the first ends after four steps; in the second one MLflow's server dies at step 5.

    Gives the folder, both servers and what the second one printed.
    """
    servers = new_mlflow(), new_mlflow(dies_at=5)
    for server, steps in zip(servers, (4, 6), strict=True):
        with serving(server) as at:
            env = {"PYTHONPATH": PATHS, "MLFLOW_TRACKING_URI": address(at), "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
            env |= {"HF_ENDPOINT": hub.address, "HF_TOKEN": "writer", "DPO_DS_CACHE": str(world / "cache")}
            command = train_command(
                world, "shown", train__max_steps=steps, sample__prompts=world / "prompts.txt", **SHARING
            )
            codes, output = forks.run(command, 2, world / "logs", module="tests.workers.sharing", **env)
        assert codes == [0, 0], output
    return world / "shown", *servers, output


def test_training_does_not_notice_that_it_is_looked_at(plain, shown):
    folder, *_ = shown
    assert exact(folder) == exact(plain)
    assert weights(folder) == weights(plain)


def test_completions_are_in_the_folder_and_on_the_board(shown):
    folder, first, _, output = shown
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    prompts = ["Review the Maple backpack.", "Write.", "Review:"]
    assert [(line["step"], line["prompt"]) for line in lines] == [(step, p) for step in (2, 4, 6) for p in prompts]
    assert all(1 <= line["tokens"] <= 6 and line["finished"] in (True, False) for line in lines)
    assert f"step 6/6  sample: 'Review the Maple backpack.' -> {lines[6]['completion']!r}" in output
    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [tensor.step for tensor in board.Tensors("samples/3/text_summary")] == [2, 4, 6]
    assert [json.loads(line) for line in first.artifacts["samples.jsonl"].splitlines()] == lines[:6]


def test_a_tracker_has_the_config_the_metrics_and_one_run(plain, shown):
    folder, first, second, _ = shown
    assert (first.starts, second.starts) == (["shown"], []), "the second goes on with the run of the first"
    assert (first.params["command"], first.params["train.learning_rate"]) == ("train", "0.001")
    losses = {line[0]: line[1] for line in exact(plain)}
    assert first.metrics["loss"] == {step: losses[step] for step in range(1, 5)}
    assert first.metrics["final/loss"] == {4: losses[4]} and first.status == "FINISHED"


def test_a_server_that_dies_costs_a_line(shown):
    folder, _, second, output = shown
    assert second.metrics == {} and output.count("mlflow loses lines from step 5 on (") == 1
    assert status(folder) == {"state": "done", "reason": "", "step": 6, "exit_code": 0}


def test_the_model_is_on_the_hub(shown, hub, monkeypatch, tmp_path):
    folder, *_, output = shown
    assert f"dpo-ds: pushed to {hub.address}/org/name\n" in output
    assert hub.private == {"org/name": True}
    final = {path.name: path.read_bytes() for path in (folder / "final").iterdir()}
    assert hub.files["org/name"] == final and "model.safetensors" in final

    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "writer")
    exported = ExportConfig(source=str(folder), to=str(tmp_path / "model"), push="org/exported", private=False)
    assert export.start(exported) == 0
    assert hub.files["org/exported"] == final and hub.private["org/exported"] is False


def test_a_push_of_an_export_that_fails_says_how_to_repeat_it(shown, hub, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(hub, "is_down", True)
    monkeypatch.setenv("HF_TOKEN", "writer")
    folder, *_ = shown
    to = tmp_path / "model"
    assert export.start(ExportConfig(source=str(folder), to=str(to), push="org/name")) == 1
    why = f"{to} was not pushed to org/name (HTTP 503: maintenance)"
    assert capsys.readouterr().err == f"dpo-ds: error: {why}; hf upload org/name {to} . --private\n"
    assert (to / "model.safetensors").is_file()
