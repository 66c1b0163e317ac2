"""Which rank a process is, under every launcher."""

import pytest

from dpo_ds.cluster import launch
from dpo_ds.cluster.launch import Launch
from dpo_ds.errors import ConfigError

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
SRUN = {
    "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "9", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0", "SLURM_STEP_TASKS_PER_NODE": "4(x2),1", "SLURM_STEP_NODELIST": "gpu[07-09]",
}  # fmt: skip


@pytest.fixture
def environment(monkeypatch):
    """Sets exactly these of the launchers' variables, and forgets what is set during the test."""
    for name in (*NAMES, *SRUN):
        monkeypatch.delenv(name, raising=False)

    def give(**variables: str):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    yield give
    for name in NAMES:  # monkeypatch then restores what was there
        monkeypatch.delenv(name, raising=False)


def test_nobody_launched_us(environment):
    assert launch.from_environment() == Launch(0, 1, 0, 1)
    launch.complete_environment(launch.from_environment())
    assert launch.os.environ["WORLD_SIZE"] == "1" and int(launch.os.environ["MASTER_PORT"]) > 1023


@pytest.mark.parametrize("local", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])
def test_torchrun_and_deepspeed(environment, local):
    environment(RANK="3", WORLD_SIZE="8", LOCAL_RANK="1", **{local: "2"})
    assert launch.from_environment() == Launch(3, 8, 1, 2)


def test_srun(environment):
    environment(**SRUN)
    place = launch.from_environment()
    assert place == Launch(5, 9, 1, 4)
    launch.complete_environment(place)
    assert (launch.os.environ["RANK"], launch.os.environ["MASTER_ADDR"]) == ("5", "gpu07")
    assert launch.os.environ["MASTER_PORT"] == str(20000 + (1234 * 97 + 0) % 12000)
    assert launch.from_environment() == place, "asked again, now that RANK is set"


@pytest.mark.parametrize(("on_node", "threads"), [("12", 3), ("48", 12)], ids=["shares all cores", "bound to its own"])
def test_threads_under_srun(environment, monkeypatch, on_node, threads):
    """Rank 5 of SRUN is one of 4 tasks on its node and may use 12 cores."""
    environment(**SRUN, SLURM_CPUS_ON_NODE=on_node)
    monkeypatch.setattr(launch.os, "sched_getaffinity", lambda pid: range(12))
    assert launch.from_environment().threads == threads


def test_threads_of_torchruns_ranks_in_one_task(environment, monkeypatch):
    """srun starts torchrun once a node, bound to 12 of 48 cores, and that 4 ranks: they share the 12."""
    one_task = {"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}
    environment(**SRUN | one_task, SLURM_CPUS_ON_NODE="48")
    environment(RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", LOCAL_WORLD_SIZE="4")
    monkeypatch.setattr(launch.os, "sched_getaffinity", lambda pid: range(12))
    assert launch.from_environment().threads == 3


def test_a_batch_script_itself_is_one_process(environment):
    environment(SLURM_PROCID="0", SLURM_JOB_ID="1234")
    assert launch.from_environment() == Launch(0, 1, 0, 1)


def test_a_variable_that_is_no_number_is_named(environment):
    environment(RANK="first", WORLD_SIZE="2")
    with pytest.raises(ConfigError, match="first"):
        launch.from_environment()


@pytest.mark.parametrize(
    ("nodes", "first"), [("n1", "n1"), ("n[1-3]", "n1"), ("a-b[007,9],c", "a-b007"), ("x,y[1-2]", "x")]
)
def test_the_first_host(nodes, first):
    assert launch.first_host(nodes) == first


def test_tasks_on_each_node():
    assert [launch.tasks_on_node("4(x2),1", node) for node in range(3)] == [4, 4, 1]
