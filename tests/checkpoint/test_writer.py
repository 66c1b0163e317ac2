"""What is found, refused and written; no ranks, no models."""

import contextlib
import errno
import hashlib
import json
import os
from pathlib import Path
from threading import Lock
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import dpo_ds
from dpo_ds.checkpoint import host_copy, manifest
from dpo_ds.checkpoint import writer as writer_module
from dpo_ds.checkpoint.disk import HashingFile, Written
from dpo_ds.checkpoint.host_copy import HostCopy, free_memory
from dpo_ds.checkpoint.manifest import Checkpoint, open_folder, shard_suffix, versions
from dpo_ds.checkpoint.resume import check_config, check_identity, data_id, find, set_aside_newer
from dpo_ds.checkpoint.writer import CheckpointWriter
from dpo_ds.cluster.watchdog import Silent
from dpo_ds.config import TrainConfig, to_plain
from dpo_ds.errors import ConfigError
from dpo_ds.models.fingerprint import model_id
from dpo_ds.training import trainer
from dpo_ds.training.feed import LocalBatch
from tests.tiny import random_pairs

RUN = TrainConfig.model_validate(
    {"model": {"path": "m"}, "data": {"train": "d"}, "deepspeed": {"config": "c"}, "output_dir": "o"}
)


SHARD = shard_suffix("model", 0)


def make(folder: Path, step: int, /, **changes) -> Path:
    """A checkpoint of two ranks, as the writer leaves it."""
    path = folder / "checkpoints" / f"step-{step:08d}"
    path.mkdir(parents=True)
    content = f"shard of step {step}".encode()
    files = {}
    for name in (shard_suffix(kind, rank) for rank in (0, 1) for kind in ("model", "optim")):
        (path / name).write_bytes(content)
        files[name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest = {
        "format": 1, "step": step, "world_size": 2, "config": to_plain(RUN), "versions": versions(),
        "identity": {"the model in model.path": "abc"}, "files": files,
    } | changes  # fmt: skip
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (path / "MANIFEST.json").write_text(json.dumps(manifest | {"manifest_sha256": digest}))
    (path.parent / "latest").write_text(path.name + "\n")
    return path


def test_the_newest_complete_one_comes_first(tmp_path):
    assert find(tmp_path, "auto") == ([], [])
    for step in (4, 12, 8):
        make(tmp_path, step)
    (tmp_path / "checkpoints" / "latest").write_text("step-00000012\n")
    (tmp_path / "checkpoints" / "step-00000016.tmp").mkdir()  # a save that died
    complete, notes = find(tmp_path, "auto")
    assert ([found.step for found in complete], notes) == ([12, 8, 4], [])
    assert find(tmp_path, "never") == ([], [])


DAMAGE = {
    "truncated": (
        lambda path: (path / SHARD).write_bytes(b"shard"),
        f"{SHARD} has 5 bytes, MANIFEST.json says 15",
    ),
    "deleted": (lambda path: (path / SHARD).unlink(), f"{SHARD} is missing"),
    "no manifest": (lambda path: (path / "MANIFEST.json").unlink(), "no MANIFEST.json"),
    "half a manifest": (lambda path: os.truncate(path / "MANIFEST.json", 40), "MANIFEST.json is damaged"),
    "a bit of the manifest": (lambda path: flip(path / "MANIFEST.json", 30), "MANIFEST.json is damaged"),
    "manifest no text": (lambda path: (path / "MANIFEST.json").write_bytes(b"\xff\xfe"), "MANIFEST.json is damaged"),
}


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_newest_is_named_and_the_one_before_is_taken(tmp_path, name):
    damage, problem = DAMAGE[name]
    make(tmp_path, 4)
    newest = make(tmp_path, 8)
    damage(newest)
    complete, notes = find(tmp_path, "auto")
    assert [found.step for found in complete] == [4]
    assert str(newest) in notes[0] and problem in notes[0] and "trying the one before" in notes[0]
    assert "latest names step-00000008" in notes[1] and "step-00000004" in notes[1]
    with pytest.raises(ConfigError, match="--checkpoint.resume .*step-00000008: "):
        find(tmp_path, str(newest))
    (tmp_path / "checkpoints" / "step-00000004" / SHARD).unlink()
    with pytest.raises(ConfigError, match="no complete checkpoint is left"):
        find(tmp_path, "auto")


def test_a_flipped_bit_in_a_shard_is_found_by_its_hash(tmp_path):
    path = make(tmp_path, 4)
    flip(path / SHARD, 3)
    found, _ = open_folder(path)
    assert found.damage() == [SHARD]
    assert found.damage(1, 2) == [], "the second of two ranks has no file to look at"


def test_a_stale_pointer_is_a_note(tmp_path):
    make(tmp_path, 4), make(tmp_path, 8)
    (tmp_path / "checkpoints" / "latest").write_text("step-00000004\n")
    complete, notes = find(tmp_path, "auto")
    assert complete[0].step == 8 and "latest names step-00000004; taking step-00000008" in notes[0]


def test_another_layout_is_refused_and_other_versions_are_told(tmp_path):
    path = make(tmp_path, 4, format=7, versions={"dpo_ds": "9.9"})
    assert open_folder(path) == (None, "its layout 7 (dpo_ds 9.9) is not known here, only 1 is")
    older = make(tmp_path, 8, versions={"deepspeed": "0.1"})
    notes = check_config(open_folder(older)[0], RUN, 2)
    assert len(notes) == 1 and "was saved with deepspeed 0.1, this is " in notes[0]


def test_what_may_change_is_told_and_what_may_not_is_refused_by_name(tmp_path):
    found, _ = open_folder(make(tmp_path, 4))

    def changed(section, **values):
        return RUN.model_copy(update={section: getattr(RUN, section).model_copy(update=values)})

    assert check_config(found, RUN, 2) == []
    assert check_config(found, changed("train", learning_rate=1.0), 2) == [
        "changed on resume: train.learning_rate 5e-07 -> 1.0"
    ]
    assert "saved by 2 ranks, this run has 3" in check_config(found, RUN, 3)[0]
    for section, key, value in (("loss", "beta", 0.2), ("train", "seed", 1), ("train", "global_batch_size", 3)):
        with pytest.raises(ConfigError, match=f"{section}.{key} .* -> {value} cannot change on resume"):
            check_config(found, changed(section, **{key: value}), 2)
    with pytest.raises(ConfigError, match="the model in model.path is now xyz, in .* it was abc"):
        check_identity(found, {"the model in model.path": "xyz"})
    check_identity(found, {"the model in model.path": "abc"})


def test_model_and_data_may_have_moved(tmp_path):
    """To another node's scratch, say; that they are the same is what check_identity sees to."""
    found, _ = open_folder(make(tmp_path, 4))

    def moved(model, data):
        model, data = RUN.model.model_copy(update={"path": model}), RUN.data.model_copy(update={"train": data})
        return check_config(found, RUN.model_copy(update={"model": model, "data": data}), 2)

    assert moved("m", "d") == []
    told = [f"changed on resume: {what}" for what in ("data.train 'd' -> '/scratch/2/d'", "model.path 'm' -> './m'")]
    assert moved("./m", "/scratch/2/d") == told
    with pytest.raises(ConfigError, match="^data.train .* cannot change on resume"):
        moved("m", ["d"])
    with pytest.raises(ConfigError, match="^data.train .* cannot change on resume"):
        moved("m", [{"path": "d", "weight": 2.0}])


class Pairs(list):
    """As much of a data set as its identity looks at."""

    margins = None

    def __init__(self, pairs):
        super().__init__(pairs)
        self.prompt_lengths = np.array([len(pair.prompt) for pair in pairs])
        self.completion_lengths = np.array([[len(ids) for ids in pair.completions] for pair in pairs])


def test_the_same_paths_with_other_contents_are_other_models_and_data(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(100))
    before = model_id(str(folder), None)
    assert model_id(str(folder), None) == before
    flip(folder / "model.safetensors", 99)
    assert model_id(str(folder), None) != before
    pairs = random_pairs(5)
    before = data_id(Pairs(pairs))
    assert data_id(Pairs(random_pairs(5))) == before
    assert data_id(Pairs(pairs[::-1])) != before and data_id(Pairs(pairs[:4])) != before
    pairs[3].rejected[0] += 1
    assert data_id(Pairs(pairs)) != before


def test_what_a_resumption_leaves_behind_is_set_aside(tmp_path):
    for step in (4, 8, 12):
        make(tmp_path, step)
    resumed, _ = open_folder(tmp_path / "checkpoints" / "step-00000004")
    notes = set_aside_newer(tmp_path, resumed)
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["latest", "step-00000004", "step-00000008.aside", "step-00000012.aside"]
    assert len(notes) == 2 and (tmp_path / "checkpoints" / "latest").read_text() == "step-00000004\n"
    elsewhere = Checkpoint(tmp_path / "other" / "step-00000002", resumed.manifest)
    set_aside_newer(tmp_path, elsewhere)
    assert not list((tmp_path / "checkpoints").glob("step-????????"))


def test_a_files_hash_is_known_when_it_is_written(tmp_path):
    content = os.urandom(40_000_001)  # three chunks
    file = HashingFile(tmp_path / "a")
    file.write(content[:7])
    file.write(content[7:])
    written = file.close()
    assert (tmp_path / "a").read_bytes() == content and file.error is None
    assert (written.size, written.sha256) == (len(content), hashlib.sha256(content).hexdigest())


def test_a_copy_in_memory_is_what_torch_would_have_written(tmp_path, monkeypatch):
    """And stays so when the tensors change; the next copy takes the same memory."""
    monkeypatch.setattr(host_copy, "BLOCK", 1000)  # a tensor of 4000 bytes lies in five blocks or more
    state = {"weight": torch.arange(1000.0), "nested": {"step": 3, "moments": [torch.ones(3), torch.zeros(0)]}}
    copy = HostCopy()
    for number in range(2):
        torch.save(state, tmp_path / "whole.pt")
        content = copy.take(state)
        state["weight"] += 1
        file = HashingFile(tmp_path / "copied.pt")
        content(file)
        written = file.close()
        loaded = torch.load(tmp_path / "copied.pt", weights_only=False)
        assert torch.equal(loaded["weight"], torch.arange(1000.0) + number) and loaded["nested"]["step"] == 3
        assert written.size == (tmp_path / "copied.pt").stat().st_size
        assert copy.bytes == -(-written.size // 1000) * 1000
        copy.clear()


def refuse(*_, **__):
    raise OSError(errno.EBUSY, "Device or resource busy", "somewhere")


def test_a_disk_that_refuses_a_rename_or_a_deletion_is_a_line(tmp_path, monkeypatch):
    """Training goes on; what was complete stays."""
    older, old = make(tmp_path, 4), make(tmp_path, 8)
    said = []
    writer = CheckpointWriter(tmp_path, RUN, {}, 8, Lock(), said.append, print)
    temporary = tmp_path / "checkpoints" / "step-00000012.tmp"
    temporary.mkdir()
    files = {shard_suffix(kind, 0): Written(0, hashlib.sha256().hexdigest()) for kind in ("model", "optim")}

    def commit() -> str | None:
        for name in files:
            (temporary / name).touch()
        return writer._commit([(files, None)], SimpleNamespace(folder=temporary, step=12, is_best=False))

    with monkeypatch.context() as broken:
        broken.setattr(writer_module.os, "replace", refuse)
        assert commit().startswith("Device or resource busy (somewhere)")
    assert open_folder(older)[0] and open_folder(old)[0]
    temporary.mkdir(exist_ok=True)
    assert commit() is None
    with monkeypatch.context() as broken:
        writer._pruning.result()
        make(tmp_path, 10), make(tmp_path, 11)
        broken.setattr(writer_module.shutil, "rmtree", refuse)
        writer._pruning = writer_module.in_background(lambda: writer._prune(8))
        writer.finish()
    busy = "an old checkpoint could not be deleted: Device or resource busy (somewhere); the newer ones are complete"
    assert said == [busy]
    assert [found.step for found in find(tmp_path, "auto")[0]][:2] == [12, 11]
    assert open_folder(old)[0], "step 8 is the best, and stays"


def test_an_evaluation_does_not_keep_a_checkpoint_from_its_commit(monkeypatch):
    """It looks before each of three batches: rows 0 1, 2 3 and 4."""
    monkeypatch.setattr(trainer.collectives, "reduce_sum", lambda sums: sums)
    looks = []
    policy = SimpleNamespace(device=torch.device("cpu"), evaluating=contextlib.nullcontext)
    run, writer = SimpleNamespace(global_batch_size=2), SimpleNamespace(commit_if_written=lambda: looks.append(0))

    class Total(trainer.Objective):
        names = ("loss",)

        def weight(self, rows):
            return len(rows)

        def __call__(self, policy, rows):
            return None, torch.tensor([rows.sum()])

    class Rows(list):
        def prepare_next(self): ...
        def close(self): ...

    def feed(batches, data):
        return Rows(LocalBatch(step, rows, None, [rows]) for step, rows in batches)

    stop = SimpleNamespace(agreed=lambda device: "")
    alone = SimpleNamespace(run=run, writer=writer, policy=policy, stop=stop, peers=Silent(), _feed=feed)
    alone._look_around = lambda step: trainer.Trainer._look_around(alone, step)
    assert trainer.Trainer.means(alone, Total(), None, np.arange(5), 3) == {"loss": 2.0}
    assert len(looks) == 3


@pytest.mark.parametrize(("needed", "copies"), [(100, True), (101, False)])
def test_without_memory_for_a_copy_a_line_says_that_training_waits(tmp_path, monkeypatch, needed, copies):
    """400 bytes are free, two ranks are on this host, and half is left alone: 100 for each."""
    alone = SimpleNamespace(
        get_world_size=lambda: 1, get_rank=lambda: 0, all_gather_object=lambda out, mine: out.__setitem__(0, mine)
    )
    monkeypatch.setattr(writer_module.collectives, "dist", alone)
    monkeypatch.setattr(writer_module, "free_memory", lambda: 400)
    rank = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    for name, value in (rank | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}).items():
        monkeypatch.setenv(name, value)
    said = []
    writer = CheckpointWriter(tmp_path, RUN, {}, 0, Lock(), said.append, print)
    writer._make_room(needed)
    assert (writer._copy is not None) is copies and len(said) == 1
    assert ("training stands still" in said[0]) is not copies and f"{needed} bytes" in said[0]


@pytest.mark.parametrize("controller", ["", "memory"], ids=["version 2", "version 1"])
def test_free_memory_knows_the_limits_of_all_groups_around(tmp_path, monkeypatch, controller):
    """The machine's, unless a group around leaves less: 5000 - 3000 and 500 that could be dropped."""
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    name = next((name for _, given, name in lines if given == controller), None)
    if name is None:
        pytest.skip("no such groups here")
    monkeypatch.setattr(host_copy, "CGROUPS", tmp_path)
    assert free_memory() > 1 << 20
    limit, used, spare = host_copy.GROUP_FILES[controller]
    group = (tmp_path / controller / name.strip("/")).parent if name != "/" else tmp_path / controller
    group.mkdir(parents=True, exist_ok=True)
    (group / limit).write_text("max\n")
    (group / used).write_text("3000\n")
    (group / "memory.stat").write_text(f"anon 2500\n{spare} 500\nactive_file 7\n")
    assert free_memory() > 1 << 20
    (group / limit).write_text("5000\n")
    assert free_memory() == 2500


def test_a_full_disk_raises_nothing_and_is_remembered(tmp_path):
    file = HashingFile(Path("/dev/full"))
    assert file.write(b"123") == 3 and file.write(b"4") == 1
    file.close()
    assert file.error.strerror == "No space left on device"


def test_versions_are_known_where_dpo_ds_is_a_checkout_that_is_not_installed(monkeypatch):
    def of_installed(package: str) -> str:
        assert package != "dpo-ds"
        return "1.0"

    monkeypatch.setattr(manifest, "version", of_installed)
    assert versions() == {"dpo_ds": dpo_ds.__version__} | dict.fromkeys(manifest.PACKAGES, "1.0")
