"""The chat template that was trained with comes with the model, whoever gave it; and what a finished run says."""

import hashlib
import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from dpo_ds.commands import export as command
from dpo_ds.config import ExportConfig
from dpo_ds.data.chat.template import DEFAULT_CHAT_TEMPLATE
from tests.data_helpers import CHATML
from tests.small_jobs import exact, make_world, run, train_command, weights

pytestmark = pytest.mark.distributed

STEPS = {"ranks": 1, "train__max_steps": 2, "checkpoint__every": 1}
BUILT_IN = "has no chat template, so messages go through the built-in one; --data.chat_template sets another"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """With the pairs as messages beside; the tokenizer has no template."""
    folder = make_world(tmp_path_factory.mktemp("templates"), hidden=16)
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    for row in rows:
        row["prompt"] = [{"role": "user", "content": row["prompt"]}]
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "chatml.jinja").write_text(CHATML)
    return folder


@pytest.fixture(scope="module")
def built_in(forks, world):
    codes, output = run(forks, world, "built-in", data__train=world / "chat.jsonl", **STEPS)
    assert codes == [0], output
    assert output.count(BUILT_IN) == 1
    return world / "built-in"


def template_of(folder: Path) -> str | None:
    return AutoTokenizer.from_pretrained(folder).chat_template


def exported(run_folder: Path, to: Path) -> Path:
    assert command.start(ExportConfig(source=str(run_folder), to=str(to))) == 0
    return to


def test_the_built_in_template_is_exported_where_rows_are_messages(world, built_in, tmp_path):
    assert template_of(world / "model") is None
    assert template_of(built_in / "final") == DEFAULT_CHAT_TEMPLATE
    assert template_of(exported(built_in, tmp_path / "a")) == DEFAULT_CHAT_TEMPLATE


def test_a_finished_run_that_is_started_again_says_that_nothing_is_left(forks, world, built_in):
    """Another learning rate is allowed on resume, but no step is left that it could be used in."""
    before = weights(built_in), exact(built_in)
    again = {"data__train": world / "chat.jsonl", "train__learning_rate": 5e-4}
    codes, output = run(forks, world, "built-in", **again, **STEPS)
    assert codes == [0], output
    assert "nothing left to do: step 2 of 2 is saved; raise train.max_steps or train.epochs to go on" in output
    assert (weights(built_in), exact(built_in)) == before
    codes, output = run(forks, world, "built-in", **again, **STEPS | {"train__max_steps": 3})
    assert codes == [0] and "nothing left" not in output and len(exact(built_in)) == 3


def test_rows_of_text_need_no_template_and_checkpoints_older_than_the_key_resume(forks, world, tmp_path):
    codes, output = run(forks, world, "text", **STEPS)
    assert codes == [0] and BUILT_IN not in output
    assert template_of(world / "text" / "final") is None
    for path in (world / "text" / "checkpoints").glob("step-*/MANIFEST.json"):
        manifest = json.loads(path.read_text())
        del manifest["config"]["data"]["chat_template"], manifest["manifest_sha256"]
        digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
        path.write_text(json.dumps(manifest | {"manifest_sha256": digest}))
    assert template_of(exported(world / "text", tmp_path / "a")) is None
    codes, output = run(forks, world, "text", **STEPS)
    assert codes == [0] and "nothing left to do" in output, output


def test_a_template_from_a_file_is_the_runs_own_whatever_becomes_of_the_file(forks, world, tmp_path):
    keys = {"data__train": world / "chat.jsonl", "data__chat_template": world / "chatml.jinja"}
    codes, output = run(forks, world, "chatml", **keys, **STEPS)
    assert codes == [0] and BUILT_IN not in output, output
    (world / "chatml.jinja").write_text("{{ 'another' }}")
    assert template_of(world / "chatml" / "final") == CHATML
    assert template_of(exported(world / "chatml", tmp_path / "a")) == CHATML
    codes, output = run(forks, world, "chatml", **keys, **STEPS)
    assert codes == [2] and "data.chat_template '{% for" in output and "cannot change on resume" in output
    keys["data__chat_template"] = CHATML  # its text, by the command line
    codes, output = run(forks, world, "chatml", **keys, **STEPS)
    assert codes == [0] and "nothing left to do" in output, output


DATED = "Today: {{ strftime_now('%d %b %Y') }}\n" + CHATML


def test_what_is_begun_on_one_day_goes_on_on_the_next_with_the_same_date(forks, world):
    """A run, a cache of the reference, and the run that trains on it."""
    keys = {"data__train": world / "chat.jsonl", "data__chat_template": DATED}
    yesterday = {"module": "tests.workers.another_day", "DPO_DS_CACHE": str(world / "cache")}
    begun = train_command(world, "dated", **keys, train__max_steps=1, checkpoint__every=1)
    codes, output = forks.run(begun, 1, world / "dated.logs", **yesterday)
    assert codes == [0], output
    (manifest,) = (json.loads(path.read_text()) for path in (world / "dated/checkpoints").glob("step-*/MANIFEST.json"))
    assert manifest["identity"]["the date that the chat template writes"] == "2024-02-29"
    codes, output = run(forks, world, "dated", **keys, **STEPS)
    assert codes == [0] and "resumed from" in output and len(exact(world / "dated")) == 2, output

    filling = ["precompute", "--model.path", world / "model", "--data.train", world / "chat.jsonl"]
    filling += ["--data.chat_template", DATED, "--reference.cache", world / "dated-cache", "--deepspeed.config", "none"]
    codes, output = forks.run(filling, 1, world / "dated.logs", **yesterday)
    assert codes == [0], output
    cached = {"reference__kind": "cached", "reference__cache": world / "dated-cache"}
    codes, output = run(forks, world, "dated-cached", **keys, **cached, **STEPS)
    assert codes == [0] and len(exact(world / "dated-cached")) == 2, output
