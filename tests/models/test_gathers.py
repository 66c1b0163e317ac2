"""What DeepSpeed does with parameters between forward and backward."""

import json

import pytest

from tests.ranks import run_worker


@pytest.mark.distributed
def test_checks_before_training_do_not_make_every_step_gather_twice(tmp_path):
    run_worker("gathers.py", 1, tmp_path, str(tmp_path / "out.json"))
    seen = json.loads((tmp_path / "out.json").read_text())
    assert seen["kept"][0] == 0, "the first step is recorded: nothing is kept yet"
    assert seen["kept"][2:] == [seen["parameters"]] * 2, "a small model stays gathered from forward to backward"
