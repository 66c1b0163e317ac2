"""launch_scripts/: what shellcheck finds, and what they say when called wrongly. tests/cluster runs them for real."""

import os
import shutil
import subprocess

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
