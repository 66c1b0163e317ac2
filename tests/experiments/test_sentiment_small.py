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
    assert "PPO of a learned reward" in (folder / "report.md").read_text()
    return json.loads((folder / "results.json").read_text())


def test_dpo_raises_the_reward_well_above_the_reference(outcome):
    """A probability; that of π_ref is near 0.5, because its reviews are of both sentiments."""
    reward = {row["title"]: row["reward"][0] for row in outcome["rows"]}
    assert 0.4 < reward["π_ref"] < 0.6
    assert reward["DPO, β 0.1"] > reward["π_ref"] + 0.15


def test_ppo_raises_it_by_asking_the_reward_itself(outcome):
    row = next(row for row in outcome["rows"] if row["title"] == "PPO, β 0.03")
    assert row["reward"][0] > outcome["rows"][0]["reward"][0] + 0.15
    assert row["kl"][0] < 10


@pytest.mark.parametrize("title", ["PPO", "RLOO", "online DPO"])
def test_so_does_a_reward_that_was_learned_from_dpos_pairs(outcome, title):
    row = next(row for row in outcome["rows"] if row["title"] == f"{title} of a learned reward, β 0.3")
    assert row["reward"][0] > outcome["rows"][0]["reward"][0] + 0.1


def test_dpo_has_more_reward_than_sft_on_preferred_at_its_kl(outcome):
    """At the end of SFT, whose reward stays where that of the preferred completions is while its KL grows."""
    at = next(at for at in outcome["at_equal_kl"] if at["title"].startswith("SFT"))
    largest = max(row["kl"][0] for row in outcome["rows"] if row["title"].startswith("DPO"))
    assert at["kl"][0] < 2 * largest  # else DPO's last point stands for it, at a KL that is not comparable
    assert at["difference"][0] > 0.05
