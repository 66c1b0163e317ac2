"""What a user's terminal is spared when ranks meet on GPUs, shown without one."""

import importlib
import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

from dpo_ds.cluster import collectives, process_group
from tests.ranks import ROOT

TOLD = "barrier(): using the device under current context. You can specify `device_id` in `init_process_group`"


def test_torchs_warning_of_a_single_ranks_barrier_is_not_shown(monkeypatch):
    monkeypatch.delenv("DPO_DS_VERBOSE", raising=False)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        process_group.quiet_libraries()
        warnings.warn(TOLD, stacklevel=1)
        warnings.warn("barrier(): something else", stacklevel=1)
    assert [str(warning.message) for warning in shown] == ["barrier(): something else"]


PROFILED = """
from dpo_ds.cluster.process_group import quiet_libraries
quiet_libraries()
import torch
from deepspeed.accelerator import get_accelerator
get_accelerator()
with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
    torch.ones(2)
"""


def test_neither_deepspeeds_choice_of_a_device_nor_torchs_profiler_is_told_of():
    environment = {k: v for k, v in os.environ.items() if k not in ("DS_ACCELERATOR", "KINETO_LOG_LEVEL")}
    command = [sys.executable, "-c", PROFILED]
    done = subprocess.run(command, env=environment | {"DPO_DS_VERBOSE": ""}, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


AT_TORCH = """
import os, sys
class Told:
    def find_spec(self, name, *_):
        if name == "torch":
            print("at torch:", os.environ.get("TORCH_CPP_LOG_LEVEL"), flush=True)
sys.meta_path.insert(0, Told())
from dpo_ds.commands import cli
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("verbose,level", [("", "ERROR"), ("1", "None")])
def test_the_level_of_torchs_logs_is_set_before_it_is_imported(verbose, level):
    """Its C++ half reads it then, and never again."""
    environment = {k: v for k, v in os.environ.items() if k != "TORCH_CPP_LOG_LEVEL"} | {"DPO_DS_VERBOSE": verbose}
    wanted = ["--model.path", "m", "--data.train", "d", "--deepspeed.config", "c", "--output_dir", "o"]
    command = [sys.executable, "-c", AT_TORCH, "train", *wanted, "--print_config"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith(f"at torch: {level}\n"), done.stdout + done.stderr


@pytest.mark.parametrize("ranks,device", [(2, torch.device("cuda", 1)), (1, None)])
def test_deepspeed_binds_several_ranks_to_their_devices(monkeypatch, ranks, device):
    """Else NCCL guesses; a single rank has nobody to reach, and binding it can fail (DeepSpeed#8248)."""
    backend = importlib.import_module("deepspeed.comm.torch")  # the package has torch itself under that name

    given = {}

    def init_process_group(name, device_id=None, **_):
        given["device"] = device_id

    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    monkeypatch.setenv("LOCAL_RANK", "1")
    accelerator = SimpleNamespace(device_name=lambda: "cuda", device=lambda index: torch.device("cuda", index))
    monkeypatch.setattr(backend, "get_accelerator", lambda: accelerator)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.distributed, "init_process_group", init_process_group)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "nccl")
    backend.TorchBackend.init_process_group(SimpleNamespace(), None, collectives.TIMEOUT, None, -1, -1)
    assert given == {"device": device}


def test_a_sequence_group_waits_as_long_as_all_ranks(monkeypatch):
    """torch would give it the backend's own limit, and a job that was suspended would end there."""
    given = []
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 3)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    monkeypatch.setattr(torch.distributed, "new_group", lambda ranks, timeout=None: given.append((ranks, timeout)))
    try:
        collectives.form_sequence_groups(2)
        assert (collectives.data_rank(), collectives.sequence_place()) == (1, 1)
    finally:
        collectives.form_sequence_groups(1)
    assert given == [([0, 1], collectives.TIMEOUT), ([2, 3], collectives.TIMEOUT)]
