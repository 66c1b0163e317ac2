"""Which rank a process is, under every launcher."""

import os

import pytest

from dpo_ds.cluster import launch
from dpo_ds.cluster.launch import Launch, from_environment
from dpo_ds.commands import cli
from dpo_ds.errors import ConfigError

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
SRUN = {
    "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "9", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0", "SLURM_STEP_TASKS_PER_NODE": "4(x2),1", "SLURM_STEP_NODELIST": "gpu[07-09]",
}  # fmt: skip


@pytest.fixture
def environment(monkeypatch):
    """Sets exactly these of the launchers' variables, and forgets what is set during the test."""
    for name in (*NAMES, *SRUN, "SLURM_TASK_PID", "SLURM_PTY_PORT", "SLURM_PTY_WIN_COL"):
        monkeypatch.delenv(name, raising=False)

    def give(**variables: str):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    yield give
    for name in NAMES:  # monkeypatch then restores what was there
        monkeypatch.delenv(name, raising=False)


def test_nobody_launched_us(environment):
    assert from_environment() == Launch(0, 1, 0, 1)
    launch.complete_environment(from_environment())
    assert launch.os.environ["WORLD_SIZE"] == "1" and int(launch.os.environ["MASTER_PORT"]) > 1023


@pytest.mark.parametrize("local", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])
def test_torchrun_and_deepspeed(environment, local):
    environment(RANK="3", WORLD_SIZE="8", LOCAL_RANK="1", MASTER_ADDR="a", MASTER_PORT="1", **{local: "2"})
    assert from_environment() == Launch(3, 8, 1, 2)


def test_srun(environment):
    environment(**SRUN)
    task = from_environment()
    assert task == Launch(5, 9, 1, 4)
    launch.complete_environment(task)
    assert (launch.os.environ["RANK"], launch.os.environ["MASTER_ADDR"]) == ("5", "gpu07")
    assert launch.os.environ["MASTER_PORT"] == str(20000 + (1234 * 97 + 0) % 12000)
    assert from_environment() == task, "asked again, now that RANK is set"


@pytest.mark.parametrize(("on_node", "threads"), [("12", 3), ("48", 12)], ids=["shares all cores", "bound to its own"])
def test_threads_under_srun(environment, monkeypatch, on_node, threads):
    """Rank 5 of SRUN is one of 4 tasks on its node and may use 12 cores."""
    environment(**SRUN, SLURM_CPUS_ON_NODE=on_node)
    monkeypatch.setattr(launch.os, "sched_getaffinity", lambda pid: range(12))
    assert from_environment().threads == threads


def test_threads_of_torchruns_ranks_in_one_task(environment, monkeypatch):
    """srun starts torchrun once a node, bound to 12 of 48 cores, and that 4 ranks: they share the 12."""
    one_task = {"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}
    environment(**SRUN | one_task, SLURM_CPUS_ON_NODE="48")
    environment(**LAUNCHED | {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"})
    monkeypatch.setattr(launch.os, "sched_getaffinity", lambda pid: range(12))
    assert from_environment().threads == 3


def test_a_batch_script_itself_is_one_process(environment):
    environment(SLURM_PROCID="0", SLURM_JOB_ID="1234")
    assert from_environment() == Launch(0, 1, 0, 1)


LAUNCHED = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
LAUNCHED |= {"MASTER_ADDR": "alpha", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RANK", "first"), ("RANK", "-1"), ("RANK", "4"), ("RANK", "1.0"), ("RANK", "9" * 30), ("RANK", ""),
        ("WORLD_SIZE", "0"), ("WORLD_SIZE", "abc"), ("WORLD_SIZE", "1"),
        ("WORLD_SIZE", "9" * 12), ("WORLD_SIZE", None), ("RANK", None),
        ("LOCAL_RANK", "2"), ("LOCAL_RANK", "x"), ("LOCAL_WORLD_SIZE", "0"), ("LOCAL_WORLD_SIZE", "two"),
        ("MASTER_PORT", "abc"), ("MASTER_PORT", "99999"), ("MASTER_PORT", "0"), ("MASTER_PORT", None),
        ("MASTER_ADDR", " "), ("MASTER_ADDR", None),
    ],
)  # fmt: skip
def test_a_variable_that_cannot_be_is_named_with_its_value(environment, monkeypatch, name, value):
    environment(**LAUNCHED)
    assert from_environment() == Launch(1, 4, 1, 2)
    monkeypatch.delenv(name) if value is None else environment(**{name: value})
    named = "RANK" if (name, value) == ("WORLD_SIZE", "1") else name
    shown = "1" if named == "RANK" and name == "WORLD_SIZE" else value
    with pytest.raises(ConfigError) as error:
        from_environment()
    assert str(error.value).startswith(f"{named} is ")
    assert shown is None or shown.strip() == "" or repr(shown) in str(error.value)


@pytest.mark.parametrize("left", [{"RANK": "0"}, {"WORLD_SIZE": "1"}, {"LOCAL_RANK": "0"}, {"MASTER_PORT": "abc"}])
def test_what_says_nothing_against_one_process_is_let_be(environment, left):
    environment(**left)
    assert from_environment() == launch.ALONE
    launch.complete_environment(launch.ALONE)
    assert 1023 < int(launch.os.environ["MASTER_PORT"]) < 65536


def test_a_stale_master_is_ignored_with_a_line(environment):
    environment(MASTER_ADDR="10.1.2.3", MASTER_PORT="29500")
    assert launch.notes() == ["MASTER_ADDR 10.1.2.3 is ignored: no launcher started this process, it is alone"]
    launch.complete_environment(from_environment())
    assert launch.os.environ["MASTER_ADDR"] == "127.0.0.1" and launch.os.environ["MASTER_PORT"] != "29500"


def test_a_job_of_one_rank_meets_nobody(environment):
    """Whatever listens on the port that the launcher chose."""
    environment(**LAUNCHED | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"})
    launch.complete_environment(from_environment())
    assert launch.os.environ["MASTER_ADDR"] == "127.0.0.1" and launch.os.environ["MASTER_PORT"] != "29500"


def test_a_task_of_srun_has_it_among_its_parents(environment):
    environment(**SRUN, SLURM_TASK_PID=str(os.getppid()))
    assert from_environment() == Launch(5, 9, 1, 4) and launch.notes() == []


def test_variables_that_an_older_step_has_left_are_ignored_with_a_line(environment):
    environment(**SRUN, SLURM_TASK_PID="999999999")
    assert from_environment() == launch.ALONE
    line = "SLURM_TASK_PID 999999999 is no parent of this process: Slurm's variables are ignored, this process is alone"
    assert launch.notes() == [f"{line}; srun starts several"]


def test_in_a_container_process_ids_are_others(environment, monkeypatch, tmp_path):
    """Its first process belongs to the step, as its environment shows."""
    environment(**SRUN, SLURM_TASK_PID="999999999")
    monkeypatch.setattr(launch, "_ancestors", lambda: [str(os.getpid()), "1"])
    monkeypatch.setattr(launch, "_in_container", lambda first: first == "1")
    assert from_environment() == Launch(5, 9, 1, 4)


def test_an_interactive_shell_within_a_step_is_one_process(environment):
    environment(**SRUN, SLURM_TASK_PID=str(os.getppid()), SLURM_PTY_PORT="40000")
    assert from_environment() == launch.ALONE
    assert launch.notes()[0].startswith("SLURM_PROCID 5 is of an interactive shell: Slurm's variables are ignored")


@pytest.mark.parametrize("missing", [name for name in SRUN if name not in ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")])
def test_srun_variables_that_are_half_there(environment, monkeypatch, missing):
    """srun's own task says which is missing; elsewhere they are left over, and a line says so."""
    environment(**SRUN)
    monkeypatch.delenv(missing)
    assert from_environment() == launch.ALONE and launch.notes()[0].startswith(f"{missing} is not set")
    environment(SLURM_TASK_PID=str(os.getpid()))
    with pytest.raises(ConfigError, match=f"^{missing} is not set, though srun started this process"):
        from_environment()


@pytest.mark.parametrize("name", ["SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_NODEID"])
def test_a_number_of_sruns_that_is_none(environment, name):
    environment(**SRUN | {name: "x"})
    with pytest.raises(ConfigError, match=f"^{name} is 'x'"):
        from_environment()


def test_the_command_says_it_in_a_line(environment, capfd, tmp_path):
    environment(**LAUNCHED | {"RANK": "5", "WORLD_SIZE": "1"})
    (tmp_path / "f").write_text("")
    keys = {"model.path": tmp_path, "data.train": tmp_path / "f", "deepspeed.config": tmp_path / "f"}
    keys["output_dir"] = tmp_path / "out"
    words = [text for key, value in keys.items() for text in (f"--{key}", str(value))]
    assert cli.main(["train", *words]) == 2
    said = "dpo-ds: error: RANK is '5', which is no number from 0 to 0 (WORLD_SIZE is 1); start with deepspeed, "
    assert capfd.readouterr().err == f"{said}torchrun or srun, or unset RANK and WORLD_SIZE\n"


@pytest.mark.parametrize(
    ("nodes", "first"), [("n1", "n1"), ("n[1-3]", "n1"), ("a-b[007,9],c", "a-b007"), ("x,y[1-2]", "x")]
)
def test_the_first_host(nodes, first):
    assert launch.first_host(nodes) == first


def test_tasks_on_each_node():
    assert [launch.tasks_on_node("4(x2),1", node) for node in range(3)] == [4, 4, 1]
