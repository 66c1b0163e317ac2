"""The deepspeed launcher between two hosts with addresses of their own: over pdsh and ssh, and called on each."""

import shutil
import time
from pathlib import Path

import pytest

from tests.ranks import ROOT
from tests.small_jobs import status, steps, train_command
from tests.two_hosts.hosts import environment, minute

OVER_SSH = str(ROOT / "launch_scripts/train_multinode_deepspeed.sh")
ON_EACH = str(ROOT / "launch_scripts/train_no_ssh.sh")


@pytest.fixture
def hostfile(world) -> Path:
    path = world / "hostfile"
    path.write_text("# two nodes\nalpha slots=1\nbeta slots=1\n")
    return path


def test_trains_across_two_addresses(ssh, world, hostfile):
    command = train_command(world, "over_ssh", train__max_steps=4)
    local = world / "local"  # a file system of its own on each host
    local.mkdir()
    for host in ssh.values():
        assert host.run("mount", "-t", "tmpfs", "tmpfs", str(local)).returncode == 0
    env = environment(DPO_DS_CACHE=str(local))
    done = ssh["alpha"].run(OVER_SSH, hostfile, *command, env=env, timeout=200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert status(world / "over_ssh") == {"state": "done", "reason": "", "step": 4, "exit_code": 0}
    assert "ranks: 2" in (world / "over_ssh/config.yaml").read_text()
    assert [line["step"] for line in steps(world / "over_ssh")] == [1, 2, 3, 4]
    assert "deepspeed --hostfile" in done.stderr  # it prints what it runs
    assert any(line.startswith("alpha: step 4/4") for line in done.stdout.splitlines())
    for host in ssh.values():  # tokenised on each, by one of its ranks
        assert len(host.run("ls", str(local / "tokenized")).stdout.split()) == 2, "the data and its lock"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "no such hostfile"),
        ("alpha slots=1\nbeta\n", "hostfile-1:2:beta: not of the form 'HOST slots=RANKS'"),
        ("# nobody\n", "names no host"),
        ("alpha slots=1\nalpha slots=2\n", "names alpha twice"),
        ("alpha slots=1\nomega slots=1\n", "no ssh without a password to, or no"),
        ("alpha slots=1\n10.213.47.99 slots=1\n", "on: 10.213.47.99; see"),
    ],
    ids=["missing", "no slots", "empty", "twice", "unknown host", "unreachable host"],
)
def test_a_wrong_hostfile_or_node_is_one_line(ssh, world, text, said):
    path = world / "hostfile-1"
    path.unlink(missing_ok=True)
    if text is not None:
        path.write_text(text)
    start = time.monotonic()
    done = ssh["alpha"].run(OVER_SSH, path, "train", env=environment())
    assert done.returncode == 2 and time.monotonic() - start < minute()
    (line,) = done.stderr.splitlines()
    assert line.startswith("train_multinode_deepspeed.sh: error: ") and said in line


def start_on_each(hosts, world, hostfile, out, *, only=("alpha", "beta"), code=None, **env):
    """train_no_ssh.sh on each host; code: folder of the host's own dpo_ds."""
    running = {}
    for name in only:
        folder = (code or {}).get(name, ROOT)
        place = environment(DPO_DS_CACHE=str(world / "cache"), **env) | {"PYTHONPATH": str(folder)}
        with (world / f"{out}-{name}.log").open("wb") as log:
            running[name] = hosts[name].start(
                ON_EACH, hostfile, *train_command(world, out, train__max_steps=2),
                cwd=folder, env=place, stdout=log, stderr=log,
            )  # fmt: skip
    return running


def end(running, world, out) -> tuple[list[int], list[str]]:
    """Exit codes and the lines with an error; within a minute."""
    deadline = time.monotonic() + minute()
    codes = [process.wait(deadline - time.monotonic()) for process in running.values()]
    text = "".join((world / f"{out}-{name}.log").read_text() for name in running)
    assert "Traceback" not in text
    return codes, [line for line in text.splitlines() if "error" in line.lower()]


def test_different_code_on_the_nodes(hosts, world, hostfile):
    other = world / "other_code"
    shutil.copytree(ROOT / "dpo_ds", other / "dpo_ds", ignore=shutil.ignore_patterns("__pycache__"))
    init = other / "dpo_ds/__init__.py"
    init.write_text(init.read_text().replace('__version__ = "', '__version__ = "99.'))
    running = start_on_each(hosts, world, hostfile, "mismatch", code={"beta": other}, MASTER_PORT="29601")
    codes, (line,) = end(running, world, "mismatch")
    assert codes == [2, 2]
    assert line.startswith("dpo-ds: error: dpo_ds 0.") and "alpha (rank 0), 99.0." in line and "beta (rank 1)" in line


def test_a_port_in_use(hosts, world, hostfile):
    listen = "import socket, time; s = socket.create_server(('', 29602)); time.sleep(600)"
    holder = hosts["alpha"].start("python3", "-c", listen)
    running = start_on_each(hosts, world, hostfile, "port", only=("alpha",), MASTER_PORT="29602")
    codes, (line,) = end(running, world, "port")
    holder.kill()
    assert codes == [2]
    assert line.startswith("dpo-ds: error: port 29602 on alpha is in use; choose another")


def test_an_unreachable_first_node(hosts, world, hostfile):
    env = {"MASTER_ADDR": "10.213.47.99", "MASTER_PORT": "29603"}
    running = start_on_each(hosts, world, hostfile, "unreachable", only=("beta",), **env)
    codes, (line,) = end(running, world, "unreachable")
    assert codes == [2]
    assert line.startswith("dpo-ds: error: beta cannot reach rank 0's host 10.213.47.99, port 29603 (")
