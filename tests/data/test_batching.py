"""Global batches from seed, epoch and data alone; their spread over ranks and micro-batches."""

import contextlib
import itertools
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_ds.batch import Group
from dpo_ds.data.batching import Layout, Lengths, epoch_order, global_batches, plan, steps_per_epoch
from dpo_ds.data.formats import hh
from dpo_ds.data.rows import BadRow, Row
from dpo_ds.data.sources import open_source
from tests.tiny import random_pairs

SHARED = Path(__file__).parents[3] / "shared" / "data"
HH = Path(os.environ.get("DPO_DS_DATA", SHARED)) / "hh_harmless_train.jsonl.gz"
lengths_of_a_pair = st.tuples(st.integers(1, 300), st.integers(1, 120), st.integers(1, 120))


def as_lengths(triples) -> Lengths:
    triples = np.array(triples, dtype=np.int64).reshape(-1, 3)
    return Lengths(triples[:, 0], triples[:, 1:])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(lengths_of_a_pair, min_size=1, max_size=40),
    st.integers(1, 5),
    st.integers(64, 2000),
    st.sampled_from(["padded", "packed"]),
)
def test_every_pair_once_and_within_the_budget(triples, ranks, budget, name):
    lengths = as_lengths(triples)
    shares = plan(lengths, Layout(name, budget, hidden_size=64), ranks)
    assert len(shares) == ranks
    assert len({len(share) for share in shares}) == 1, "every rank runs the same number of micro-batches"
    assert sorted(itertools.chain(*itertools.chain(*shares))) == list(range(len(triples)))
    for members in itertools.chain(*shares):
        if len(members) > 1:
            if name == "packed":
                held = sum(sum(triples[m]) for m in members)
            else:
                held = 2 * len(members) * max(p + max(c, r) for p, c, r in (triples[m] for m in members))
            assert held <= budget


def test_a_padded_micro_batch_holds_neighbours_in_length():
    # rows of 10 and of 100 tokens, two pairs each: together 2 * 4 * 100 = 800 > 500, so the long ones and the short
    # ones
    lengths = as_lengths([(5, 5, 5), (50, 50, 50), (5, 5, 5), (50, 50, 50)])
    assert plan(lengths, Layout("padded", 500, 64), ranks=1) == [[[1, 3], [0, 2]]]


def test_a_pair_beyond_the_budget_costs_one_round_only():
    lengths = as_lengths([(10, 5, 5), (20000, 50, 50), (10, 5, 5), (10, 5, 5)])
    shares = plan(lengths, Layout("packed", 2048, 64), ranks=1)
    assert sorted(map(sorted, shares[0])) == [[0, 2, 3], [1]]


def test_squares_of_long_pairs_do_not_overflow():
    class Data:
        prompt_lengths, completion_lengths = np.full(3, 30_000, np.int32), np.full((3, 2), 30_000, np.int32)

    # 90,000 tokens; attended (60000 * 60001 + 2 * 30000 * 30000 + 30000 * 30001) / 2 over 6 * 1000
    assert Lengths.of(Data, np.array([1])).cost(1000).tolist() == [90_000 + 3_150_045_000 / 6000]


def test_ranks_without_work_get_empty_micro_batches():
    shares = plan(as_lengths([(5, 5, 5)]), Layout("packed", 500, 64), ranks=3)
    assert sorted(shares) == [[[]], [[]], [[0]]]


def test_cost_counts_attended_pairs():
    # prompt 2, chosen 1, rejected 3: 6 tokens; causal (2+1)(2+1+1)/2 = 6, rejected sees 3*2 + 3*4/2 = 12; 18 / (6*3)
    # = 1
    assert as_lengths([(2, 1, 3)]).cost(hidden_size=3).tolist() == [7.0]


def imbalance(lengths: Lengths) -> float:
    """Cost of the slowest of four ranks over their mean."""
    shares = plan(lengths, Layout("packed", 8192, 256), ranks=4)
    loads = [lengths.cost(256)[list(itertools.chain(*share))].sum() for share in shares]
    return max(loads) / np.mean(loads)


def test_ranks_are_balanced_on_lengths_like_real_ones():
    generator = np.random.default_rng(0)
    batches = [[generator.lognormal(mean, 0.7, 64).astype(int) + 1 for mean in (4.6, 3.4, 3.6)] for _ in range(20)]
    assert max(imbalance(as_lengths(np.transpose(draw))) for draw in batches) < 1.05


@pytest.mark.skipif(not HH.is_file(), reason=f"no {HH} (set DPO_DS_DATA)")
def test_ranks_are_balanced_on_hh_harmless():
    triples = []
    for _, row in open_source(str(HH)).rows():
        with contextlib.suppress(BadRow):  # four have no answer
            conversation = hh(Row(row, {}), pair=True)
            texts = (conversation.prompt, conversation.chosen, conversation.rejected)
            triples.append([len(re.findall(r"\w+|[^\w\s]", text)) for text in texts])  # near enough to tokens
    triples = np.array(triples)
    batches = itertools.islice(global_batches([(0, len(triples), 1.0)], 0, 64, 1), len(triples) // 64)
    assert max(imbalance(as_lengths(triples[rows])) for _, rows in batches) < 1.05


def test_an_epoch_is_a_permutation_that_seed_and_epoch_decide():
    sources = [(0, 50, 1.0)]
    assert sorted(epoch_order(sources, 0, 0)) == list(range(50))
    assert epoch_order(sources, 0, 0).tolist() == epoch_order(sources, 0, 0).tolist()
    assert epoch_order(sources, 0, 0).tolist() != epoch_order(sources, 0, 1).tolist()
    assert epoch_order(sources, 0, 0).tolist() != epoch_order(sources, 1, 0).tolist()


def test_weights_are_passes_over_a_source():
    order = epoch_order([(0, 10, 2.0), (10, 30, 0.25)], 0, 0)
    counts = np.bincount(order, minlength=30)
    assert counts[:10].tolist() == [2] * 10
    assert counts[10:].sum() == 5 and counts[10:].max() == 1
    assert set(order.tolist()) != set(epoch_order([(0, 10, 2.0), (10, 30, 0.25)], 0, 1).tolist())


def test_the_last_smaller_batch_is_kept_and_resuming_gives_the_same_batches():
    sources = [(0, 10, 1.0)]
    assert steps_per_epoch(sources, 4) == 3
    whole = [(step, rows.tolist()) for step, rows in itertools.islice(global_batches(sources, 7, 4, 1), 7)]
    assert [len(rows) for _, rows in whole] == [4, 4, 2, 4, 4, 2, 4]
    assert [step for step, _ in whole] == [1, 2, 3, 4, 5, 6, 7]
    resumed = [(step, rows.tolist()) for step, rows in itertools.islice(global_batches(sources, 7, 4, 3), 5)]
    assert resumed == whole[2:]


@pytest.mark.parametrize("name", ["padded", "packed"])
@pytest.mark.parametrize("sides", [2, 1])
def test_targets_are_the_trained_tokens_in_order(name, sides):
    pairs = [replace(p, completions=p.completions[:sides], masks=p.masks[:sides]) for p in random_pairs(5)]
    batch = Layout(name, 0, 0).collate(pairs)
    expected = [p.completions[i][p.target_positions(i)] for p in pairs for i in range(sides)]
    assert batch.targets.tolist() == np.concatenate(expected).tolist()
    assert batch.target_counts.tolist() == [len(tokens) for tokens in expected]
    assert batch.num_tokens == sum(len(p.prompt) + sum(map(len, p.completions)) for p in pairs)
    flat_ids, flat_positions = batch.input_ids.flatten(), batch.position_ids.flatten()
    first_of_chosen = batch.target_rows[0]
    assert flat_positions[first_of_chosen] == len(pairs[0].prompt) - 1
    assert flat_ids[first_of_chosen] == pairs[0].prompt[-1]


def test_nothing_predicts_the_first_token_without_a_prompt():
    pair = random_pairs(1)[0]
    bare = Group(pair.prompt[:0], (pair.rejected,), (pair.masks[1],))
    batch = Layout("padded", 0, 0).collate([bare])
    assert batch.targets.tolist() == pair.rejected[1:].tolist()
    assert batch.target_rows.tolist() == list(range(len(pair.rejected) - 1))
