"""The folder of a run: whose it is, who is at work in it, and what is read back from it."""

import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_ds.checkpoint import manifest
from dpo_ds.cluster.launch import Launch
from dpo_ds.cluster.shared_files import is_at_work, leftovers, sha256, temporary_beside
from dpo_ds.commands.sample.folder import is_a_sample
from dpo_ds.data.shard import shard_name
from dpo_ds.errors import ConfigError
from dpo_ds.reference.cache import is_a_cache
from dpo_ds.training.output_dir import keeping_status, last_step, read_metrics
from tests.ranks import ROOT

ALONE = Launch(0, 1, 0, 1)


def enter(folder) -> None:
    with keeping_status(folder, ALONE):
        pass


@pytest.mark.parametrize("name", ["final/", "final.tmp/", "pids/", "config.yaml", "metrics.jsonl", "report/", "notes"])
def test_what_a_stranger_left_is_refused_and_stays(tmp_path, name):
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    if name.endswith("/"):
        path.mkdir()
        (path / "model.safetensors").write_text("mine")
    else:
        path.write_text("mine")
    (tmp_path / "out" / "STATUS.json").write_text('{"state": "fine"}')  # somebody else's
    with pytest.raises(ConfigError, match="--output_dir .*out: holds STATUS.json, .*which dpo-ds did not make"):
        enter(tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(["STATUS.json", path.name])
    assert json.loads((tmp_path / "out" / "STATUS.json").read_text()) == {"state": "fine"}


def test_a_folder_that_is_new_empty_hidden_or_an_earlier_runs_is_taken(tmp_path):
    enter(tmp_path / "new")
    assert json.loads((tmp_path / "new" / "STATUS.json").read_text())["state"] == "done"
    (tmp_path / "new" / "metrics.jsonl").write_text('{"step": 3}\n')
    enter(tmp_path / "new")
    assert json.loads((tmp_path / "new" / "STATUS.json").read_text())["step"] == 3
    (tmp_path / "scripts" / "logs").mkdir(parents=True)  # launch_scripts/slurm_train.sbatch makes it before the run
    (tmp_path / "scripts" / ".snapshot").mkdir()
    (tmp_path / "scripts" / "checkpoints").mkdir()  # where another disk is mounted
    enter(tmp_path / "scripts")
    (tmp_path / "new" / "STATUS.json").unlink()  # by whoever tidied up
    with pytest.raises(ConfigError, match="which dpo-ds did not make"):
        enter(tmp_path / "new")
    step = tmp_path / "new" / "checkpoints" / "step-00000003"
    step.mkdir(parents=True)
    values = {"step": 3, "world_size": 1, "config": {}, "versions": {}, "identity": {}, "files": {}}
    for name in ("zero_pp_rank_0_mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        (step / name).write_bytes(b"")
        values["files"][name] = {"size": 0, "sha256": sha256(step / name)}
    manifest.write(step, values)
    enter(tmp_path / "new")


def test_a_second_job_in_the_folder_ends_with_host_and_process_of_the_first(tmp_path):
    enter(tmp_path)
    code = f"""
import sys
from pathlib import Path
from dpo_ds.cluster.shared_files import FolderLock
lock = FolderLock(Path({str(tmp_path)!r}), 0, "output_dir")
lock.take(print)
print("taken", flush=True)
sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as job:
        assert job.stdout.readline() == b"taken\n"
        assert is_at_work(tmp_path)
        with pytest.raises(ConfigError, match=rf"process {job.pid} on \S+ is at work there; wait for its end, or give"):
            enter(tmp_path)
        assert json.loads((tmp_path / "STATUS.json").read_text())["state"] == "done", "the first one's word stays"
        job.stdin.close()
    assert not is_at_work(tmp_path), "the system gives the lock back"
    enter(tmp_path)


def test_only_names_that_we_made_are_left_over(tmp_path):
    ours = temporary_beside(tmp_path / "final")
    ours.mkdir()
    for name in ("final.tmp", "final.backup.tmp", "other.0123abcd.tmp"):
        (tmp_path / name).mkdir()
    assert leftovers(tmp_path, "final") == [ours]


def test_a_folder_of_data_is_neither_a_cache_nor_samples(tmp_path):
    """Parquet files may bear our shards' names."""
    pq.write_table(pa.table({"prompt": ["p"], "chosen": ["a"], "rejected": ["b"]}), tmp_path / shard_name(0))
    assert not is_a_cache(tmp_path) and not is_a_sample(tmp_path)
    (tmp_path / "MANIFEST.json").write_text("{}")
    assert not is_a_cache(tmp_path)


def test_metrics_with_torn_foreign_and_binary_lines_are_read(tmp_path):
    lines = [b'{"step": 1, "loss": 2}', b"\xff\xfe", b"[1]", b"null", b'{"loss": 1}', b'{"step": "2"}', b"[" * 9999]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([*lines, b'{"step": 2, "loss": 1}', b'{"step": 3, "lo']))
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2}, {"step": 2, "loss": 1}]
    assert last_step(tmp_path) == 2
    (tmp_path / "folder" / "metrics.jsonl").mkdir(parents=True)
    assert read_metrics(tmp_path / "folder" / "metrics.jsonl") == []
