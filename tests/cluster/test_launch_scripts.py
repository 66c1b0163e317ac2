"""launch_scripts/: what shellcheck finds, and what they say when called wrongly. tests/two_hosts runs them for real."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import ROOT

SCRIPTS = sorted(path for path in (ROOT / "launch_scripts").iterdir() if path.suffix in (".sh", ".sbatch"))


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    done = subprocess.run(["shellcheck", *map(str, SCRIPTS)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_without_arguments_a_script_says_how_it_is_called(script):
    assert os.access(script, os.X_OK) or script.suffix == ".sbatch"
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True)
    assert done.returncode == 2 and "usage: " in done.stderr and script.name in done.stderr


# Stands in for ssh: options, a host, and what the shell at the far end is to read, as sshd hands it on: one line of
# text, in an environment of its own.
SSH = """#!/usr/bin/env bash
while [[ $1 == -* ]]; do
    [[ $1 == -o || $1 == -l ]] && shift
    shift
done
echo "$1" >>"$SSH_CALLS"
shift
exec env -i HOME="$HOME" PATH=/usr/bin:/bin sh -c "$*"
"""
# Stands in for pdsh -S -f FANOUT -w HOSTS COMMAND...: replaces %h, %u, %n and %%, then one ssh a host.
PDSH = """#!/usr/bin/env python3
import getpass, re, subprocess, sys
hosts, command = sys.argv[5].split(","), " ".join(sys.argv[6:])
running = []
for number, host in enumerate(hosts):
    values = {"h": host, "u": getpass.getuser(), "n": str(number), "%": "%"}
    text = re.sub("%([hun%])", lambda found: values[found[1]], command)
    running.append(subprocess.Popen(["ssh", "-oConnectTimeout=10", "-2", "-a", "-x", "-lme", host, text]))
sys.exit(max(process.wait() for process in running))
"""
ODD = """a b/$(touch HERE/ran) `touch HERE/ran`; touch HERE/ran & "quoted" 'single' %h %n %% 100% \\ \\n $HOME ~ * ! # ü
second line"""


@pytest.fixture
def far_end(tmp_path):
    """PATH with ssh and pdsh that end in a real shell; two hosts in a hostfile."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {"ssh": SSH, "pdsh": PDSH}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (tmp_path / "hostfile").write_text("alpha slots=1\nbeta slots=1\n")
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    return os.environ | {"PATH": path, "SSH_CALLS": str(tmp_path / "calls"), "PYTHONPATH": str(ROOT)}


def over_ssh(env: dict, hostfile: Path, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    script = ["bash", str(ROOT / "launch_scripts/train_multinode_deepspeed.sh"), str(hostfile), *arguments]
    return subprocess.run(script, capture_output=True, text=True, cwd=cwd, env=env, timeout=240)


@pytest.mark.parametrize("pdsh", ["a stand-in", "pdsh"])
def test_arguments_and_variables_reach_the_far_end_unchanged(far_end, tmp_path, pdsh):
    """Both ranks print their configuration; every character of the odd paths is in it, and nothing of them ran."""
    if pdsh == "pdsh":
        if shutil.which("pdsh") is None:
            pytest.skip("pdsh is not installed")
        (tmp_path / "bin" / "pdsh").unlink()
    odd = ODD.replace("HERE", str(tmp_path))
    keys = {"model.path": odd, "data.train": odd.replace(" ", ""), "deepspeed.config": "zero3.json", "output_dir": "$x"}
    keys |= {"data.eval": "", "reference.path": "a%hb", "data.format": "auto"}
    words = [text for key, value in keys.items() for text in (f"--{key}", str(value))]
    values = {"HF_HOME": odd.split("\n")[0], "NCCL_DEBUG_FILE": "/tmp/%h.%p", "TOKENIZERS_PARALLELISM": "false"}
    values |= {"PYTHONSTARTUP": f"$(touch {tmp_path}/ran)", "HF_LINES": "a\nNCCL_X=1"}
    secrets = ("HF_TOKEN_2", "HF_S3_SECRET", "NCCL_PASSWORD", "DPO_DS_API_KEY", "MLFLOW_TRACKING_TOKEN")
    values |= dict.fromkeys(secrets, "5ecret")
    report = tmp_path / "report.py"
    report.write_text(
        "import json, os, sys\n"
        f"json.dump([sys.argv[1:], dict(os.environ)], open({str(tmp_path)!r} + '/rank-' + os.environ['RANK'], 'w'))\n"
    )
    seen = tmp_path / "seen"
    (seen / "dpo_ds").mkdir(parents=True)
    (seen / "dpo_ds" / "__init__.py").write_text("")
    (seen / "dpo_ds" / "__main__.py").write_text(report.read_text())
    done = over_ssh(far_end | values, tmp_path / "hostfile", "train", *words, cwd=seen)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "ran").exists()
    for rank in ("0", "1"):
        arguments, environment = json.loads((tmp_path / f"rank-{rank}").read_text())
        assert [word for word in arguments if not word.startswith("--local_rank")] == ["train", *words]
        for name in ("HF_HOME", "NCCL_DEBUG_FILE", "TOKENIZERS_PARALLELISM", "PYTHONSTARTUP"):
            assert environment[name] == values[name]
        assert environment["WORLD_SIZE"] == "2" and "NCCL_X" not in environment and "HF_LINES" not in environment
        assert not set(secrets) & environment.keys()
    assert "HF_LINES has several lines; it stays here" in done.stderr


@pytest.mark.parametrize("host", ["-oProxyCommand=id", "a;id", "$(id)", "a`id`", "a,b", "me@a", "a[1-3]", "ä", "a%h"])
def test_a_host_that_is_none_is_refused_before_anything_is_called(far_end, tmp_path, host):
    (tmp_path / "hostfile").write_text(f"alpha slots=1\n{host} slots=1\n")
    done = over_ssh(far_end, tmp_path / "hostfile", "train")
    assert done.returncode == 2 and f"error: '{host}' is no host" in done.stderr
    assert not (tmp_path / "calls").exists()


def test_a_folder_that_the_launcher_cannot_name_is_refused(far_end, tmp_path):
    folder = tmp_path / "a b"
    folder.mkdir()
    done = over_ssh(far_end, tmp_path / "hostfile", "train", cwd=folder)
    assert done.returncode == 2 and f"'{folder}': the launcher can start nothing there" in done.stderr


@pytest.mark.parametrize("script", [script for script in SCRIPTS if "HOSTFILE" in script.read_text()])
@pytest.mark.parametrize("text, mistake", [
    ("# nodes\nnode1 slots=8\nnode2\n", "hostfile:3:node2: not of the form 'HOST slots=RANKS'"),
    ("# none\n", "hostfile: names no host"),
])  # fmt: skip
def test_a_malformed_hostfile_is_one_line(script, text, mistake, tmp_path):
    (tmp_path / "hostfile").write_text(text)
    done = subprocess.run(["bash", str(script), "hostfile", "train"], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, f"{script.name}: error: {mistake}\n")


# Stands in for srun: notes its arguments, leaves a checkpoint and STATUS.json as a run does that was told to stop.
SRUN = """#!/bin/sh
echo "$@" >>"$CALLS"
sleep 0.05  # a file is newer than another by a tick of the system's clock, which is some milliseconds
if [ -n "$STEP" ]; then
    mkdir -p "$OUT/checkpoints" && echo "step-$STEP" >"$OUT/checkpoints/latest"
    echo '{"state": "stopped", "reason": "SIGUSR1 received", "step": '"$STEP"', "exit_code": 75}' >"$OUT/STATUS.json"
fi
exit 75
"""


def test_a_requeued_job_goes_on_from_its_own_checkpoints_and_ends_where_it_makes_no_step(tmp_path):
    """The folder's name is one that YAML must quote, and so long that YAML breaks its line."""
    out, programs = tmp_path / ("runs: a " + "long " * 20 + "name"), tmp_path / "bin"
    programs.mkdir()
    for name, text in {"srun": SRUN, "scontrol": '#!/bin/sh\necho "scontrol $*"\n'}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    keys = {"model.path": "m", "data.train": "d", "deepspeed.config": "c", "output_dir": out}
    command = ["train", *(text for key, value in keys.items() for text in (f"--{key}", str(value)))]
    env = os.environ | {"PATH": path, "SLURM_JOB_ID": "7", "CALLS": str(tmp_path / "calls"), "OUT": str(out)}

    def submit(step: str) -> str:
        script = ["bash", str(ROOT / "launch_scripts/slurm_train.sbatch"), *command, "--checkpoint.resume", "never"]
        done = subprocess.run(script, capture_output=True, text=True, cwd=ROOT, env=env | {"STEP": step})
        assert done.returncode == 75, done.stderr
        return done.stdout

    assert "scontrol requeue 7" in submit("5")
    assert json.loads((out / "STATUS.json").read_text())["step"] == 5 and (out / "logs/job-7/started").exists()
    assert "scontrol requeue 7" in submit("9")
    assert "not requeued: it made no step" in (said := submit("9")) and "scontrol" not in said
    first, *later = (tmp_path / "calls").read_text().splitlines()
    assert first.endswith("--checkpoint.resume never")
    assert all(call.endswith("--checkpoint.resume auto") for call in later) and len(later) == 2
