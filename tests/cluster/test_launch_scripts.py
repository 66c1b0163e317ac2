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
