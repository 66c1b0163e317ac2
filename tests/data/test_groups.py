"""Rows with any number of completions: how they are read, kept on disk and dealt out in batches."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from dpo_ds.batch import CHOSEN_ONLY, NO_COMPARISON, OF_A_PAIR, PAIR, Group
from dpo_ds.data.batching import Layout, Lengths, global_batches, plan, steps_per_epoch
from dpo_ds.data.census import format_census
from dpo_ds.data.dataset import GROUPS, GroupDataset, GroupWriter
from dpo_ds.data.formats import detect, read
from dpo_ds.data.preparation import prepare
from dpo_ds.data.rows import BadRow, Location, Row
from dpo_ds.errors import ConfigError, DataError
from tests.data_helpers import options, tokenizer, write_lines


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


ALL_OF_THREE = {(0, 1), (0, 2), (1, 2)}
CHAT = [[assistant("a")], [assistant("b")], [assistant("c")]]
ROWS = {  # a row, the prompt, the completions, which is better than which
    "several rejected": (
        {"prompt": "q", "chosen": "a", "rejected": ["b", "c"]}, "q", ["a", "b", "c"], {(0, 1), (0, 2)},
    ),
    "several of both": (
        {"prompt": "q", "chosen": ["a", "b"], "rejected": ["c", "d"]},
        "q", ["a", "b", "c", "d"], {(0, 2), (0, 3), (1, 2), (1, 3)},
    ),
    "several rejected turns": (
        {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": CHAT[1:]}, [user("q")], CHAT, {(0, 1), (0, 2)},
    ),
    "texts behind turns": (
        {"prompt": [user("q")], "chosen": "a", "rejected": ["b", "c"]}, [user("q")], CHAT, {(0, 1), (0, 2)},
    ),
    "scores": ({"prompt": "q", "completions": ["c", "a", "b"], "scores": [-1, 7, 0.5]}, "q", ["c", "a", "b"],
               {(1, 0), (1, 2), (2, 0)}),
    "ranks": ({"prompt": "q", "completions": ["a", "b", "c"], "ranks": [1, 2, 3]}, "q", ["a", "b", "c"], ALL_OF_THREE),
    "rank": ({"prompt": "q", "completions": ["a", "b", "c"], "rank": [1, 2, 3]}, "q", ["a", "b", "c"], ALL_OF_THREE),
    "a tie": (
        {"prompt": "q", "completions": ["a", "b", "c"], "scores": [3, 3, 1]}, "q", ["a", "b", "c"], {(0, 2), (1, 2)},
    ),
    "UltraFeedback": (
        {"source": "x", "instruction": "q", "models": ["m"] * 3, "completions": [
            {"model": "m", "response": text, "overall_score": score, "annotations": {}}
            for text, score in (("a", 8.5), ("b", 7.0), ("c", 1.0))
        ]},
        [user("q")], CHAT, ALL_OF_THREE,
    ),
    "Nectar": (
        {"prompt": "\n\nHuman: q\n\nAssistant: ", "turns": 1, "answers": [
            {"answer": text, "model": "m", "rank": rank} for text, rank in (("a", 1.0), ("b", 2.0), ("c", 3.0))
        ]},
        "\n\nHuman: q\n\nAssistant:", [" a", " b", " c"], ALL_OF_THREE,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_several_completions(name):
    values, prompt, completions, better = ROWS[name]
    row = Row(values, {})
    found = read(row, detect(row, PAIR), PAIR)
    assert (found.prompt, list(found.completions), set(found.comparisons)) == (prompt, completions, better)
    assert len(found.comparisons) == len(better)
    assert found.ties == (name == "a tie")
    best = read(Row(values, {}), detect(row, PAIR), CHOSEN_ONLY)
    ahead = [i for i in range(len(completions)) if all(worse != i for _, worse in better)]
    assert (best.prompt, list(best.completions)) == (prompt, [completions[ahead[0]]]) and not best.comparisons


RANKED = {"prompt": "q", "completions": ["a", "b", "c"]}


@pytest.mark.parametrize(
    ("values", "reason", "message"),
    [
        (RANKED, "no scores", r"'completions' has 3 completions and nothing that ranks them; it needs one of scores"),
        ({**RANKED, "scores": [1, 2]}, "scores of another count", r"'scores' has 2 numbers for 3 completions"),
        ({**RANKED, "ranks": [1, None, 3]}, "ranks missing", r"'ranks' of completions\[1\] is None; every completion"),
        ({**RANKED, "scores": [1, "2", 3]}, "scores missing", r"'scores' of completions\[1\] is '2'"),
        ({**RANKED, "scores": [1, float("nan"), 3]}, "scores missing", r"'scores' of completions\[1\] is nan"),
        ({**RANKED, "scores": 3}, "wrong type", r"'scores' is int 3; it must be a list of numbers"),
        ({**RANKED, "scores": [2, 2, 2]}, "all completions equally good", r"3 completions, all with scores 2"),
        ({**RANKED, "completions": ["a"] * 3, "scores": [1, 2, 3]}, "all completions equal", r"all 3 completions are"),
        ({"prompt": "q", "completions": ["a", " ", "c"], "scores": [1, 2, 3]}, "empty completions[1]", r"is empty"),
        ({"prompt": "q", "completions": ["a", 7], "scores": [1, 2]}, "wrong type", r"'completions\[1\]' is int 7"),
        ({"prompt": "q", "chosen": "a", "rejected": ["b", ""]}, "empty completions[2]", r"'completions\[2\]' is empty"),
    ],
)
def test_mistakes(values, reason, message):
    row = Row(values, {})
    with pytest.raises(BadRow, match=message) as refused:
        read(row, detect(row, PAIR), PAIR)
    assert refused.value.reason == reason


def test_margins_are_the_differences_of_scores():
    row = Row({**RANKED, "scores": [1, 4, 2]}, {})
    found = read(row, "ranked", PAIR, "scores")
    assert dict(zip(found.comparisons, found.margins, strict=True)) == {(1, 0): 3, (1, 2): 2, (2, 0): 1}
    with pytest.raises(BadRow, match="'margin' is .* it must be 'scores', whose differences are the margins"):
        read(row, "ranked", PAIR, "margin")


def groups() -> list[Group]:
    generator, made = np.random.default_rng(0), []
    for sizes in ((3, 2, 4), (5, 1, 2, 3, 4), (2, 6), (1, 2, 2, 1, 3, 1, 2, 5)):
        prompt, *completions = (generator.integers(0, 9, n) for n in sizes)
        masks = tuple(np.arange(len(ids)) != 1 for ids in completions)
        count = len(completions)
        better = np.array(list(itertools.combinations(range(count), 2))[::-1], np.int64).reshape(-1, 2)
        known = OF_A_PAIR if count == 2 else NO_COMPARISON if count == 1 else better
        made.append(Group(prompt, tuple(completions), masks, known, index=len(made)))
    return made


def written(folder, made) -> GroupDataset:
    folder.mkdir()
    with GroupWriter(folder) as writer:
        for part in filter(None, (made[:2], made[2:])):
            writer.write(part, [Location("a", 1)] * len(part))
    (folder / "census.json").write_text(json.dumps({"location_files": ["a"], "source_ends": [len(made)]}))
    return GroupDataset(folder, [1.0])


def test_groups_survive_the_disk(tmp_path):
    made = groups()
    data = written(tmp_path / "a", made)
    for group, found in zip(made, [data[i] for i in range(len(made))], strict=True):
        assert all(map(np.array_equal, found.completions, group.completions)) and found.index == group.index
        assert all(map(np.array_equal, found.masks, group.masks)) and len(found.masks) == len(group.masks)
        assert np.array_equal(found.prompt, group.prompt) and np.array_equal(found.comparisons, group.comparisons)
    assert data.completions.tolist() == [2, 4, 1, 7] and data.comparisons.tolist() == [1, 6, 0, 21]
    assert data.completion_lengths[1].tolist() == [1, 2, 3, 4, 0, 0, 0]
    parts = [[ids.tolist() for ids in row] for row in data.token_ids()]
    assert parts == [[group.prompt.tolist(), *(ids.tolist() for ids in group.completions)] for group in made]
    pairs = written(tmp_path / "b", made[:1])
    assert not (tmp_path / "b" / GROUPS).exists(), "a pair is all in one row, as ever"
    other = [made[0], Group(*list(vars(made[1]).values())[:3], made[1].comparisons[::-1]), *made[2:]]
    assert len({data.content(), pairs.content(), written(tmp_path / "c", other).content()}) == 3


def test_batches_are_filled_with_whole_groups_to_the_nearest():
    counts = np.array([6, 1, 3, 6, 21, 1, 1, 1])
    sources = [(0, len(counts), 1.0)]
    assert steps_per_epoch(sources, 8, counts) == 5
    batches = list(itertools.islice(global_batches(sources, 0, 8, 1, counts), 10))
    assert [step for step, _ in batches] == list(range(1, 11)) and all(len(rows) for _, rows in batches)
    for epoch in (batches[:5], batches[5:]):
        assert sorted(np.concatenate([rows for _, rows in epoch]).tolist()) == list(range(len(counts)))
    resumed = list(itertools.islice(global_batches(sources, 0, 8, 4, counts), 3))
    assert [rows.tolist() for _, rows in resumed] == [rows.tolist() for _, rows in batches[3:6]]
    even = list(itertools.islice(global_batches([(0, 64, 1.0)], 0, 24, 1, np.full(64, 6)), 16))
    assert [len(rows) for _, rows in even] == [4] * 16
    assert steps_per_epoch([(0, 2, 1.0)], 4, np.array([21, 21])) == 2, "no batch is empty"


@pytest.mark.parametrize("name", ["packed", "padded"])
def test_a_group_longer_than_the_budget_is_a_micro_batch_of_its_own(name):
    lengths = Lengths(np.array([5, 5, 5]), np.array([[5, 5, 0, 0], [40, 40, 40, 40], [5, 0, 0, 0]]))
    (share,) = plan(lengths, Layout(name, 60, 64), ranks=1)
    assert sorted(map(sorted, share)) == [[0, 2], [1]]
    assert lengths.tokens.tolist() == [15, 165, 10]


def test_the_census_counts_groups_ties_and_equal_completions(tmp_path):
    rows = [
        {"prompt": "q", "completions": ["a", "b", "b", "c"], "scores": [4, 3, 2, 2]},  # b ties with none, b2 with c
        {"prompt": "p", "completions": ["a", "b"], "scores": [1, 2]},
        {"prompt": "p", "completions": ["a" * 30 + "x", "a" * 30 + "y", "a" * 30 + "z"], "scores": [1, 2, 3]},
        {**RANKED, "scores": [1, 1, 1]},
    ]
    path = write_lines(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=r"a.jsonl:4: 'completions' has 3 completions, all with scores 1.0; none"):
        prepare(str(path), options=options(), tokenizer=tokenizer())
    short = options(on_bad_row="skip", max_length=12, max_prompt_length=4)
    data = prepare(str(path), options=short, tokenizer=tokenizer())
    census = data.census
    assert census["dropped"] == {"all completions equally good": 1, "equal after the cut": 1} and len(data) == 2
    kept = {name: census[name] for name in ("groups", "completions", "comparisons", "ties", "equal_completions")}
    assert kept == {"groups": 1, "completions": 6, "comparisons": 5, "ties": 1, "equal_completions": 1}
    expected = "1 of these with more than two completions; 6 completions in all, 5 comparisons (left out: 1 tied, 1 of"
    assert expected in format_census(census)
    assert data[0].comparisons.tolist() == [[0, 1], [0, 2], [0, 3], [1, 3]] and data[1].comparisons.tolist() == [[1, 0]]


def test_rows_of_one_prompt_are_gathered(tmp_path):
    """Six pairs of four completions, other rows between them, are one group; each comparison is there as often."""
    better = list(itertools.combinations("abcd", 2))
    pairs = [{"prompt": "p", "chosen": one, "rejected": other} for one, other in better]
    rows = [{"prompt": "q", "chosen": "x", "rejected": "y"}, *pairs, pairs[0], {**pairs[0], "prompt": "r"}]
    path = write_lines(tmp_path / "a.jsonl", rows)
    apart = prepare(str(path), options=options(), tokenizer=tokenizer())
    together = prepare(str(path), options=options(group="prompt"), tokenizer=tokenizer())
    assert len(apart) == 9 and together.comparisons.tolist() == [1, 7, 1] and apart.digest != together.digest
    tok, group = tokenizer(), together[1]
    texts = [tok.decode(ids[:-1]) for ids in group.completions]
    found = [(texts[i], texts[j]) for i, j in group.comparisons.tolist()]
    assert sorted(found) == sorted([*better, better[0]]) and found == sorted(found)
    assert together.location(1) == f"{path}:2" and together.sources == [(0, 3, 1.0)]
    assert "3 groups: 9 rows of one prompt gathered into 3" in format_census(together.census)
    with pytest.raises(ConfigError, match="data.group prompt: for rows that compare or label completions; sft"):
        prepare(str(path), options=options(group="prompt"), tokenizer=tokenizer(), sides=CHOSEN_ONLY)


def test_a_prompt_with_very_many_rows_becomes_several_groups(tmp_path):
    rows = [{"prompt": "p", "chosen": f"{n} good", "rejected": f"{n} bad"} for n in range(20)]
    path = write_lines(tmp_path / "a.jsonl", rows)
    data = prepare(str(path), options=options(group="prompt"), tokenizer=tokenizer())
    assert data.completions.tolist() == [16, 16, 8] and data.comparisons.tolist() == [8, 8, 4]


LABELLED = {"prompt": "q", "completion": "a", "label": True}


def test_labelled_completions(tmp_path):
    rows = [LABELLED, {**LABELLED, "completion": "b", "label": False}, {**LABELLED, "prompt": [user("q")]}]
    path = write_lines(tmp_path / "a.jsonl", rows)
    data = prepare(str(path), options=options(), tokenizer=tokenizer())
    assert [data[i].labels.tolist() for i in range(3)] == [[True], [False], [True]]
    assert data.comparisons.tolist() == [0, 0, 0] and data.completions.tolist() == [1, 1, 1]
    assert "2 of these desirable, 1 not" in format_census(data.census)
    together = prepare(str(path), options=options(group="prompt"), tokenizer=tokenizer())
    assert [together[i].labels.tolist() for i in range(2)] == [[True, False], [True]]
    with pytest.raises(DataError, match="a.jsonl:2: 'label' is false: an undesirable completion, which sft would"):
        prepare(str(path), options=options(), tokenizer=tokenizer(), sides=CHOSEN_ONLY)
    skipping = options(on_bad_row="skip")
    supervised = prepare(str(path), options=skipping, tokenizer=tokenizer(), sides=CHOSEN_ONLY)
    assert supervised.census["format"] == "completion" and len(supervised) == 2 and supervised[1].labels is None


@pytest.mark.parametrize("label", [1, "true", None, 0.0])
def test_a_label_is_true_or_false(label):
    row = Row({**LABELLED, "label": label}, {})
    with pytest.raises(BadRow, match="'label' is .*; it must"):
        read(row, "unpaired", PAIR)


def test_a_list_beside_a_pair_is_a_column_that_is_not_used():
    row = Row({"prompt": "q", "chosen": "a", "rejected": "b", "answers": ["x", "y"], "completions": ["z"]}, {})
    assert detect(row, PAIR) == "explicit"
    assert detect(Row({"instruction": "q", "output": "a", "answers": ["x"]}, {}), CHOSEN_ONLY) == "alpaca"
