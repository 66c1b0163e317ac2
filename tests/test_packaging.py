"""The files around the package agree with each other and with what is installed."""

import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


def _pins() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def _applies(pin: Requirement, python: str) -> bool:
    return pin.marker is None or pin.marker.evaluate({"python_version": python, "python_full_version": f"{python}.0"})


def test_each_package_is_pinned_once_for_every_python():
    for python in ("3.10", "3.11", "3.12", "3.13", "3.14"):
        names = [canonicalize_name(pin.name) for pin in _pins() if _applies(pin, python)]
        assert len(names) == len(set(names)), python
    assert all(re.fullmatch(r"==[\w.]+", str(pin.specifier)) for pin in _pins())


def test_torch_is_the_tested_one():
    assert {pin.name: str(pin.specifier) for pin in _pins()}["torch"] == "==2.13.0"


def test_what_setup_asks_for_is_pinned():
    """flash-attn-4 is left out: it is for CUDA alone, and only ever released as betas so far."""
    pinned = {canonicalize_name(pin.name) for pin in _pins()}
    asked = {canonicalize_name(Requirement(line).name) for line in requires("dpo-ds")}
    assert asked - pinned == {"flash-attn-4"}


def test_the_lowest_torch_and_the_tested_one_are_allowed():
    asked = next(Requirement(line) for line in requires("dpo-ds") if Requirement(line).name == "torch")
    assert [v for v in ("2.10.0", "2.11.0", "2.13.0") if asked.specifier.contains(v)] == ["2.11.0", "2.13.0"]


def test_installed_versions_are_the_pinned_ones():
    python = ".".join(map(str, sys.version_info[:2]))
    different = []
    for pin in _pins():
        try:
            installed = version(pin.name).split("+")[0]
        except PackageNotFoundError:  # of an extra that is not installed, or of another Python
            continue
        if _applies(pin, python) and not pin.specifier.contains(installed, prereleases=True):
            different.append(f"{pin.name} {installed}, not {pin.specifier}")
    assert not different, f"run `make install`: {different}"


def test_the_script_answers():
    answer = subprocess.run([Path(sys.executable).parent / "dpo-ds", "--version"], capture_output=True, text=True)
    assert (answer.returncode, answer.stdout) == (0, f"dpo-ds {version('dpo-ds')}\n")


def test_the_wheel_holds_the_template_of_the_report(tmp_path):
    """Built from a copy, so that no build/ is left in the tree."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "dpo_ds", tmp_path / "dpo_ds", ignore=shutil.ignore_patterns("__pycache__"))
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    files = set(zipfile.ZipFile(wheel).namelist())
    assert {"dpo_ds/commands/evaluate/report.html.jinja", "dpo_ds/commands/evaluate/report.py"} <= files
