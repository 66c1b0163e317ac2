"""Pictures of an evaluation, whatever the models are called."""

import numpy as np
import pytest

from dpo_ds.commands.evaluate.plots import curves_png, frontier_png, histogram_png

NAMES = ("$x", r"a$\frac{b$c", r"$\nosuch$", "50 % _^{}", "naïve")


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_no_mathematics(tmp_path, name):
    points = [{"name": other, "kl": 1.0, "reward": 2.0, "beta": 0.1} for other in (name, "b")]
    frontier_png(points, tmp_path / "frontier.png", reward=name)
    histogram_png({name: np.arange(9.0), "b": np.arange(9.0)}, tmp_path / "rewards.png", name)
    curves_png(
        {other: [{"step": 1, "loss": 0.7}, {"step": 2, "loss": 0.6}] for other in (name, "b")}, tmp_path / "c.png"
    )
    assert all((tmp_path / file).stat().st_size > 5000 for file in ("frontier.png", "rewards.png", "c.png"))
