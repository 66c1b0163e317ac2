"""Checkpoints that are not what a run of ours left: edited, forged, copied beside, linked, or made to run code."""

import hashlib
import json
import pickle

import numpy as np
import pytest
import torch

from dpo_ds.checkpoint.manifest import open_folder, shard_suffix, step_folders
from dpo_ds.checkpoint.resume import find, set_aside_newer
from dpo_ds.checkpoint.shards import Shards, random_state, set_random_state
from dpo_ds.errors import ConfigError
from tests.checkpoint.test_writer import SHARD, make

FORGED = {
    "no step": {"step": None},
    "a step of text": {"step": "12"},
    "a step below 1": {"step": 0},
    "a number of ranks that its files deny": {"world_size": 3},
    "more ranks than there are": {"world_size": 10**9},
    "files that are a list": {"files": []},
    "a file elsewhere": {"files": {"../../secret": {"size": 1, "sha256": "0" * 64}}},
    "a size below 0": {"files": {SHARD: {"size": -1, "sha256": "0" * 64}}},
    "a hash that is none": {"files": {SHARD: {"size": 1, "sha256": "abc"}}},
    "versions that are text": {"versions": "1.0"},
    "a config that is a number": {"config": 3},
}


@pytest.mark.parametrize("forged", FORGED)
def test_a_manifest_whose_own_digest_is_right_must_still_fit(tmp_path, forged):
    make(tmp_path, 4)
    path = make(tmp_path, 8, **FORGED[forged])
    found, problem = open_folder(path)
    assert found is None and problem.startswith("MANIFEST.json is damaged: "), problem
    complete, notes = find(tmp_path, "auto")
    assert [checkpoint.step for checkpoint in complete] == [4] and str(path) in notes[0]


@pytest.mark.parametrize("content", ["[1, 2]", "3", "null", "[" * 100_000, '"text"', "", "{}"])
def test_a_manifest_that_is_no_object_of_ours_is_damage(tmp_path, content):
    path = make(tmp_path, 8)
    (path / "MANIFEST.json").write_text(content)
    assert open_folder(path)[1].startswith("MANIFEST.json is damaged")


def test_a_manifest_that_is_a_folder_is_damage(tmp_path):
    path = make(tmp_path, 8)
    (path / "MANIFEST.json").unlink()
    (path / "MANIFEST.json").mkdir()
    assert open_folder(path)[1].startswith("MANIFEST.json is damaged: cannot be read")


def test_copies_that_users_lay_beside_are_no_checkpoints(tmp_path):
    """Digits only count, in the order of numbers: 123456789 comes after 8, though not as text."""
    small, large = make(tmp_path, 8), make(tmp_path, 123_456_789)
    folder = small.parent
    for name in ("step-savedold", "step-my-best1", "step-00000004 (copy)", "step-00000004.aside"):
        (folder / name).mkdir()
    assert step_folders(folder) == [small, large]
    (small / f"copy of {SHARD}").write_bytes(b"left beside")
    complete, notes = find(tmp_path, "auto")
    assert ([checkpoint.step for checkpoint in complete], notes) == ([123_456_789, 8], [])


def test_a_pointer_that_is_a_folder_is_refused(tmp_path):
    path = make(tmp_path, 8)
    (path.parent / "latest").unlink()
    (path.parent / "latest").mkdir()
    with pytest.raises(ConfigError, match="latest: is a folder; the file that names the newest checkpoint belongs"):
        find(tmp_path, "auto")


def test_a_checkpoint_behind_a_link_is_gone_on_from_and_stays(tmp_path):
    elsewhere = make(tmp_path / "elsewhere", 8)
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "step-00000008").symlink_to(elsewhere)
    complete, _ = find(tmp_path / "run", "auto")
    assert [checkpoint.step for checkpoint in complete] == [8]
    assert set_aside_newer(tmp_path / "run", complete[0]) == []
    assert (folder / "latest").read_text() == "step-00000008\n"


def test_what_was_set_aside_before_stays_there(tmp_path):
    for step in (4, 8):
        make(tmp_path, step)
    resumed, _ = open_folder(tmp_path / "checkpoints" / "step-00000004")
    set_aside_newer(tmp_path, resumed)
    make(tmp_path, 8)
    set_aside_newer(tmp_path, resumed)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["latest", "step-00000004", "step-00000008.aside", "step-00000008.aside2"]


class Code:
    """Leaves a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("saved_by", ["torch", "pickle"])
def test_a_shard_that_would_run_code_is_named_and_not_loaded(tmp_path, saved_by):
    path = make(tmp_path, 8)
    shard = path / shard_suffix("optim", 0)
    if saved_by == "torch":
        torch.save({"optimizer_state_dict": Code(tmp_path / "ran")}, shard)
    else:
        shard.write_bytes(pickle.dumps(Code(tmp_path / "ran")))
    manifest = json.loads((path / "MANIFEST.json").read_text())
    content = shard.read_bytes()
    manifest["files"][shard.name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    del manifest["manifest_sha256"]
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (path / "MANIFEST.json").write_text(json.dumps(manifest | {"manifest_sha256": digest}))
    checkpoint, _ = open_folder(path)
    assert checkpoint.damage() == []
    with pytest.raises(ConfigError, match=f"{shard.name}: .* could run foreign code, so it is not loaded"):
        Shards(checkpoint)._open("optim", 0)
    assert not (tmp_path / "ran").exists()


def test_random_numbers_go_on_where_they_were(tmp_path):
    torch.save(random_state(), tmp_path / "state.pt")
    expected = np.random.rand(3), torch.rand(3)
    set_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert np.array_equal(np.random.rand(3), expected[0]) and torch.equal(torch.rand(3), expected[1])
