"""The sentiment experiment in miniature, by its own driver: `make sentiment-small`, two minutes on two idle cores."""

import json
import subprocess
import sys

import pytest

from tests.ranks import ROOT


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sentiment")
    command = [sys.executable, "-m", "launch_scripts.recipes.sentiment", "--small", "--to", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True)
    assert (folder / "frontier.png").stat().st_size > 10_000
    return json.loads((folder / "results.json").read_text())


def test_dpo_raises_the_reward_well_above_the_reference(outcome):
    reward = {row["title"]: row["reward"][0] for row in outcome["rows"]}
    best = max(value for title, value in reward.items() if title.startswith("DPO"))
    assert best > reward["π_ref"] + 0.2, reward


def test_dpo_has_more_reward_than_sft_on_preferred_at_its_kl(outcome):
    assert outcome["at_equal_kl"]
    for at in outcome["at_equal_kl"]:
        assert at["difference"][0] > 0, at
