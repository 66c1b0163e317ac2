"""Pairs out of scored completions, by hand."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from dpo_ds.commands.sample.folder import GROUPS, groups_of
from dpo_ds.commands.sample.ranking import SAME_SCORE, SAME_TEXT, TOO_FEW, TOO_FEW_KEPT, Ranker
from dpo_ds.config import SampleSection

ALL = [True] * 4


def ranker(**settings) -> Ranker:
    return Ranker(SampleSection(prompts="p", to="t", n=4, **settings))


def test_best_and_worst():
    assert ranker()(["a", "b", "c", "d"], ALL, [1, 3, 0, 2], 0) == ([(1, 2)], None)
    assert ranker()(["a", "b", "c", "d"], ALL, [3, 3, 0, 0], 0) == ([(0, 2)], None), "of equal ones the first"


@pytest.mark.parametrize(
    ("texts", "finished", "scores", "keep", "reason"),
    [
        (["a", "a", "a", "a"], ALL, [1, 2, 3, 4], "drop", SAME_TEXT),
        (["a", "b", "c", "d"], ALL, [1, 1, 1, 1], "drop", SAME_SCORE),
        (["a", "b", "c", "d"], [True, False, False, False], [1, 2, 3, 4], "drop", TOO_FEW),
        (["a", " ", "", "\n"], ALL, [1, 2, 3, 4], "keep", TOO_FEW_KEPT),
        (["a", "a", "b", "b"], [True, True, False, False], [1, 1, 2, 2], "drop", SAME_TEXT),
    ],
)
def test_a_prompt_without_a_pair_says_why(texts, finished, scores, keep, reason):
    for pairs in ("best_worst", "bradley_terry"):
        assert ranker(pairs=pairs, unfinished=keep)(texts, finished, scores, 0) == ([], reason)


def test_unfinished_and_empty_completions_are_passed_over():
    finished = [True, False, True, True]
    assert ranker()(["a", "b", "c", " "], finished, [1, 9, 2, -9], 0) == ([(2, 0)], None)
    assert ranker(unfinished="keep")(["a", "b", "c", " "], finished, [1, 9, 2, -9], 0) == ([(1, 0)], None)


def test_bradley_terry_draws_each_pair_by_its_odds():
    """Scores ln 3 apart at temperature 1: the better one wins with probability 3/4; at ln 3 / 2 apart and 1/2, too."""
    texts = ["a", "b", "c", "c"]
    for scores, temperature in (([np.log(3), 0, 0, 0], 1.0), ([np.log(3) / 2, 0, 0, 0], 0.5)):
        rank = ranker(pairs="bradley_terry", pair_temperature=temperature)
        drawn = [rank(texts, ALL, scores, row)[0] for row in range(2000)]
        assert all(len(pairs) == 5 for pairs in drawn), "six of four completions, less the one of equal texts"
        wins = np.mean([[chosen == 0 for chosen, rejected in pairs[:3]] for pairs in drawn])
        assert wins == pytest.approx(3 / 4, abs=0.02), "6000 draws: a standard error of 0.006"
        assert drawn == [rank(texts, ALL, scores, row)[0] for row in range(2000)], "seeded by row"
    certain = ranker(pairs="bradley_terry", pair_temperature=1e-6)(["a", "b", "c", "d"], ALL, [3, 1, 2, 0], 0)[0]
    assert certain == [(0, 1), (0, 2), (0, 3), (2, 1), (1, 3), (2, 3)]


def test_groups_are_one_row_a_prompt_with_what_may_be_in_pairs():
    def rows(prompt: int, texts, scores, finished=ALL):
        of_prompt = {"row": prompt, "prompt": f"p{prompt}", "stop": "</s>"}
        return [
            of_prompt | {"completion": text, "score": score, "finished": ended}
            for text, score, ended in zip(texts, scores, finished, strict=True)
        ]

    drawn = [*rows(0, "abcd", [1.0, 3.0, 2.0, 3.0], [True, True, False, True]), *rows(1, "aaaa", [1.0] * 4)]
    dropped = Counter()
    found = groups_of(drawn, SampleSection(prompts="p", to="t", n=4, pairs="groups"), dropped)
    expected = {"prompt": "p0", "completions": ["a</s>", "b</s>", "d</s>"], "scores": [1.0, 3.0, 3.0], "row": 0}
    assert found == [expected] and dropped == {SAME_TEXT: 1}
    assert pa.Table.from_pylist(found, schema=GROUPS).to_pylist() == found
