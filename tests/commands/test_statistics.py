"""Means, errors, intervals and win rates against hand arithmetic; judges; baselines; the frontier."""

import json
import time

import numpy as np
import pytest

from dpo_ds.cluster.foreign import Limit
from dpo_ds.commands.evaluate.command import _is_file
from dpo_ds.commands.evaluate.judging import Judge, by_scores, read_baseline
from dpo_ds.commands.evaluate.measure import numbered
from dpo_ds.commands.evaluate.plots import frontier
from dpo_ds.commands.evaluate.results import Measured, pair_measures
from dpo_ds.commands.evaluate.statistics import bootstrap_interval, distribution, mean_of, mean_of_pairs, win_rate
from dpo_ds.errors import DataError, UserError
from tests import scores

LIMIT = Limit(0.5, "evaluate.score_timeout")


def test_the_error_is_of_means_of_prompts():
    # means of prompts 2 and 4, their standard deviation √2, over √2 prompts
    assert mean_of(np.array([[1.0, 3.0], [2.0, 6.0]])) == pytest.approx({"mean": 3.0, "standard_error": 1.0})
    pairs = np.array([0.0, 1.0, 1.0, 1.0])  # deviation √(0.75 / 3) = 1/2, over √4
    assert mean_of(pairs) == pytest.approx({"mean": 0.75, "standard_error": 0.25})
    assert mean_of(np.repeat(pairs[:, None], 5, axis=1)) == mean_of(pairs), "copies of a completion tell nothing new"


def test_of_a_single_prompt_completions_are_the_observations():
    assert mean_of(np.array([[1.0, 3.0]])) == pytest.approx({"mean": 2.0, "standard_error": 1.0})
    assert mean_of(np.array([[7.0]])) == {"mean": 7.0, "standard_error": None}


def test_pairs_of_one_prompt_are_one_observation():
    values, prompts = np.array([1.0, 3.0, 2.0, 6.0]), numbered(["a", "a", "b", "c"])
    assert prompts.tolist() == [0, 0, 1, 2] and numbered("bab").tolist() == [0, 1, 0]
    # from the mean 3 the prompts are off by -2 + 0, -1 and 3: √((4 + 1 + 9) 3/2) / 4
    assert mean_of_pairs(values, prompts) == pytest.approx({"mean": 3.0, "standard_error": 21**0.5 / 4})
    assert mean_of_pairs(values, np.arange(4)) == pytest.approx(mean_of(values)), "one pair a prompt"
    assert mean_of_pairs(values, np.zeros(4, int)) == mean_of(values), "a single prompt"
    copies = mean_of_pairs(np.repeat(values, 6), np.repeat(np.arange(4), 6))
    assert copies == pytest.approx(mean_of(values)), "copies of a pair tell nothing new"

    logps = np.stack([10 * values, np.zeros(4)], axis=1)
    measures = pair_measures(Measured("policy", "path", beta=0.1, pair_logps=logps), prompts)
    for name, scale in (("rewards/margins", 1), ("rewards/chosen", 1), ("logps/chosen", 10)):
        assert measures[name]["standard_error"] == pytest.approx(scale * 21**0.5 / 4)
    assert measures["pairs"] == 4 and measures["rewards/accuracies"] == {"mean": 1.0, "standard_error": 0.0}
    assert sum(measures["rewards/margins"]["histogram"]["counts"]) == 4


@pytest.mark.parametrize("values", [[0.3, 0.1 + 0.2], [2.0, 2.0], [1e17, 1e17], [0.0]])
def test_values_that_are_equal_but_for_rounding_have_a_histogram(values):
    histogram = distribution(np.array(values))["histogram"]
    assert sum(histogram["counts"]) == len(values)
    assert histogram["edges"][0] < min(values) <= max(values) < histogram["edges"][-1]


def test_bootstrap_draws_prompts():
    two = np.array([[0.0, 0.0], [1.0, 1.0]])  # the mean is 0, 1/2 or 1 with probability 1/4, 1/2, 1/4
    assert bootstrap_interval(two, resamples=500, seed=0) == [0.0, 1.0]
    mixed = np.array([[0.0, 1.0], [1.0, 0.0]])  # every prompt's mean is 1/2
    assert bootstrap_interval(mixed, resamples=500, seed=0) == [0.5, 0.5]
    many = np.tile([0.0, 1.0], 200)  # standard error 1/2 / √400 = 0.025, and 1.96 of them to each side
    low, high = bootstrap_interval(many, resamples=2000, seed=1)
    assert low == pytest.approx(0.5 - 0.049, abs=0.006) and high == pytest.approx(0.5 + 0.049, abs=0.006)
    assert bootstrap_interval(many, 100, seed=1) == bootstrap_interval(np.repeat(many[:, None], 3, 1), 100, seed=1)
    assert bootstrap_interval(many, 100, seed=1) != bootstrap_interval(many, 100, seed=2)


def test_ties_count_half():
    ours, theirs = np.array([[1.0, 2.0], [3.0, 0.0], [5.0, 5.0]]), np.array([[1.0, 1.0], [4.0, 0.0], [4.0, 4.0]])
    preferred = by_scores(ours, theirs)
    assert preferred.tolist() == [[0.5, 1.0], [0.0, 0.5], [1.0, 1.0]]
    found = win_rate(preferred, resamples=200, seed=0)
    assert found["win_rate"] == pytest.approx((0.75 + 0.25 + 1) / 3)
    assert [found[key] for key in ("wins", "ties", "losses")] == pytest.approx([3 / 6, 2 / 6, 1 / 6])
    assert found["interval"] == [0.25, 1.0], "the means of prompts are 1/4, 3/4 and 1"


def test_distribution_has_every_value_in_a_bin():
    found = distribution(np.arange(101.0).reshape(-1, 1))
    assert found["quantiles"] == pytest.approx({"0.05": 5, "0.25": 25, "0.5": 50, "0.75": 75, "0.95": 95})
    counts, edges = found["histogram"]["counts"], found["histogram"]["edges"]
    assert sum(counts) == 101 and len(edges) == len(counts) + 1 and (edges[0], edges[-1]) == (0.0, 100.0)
    assert sum(distribution(np.zeros(7))["histogram"]["counts"]) == 7


def test_a_judge_is_asked_in_both_orders():
    fair = Judge("tests.scores:longer", scores.longer, LIMIT)
    assert fair(["p"] * 3, ["aa", "a", "a"], ["a", "aa", "b"]).tolist() == [[1, 1], [0, 0], [0.5, 0.5]]
    biased = Judge("tests.scores:first_one", scores.first_one, LIMIT)(["p"], ["a"], ["b"])
    assert biased.tolist() == [[1, 0]] and biased.mean() == 0.5, "who always takes the first gives a tie"
    assert fair([], [], []).shape == (0, 2)


@pytest.mark.parametrize(
    ("function", "parts"),
    [
        (scores.out_of_range, ["returned 2 for row 0", "'ours'", "from 0 to 1"]),
        (scores.broken, ["raised KeyError", "no such judge"]),
        (lambda prompts, first, second: [1.0], ["1 scores for 2"]),
        (lambda prompts, first, second: [None, 1.0], ["None", "finite"]),
        (lambda prompts, first, second: [0.5j, 1.0], ["0.5j", "finite"]),
        (lambda prompts, first, second: exit("no licence"), ["raised SystemExit: no licence"]),
        (lambda prompts, first, second: time.sleep(60), ["did not return within 0.5 s (evaluate.score_timeout)"]),
    ],
)
def test_a_judge_that_errs_is_named(function, parts):
    with pytest.raises(UserError) as caught:
        Judge("mine:judge", function, LIMIT)(["p", "q"], ["ours", "b"], ["c", "d"])
    assert [part for part in ["mine:judge", *parts] if part not in str(caught.value)] == []


def baseline(path, *rows: dict) -> list[list[str]]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_baseline(str(path), ["p", "q"], {}, tokenizer=None)


def test_a_baseline_may_end_at_once_and_is_one_models(tmp_path):
    p, q = {"prompt": "p", "completion": "", "model": "dpo"}, {"prompt": "q", "completion": "yes", "model": "dpo"}
    assert baseline(tmp_path / "one.jsonl", p, q, p) == [["", ""], ["yes"]]
    with pytest.raises(DataError) as caught:
        baseline(tmp_path / "two.jsonl", p, q, {**q, "model": "reference"})
    wanted = ["evaluate.baseline", "two.jsonl:3", "'model' has 'dpo' and 'reference'", "that model's rows alone"]
    assert [part for part in wanted if part not in str(caught.value)] == [] and "\n" not in str(caught.value)
    with pytest.raises(DataError, match="'completion' is null"):
        baseline(tmp_path / "null.jsonl", {**p, "completion": None})


def test_a_baseline_may_be_a_split_of_a_folder(tmp_path):
    for split in ("dpo", "ipo"):
        row = {"prompt": "p", "completion": f"{split}'s"}
        (tmp_path / f"{split}-00000-of-00001.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "colon:model").mkdir()
    assert _is_file(f"{tmp_path}:ipo") and not _is_file(str(tmp_path)) and not _is_file(f"{tmp_path}/colon:model")
    assert read_baseline(f"{tmp_path}:ipo", ["p"], {}, tokenizer=None) == [["ipo's"]]


def test_the_frontier_leaves_out_what_another_point_beats():
    points = [
        {"name": name, "kl": kl, "reward": reward} for name, kl, reward in [("a", 3, 5), ("b", 0, 1), ("c", 2, 5)]
    ]
    points += [{"name": "d", "kl": 1, "reward": 0.5}, {"name": "e", "kl": 4, "reward": 6}]
    assert [point["name"] for point in frontier(points)] == ["b", "c", "e"]
