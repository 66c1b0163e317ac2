"""Content is compared by content: every byte of a model and every token of the data, once a machine."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dpo_ds.checkpoint.manifest import Checkpoint
from dpo_ds.checkpoint.resume import DATA, check_identity, data_id, identity_of
from dpo_ds.cluster import derived
from dpo_ds.config import DataSection
from dpo_ds.data import prepare
from dpo_ds.demo.corpus import preference_rows, write_jsonl
from dpo_ds.demo.tiny import train_tokenizer
from dpo_ds.errors import ConfigError
from dpo_ds.models.fingerprint import MODEL, model_as_recorded, model_digest, model_id
from tests.small_jobs import make_world, train_command
from tests.workers.nodes import change

OPTIONS = DataSection(train="pairs.jsonl", max_length=64, max_prompt_length=32)
CONFIG = SimpleNamespace(_commit_hash=None)


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A folder with 8 MB of weights, far more than the samples of an old identity."""
    monkeypatch.setenv("DPO_DS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file({"w": np.arange(2 << 20, dtype=np.float32)}, folder / "model.safetensors")
    return folder


def settle(monkeypatch) -> None:
    """Lets files that have just been written count as settled."""
    monkeypatch.setattr(derived, "SETTLED_SECONDS", -1)


def test_signs_flipped_in_the_middle_are_noticed(model, monkeypatch):
    settle(monkeypatch)
    before, old = model_digest(str(model), CONFIG), model_id(str(model), CONFIG)
    file = model / "model.safetensors"
    times = file.stat()
    weights = load_file(file)["w"]
    weights[1 << 20 : (1 << 20) + 100_000] *= -1
    with file.open("r+b") as stream:  # same inode, same size
        stream.seek(file.stat().st_size - weights.nbytes)
        stream.write(weights.tobytes())
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert model_id(str(model), CONFIG) == old, "what checkpoints used to compare is blind to it"
    assert model_digest(str(model), CONFIG) != before


def test_bytes_are_read_once(model, monkeypatch):
    settle(monkeypatch)
    before = model_digest(str(model), CONFIG)
    monkeypatch.setattr(derived, "sha256", lambda path: pytest.fail(f"{path} is read again"))
    assert model_digest(str(model), CONFIG) == before


def test_an_old_checkpoint_is_compared_in_its_own_form(model):
    assert model_as_recorded(model_id(str(model), CONFIG), str(model), CONFIG) == model_id(str(model), CONFIG)
    assert len(model_as_recorded(None, str(model), CONFIG)) == 64
    assert model_digest("some/model", SimpleNamespace(_commit_hash="abc")) == "some/model@abc"


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """Prepares rows; the same cache each time."""
    monkeypatch.setenv("DPO_DS_CACHE", str(tmp_path / "cache"))
    rows = list(preference_rows(60, seed=3))
    tokenizer = train_tokenizer([row["prompt"] + row["chosen"] for row in rows], vocab_size=300)

    def run(rows: list[dict], name: str = "pairs.jsonl"):
        write_jsonl(tmp_path / name, rows)
        return prepare(str(tmp_path / name), options=OPTIONS, tokenizer=tokenizer)

    return rows, run


def test_chosen_and_rejected_swapped_in_the_middle_are_noticed(prepared):
    """Equal lengths: the swap changes which tokens stand where, and nothing else."""
    rows, run = prepared
    before = run(rows)
    even = [i for i, (chosen, rejected) in enumerate(before.completion_lengths) if chosen == rejected]
    assert even, "some pairs have sides of equal length"
    swapped = [dict(row) for row in rows]
    for i in even:
        swapped[i] = rows[i] | {"chosen": rows[i]["rejected"], "rejected": rows[i]["chosen"]}
    assert run(swapped, "swapped.jsonl").content() != before.content()


def test_the_same_rows_in_another_file_are_the_same_content(prepared):
    rows, run = prepared
    assert run(rows, "copy.jsonl").content() == run(rows).content()
    assert run(rows[:-1], "fewer.jsonl").content() != run(rows).content()


def test_identity_takes_the_form_of_the_checkpoint_it_is_compared_with(prepared, model):
    rows, run = prepared
    settings = SimpleNamespace(model=SimpleNamespace(path=str(model)))
    pairs = run(rows)
    new = identity_of(settings, CONFIG, {}, pairs)
    old = new | {MODEL: model_id(str(model), CONFIG), DATA: data_id(pairs)}
    for recorded in (new, old):
        checkpoint = Checkpoint(model, {"identity": recorded})
        check_identity(checkpoint, identity_of(settings, CONFIG, {}, pairs, recorded))
        with pytest.raises(ConfigError, match="the data in data.train is now"):
            check_identity(checkpoint, identity_of(settings, CONFIG, {}, run(rows[:-1], "fewer.jsonl"), recorded))


@pytest.mark.distributed
@pytest.mark.parametrize("what", ["texts", "rows", "weights", "tokenizer", "seed", "nothing"])
def test_nodes_that_differ_do_not_begin(forks, world, what):
    """Two nodes of one rank, each with a copy of its own under the same path, by a mount that it alone sees."""
    if os.geteuid() != 0:
        pytest.skip("needs root, for mounts")
    other = world / "other"
    shutil.rmtree(other, ignore_errors=True)
    shutil.copytree(world / "first", other)
    change(other, what)
    command = train_command(world / "node", "run", train__max_steps=1)
    command = [word.replace(str(world / "node" / "run"), str(world / f"run-{what}")) for word in command]
    only = {1: {"TESTS_NODE": str(other), "TESTS_SEED": "4" if what == "seed" else ""}}
    everywhere = {"TESTS_NODE": str(world / "first"), "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    codes, output = forks.run(
        [json.dumps([command, str(world / "node")])], 2, world / f"logs-{what}", module="tests.workers.nodes",
        only=only, **everywhere,
    )  # fmt: skip
    if what == "nothing":
        assert codes == [0, 0], output
        return
    assert codes == [2, 2], output
    lines = [line for line in output.splitlines() if "error" in line]
    assert len(lines) == 1, output
    named = {
        "texts": "the tokenised train data is 50 rows ", "rows": "the tokenised train data is 50 rows ",
        "weights": f"--model.path {world}/node/model/model.safetensors is ", "tokenizer": "the tokenizer is ",
        "seed": "train.seed is 0 on ",
    }  # fmt: skip
    assert lines[0].startswith(f"dpo-ds: error: {named[what]}")
    assert "(rank 0), " in lines[0] and "(rank 1); " in lines[0]
    assert not (world / f"run-{what}" / "metrics.jsonl").exists()


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """first/ is the node of rank 0, node/ where both ranks look."""
    folder = tmp_path_factory.mktemp("nodes")
    for name in ("first", "node"):
        (folder / name).mkdir()
    make_world(folder / "first", hidden=16, layers=1)
    return folder
