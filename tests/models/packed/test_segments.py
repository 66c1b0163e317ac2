"""The segment table's blocks, rows and masks, by hand and by what each token may see."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_ds.batch import Segment
from dpo_ds.models.packed import segments
from dpo_ds.models.packed.segments import SegmentTable, is_merged, segment_table, table_of
from tests.models.packed.emulated import segments_of

CPU = torch.device("cpu")


def test_copied_keys_by_hand():
    index = SegmentTable(segments_of((2, 1, 2), (1, 2, 1))).index(CPU, merge=False)
    #            p p c r r | p c c r          blocks: ppc, rr; pcc, r
    assert index.own.cu_queries.tolist() == [0, 3, 5, 8, 9]
    assert index.own.cu_keys.tolist() == [0, 3, 7, 10, 12]
    assert index.copies.rows.tolist() == [0, 1, 2, 0, 1, 3, 4, 5, 6, 7, 5, 8]
    assert index.copies.first.tolist() == [0, 1, 2, 5, 6, 7, 8, 9, 11]
    assert [[part.tolist() for part in parts] for parts in index.copies.again] == [[[3, 4, 10], [0, 1, 5]]]
    assert (index.own.max_queries, index.own.max_keys) == (3, 4)
    assert index.own.cu_queries.dtype == index.own.cu_keys.dtype == torch.int32
    assert index.shared is None


def test_a_prompt_that_is_copied_twice_by_hand():
    """No row twice in one addition, whose order would not be known."""
    index = SegmentTable(segments_of((1, 1, 1, 2))).index(CPU, merge=False)
    #            p y1 y2 y3 y3          blocks: p y1, y2, y3 y3
    assert index.own.cu_queries.tolist() == [0, 2, 3, 5]
    assert index.copies.rows.tolist() == [0, 1, 0, 2, 0, 3, 4]
    assert [[part.tolist() for part in parts] for parts in index.copies.again] == [[[2], [0]], [[4], [0]]]
    merged = SegmentTable(segments_of((1, 1, 1, 2))).index(CPU, merge=True)
    assert merged.own.cu_keys.tolist() == [0, 2, 3, 5]
    assert merged.shared.blocks.cu_queries.tolist() == [0, 3] and merged.shared.key_rows == slice(0, 1)


def test_merged_blocks_by_hand():
    index = SegmentTable(segments_of((2, 1, 2), (1, 2, 1))).index(CPU, merge=True)
    assert index.own.cu_queries.tolist() == index.own.cu_keys.tolist() == [0, 3, 5, 8, 9]
    assert index.copies is None, "no key is moved"
    assert index.shared.blocks.cu_queries.tolist() == [0, 2, 3]
    assert index.shared.blocks.cu_keys.tolist() == [0, 2, 3]
    assert index.shared.query_rows.tolist() == [3, 4, 8]
    assert index.shared.key_rows.tolist() == [0, 1, 5]


def test_the_rows_of_one_merged_pair_are_slices():
    index = SegmentTable(segments_of((0, 4, 1), (3, 1, 2))).index(CPU, merge=True)
    assert index.shared.query_rows == slice(9, 11) and index.shared.key_rows == slice(5, 8)


def test_blocks_without_queries_are_left_out():
    index = SegmentTable(segments_of((1, 0, 0), (3, 2, 0), (0, 0, 2))).index(CPU)
    assert index.own.cu_queries.tolist() == index.own.cu_keys.tolist() == [0, 1, 6, 8]
    assert index.copies is None and index.shared is None, "nothing is seen twice"


@given(
    lengths=st.lists(st.lists(st.integers(0, 6), min_size=2, max_size=6).filter(any), min_size=1, max_size=6),
    threshold=st.integers(0, 6),
)
@settings(max_examples=60, deadline=None)
def test_the_blocks_show_each_token_what_it_may_see(lengths, threshold):
    """A token sees its group's prompt up to itself and its own completion up to itself, nothing else, nothing twice."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments, "is_merged", lambda segment: segment.prompt >= threshold)
        table = SegmentTable(segments_of(*lengths))
        own, copies, shared = table.index(CPU)
    keys = copies.rows if copies else torch.arange(table.length)
    seen = _seen(own, torch.arange(table.length), keys, causal=True)
    if shared:
        rows = [torch.arange(table.length)[r] for r in (shared.query_rows, shared.key_rows)]
        for token, more in _seen(shared.blocks, *rows, causal=False).items():
            seen[token] = more + seen[token]
    expected = {}
    for s in table.segments:
        prompt_end = s.start + s.prompt
        starts = [end - length for end, length in zip(s.ends, s.completions, strict=True)]
        for token in range(s.start, s.end):
            own = max((start for start in starts if start <= token), default=prompt_end)
            expected[token] = [*range(s.start, min(prompt_end, token + 1)), *range(own, token + 1)]
    assert seen == expected
    if copies:
        assert torch.equal(copies.rows[copies.first], torch.arange(table.length))
        again = [key for keys_of_one, _ in copies.again for key in keys_of_one.tolist()]
        assert sorted([*copies.first.tolist(), *again]) == [*range(len(keys))]
        assert all(len(set(rows.tolist())) == len(rows) for _, rows in copies.again)


def _seen(blocks, query_rows, key_rows, causal: bool) -> dict[int, list[int]]:
    sizes = blocks.cu_queries.diff().tolist(), blocks.cu_keys.diff().tolist()
    assert (blocks.max_queries, blocks.max_keys) == (max(sizes[0]), max(sizes[1]))
    seen, query = {}, 0
    for queries, keys, end in zip(*sizes, blocks.cu_keys[1:].tolist(), strict=True):
        for i in range(queries):
            last = end - queries + i + 1 if causal else end
            seen[query_rows[query].item()] = key_rows[end - keys : last].tolist()
            query += 1
    return seen


SPLITS = [((2048, 1, 256), True), ((2047, 1, 128), False), ((2048, 1, 257), False), ((2048, 1, 250, 262), True)]


@pytest.mark.parametrize(("lengths", "merged"), SPLITS)
def test_what_is_merged_by_length(lengths, merged):
    """From 2048 prompt tokens on, if they are eight times the other completions': the group's own lengths alone."""
    assert is_merged(*segments_of(lengths)) is merged


def test_a_handle_leads_back_to_its_table():
    table = segment_table(segments_of((2, 1, 2), (1, 2, 1)))
    assert table.handle.tolist() == [0, 2, 2, 1, 2, 5, 1, 2, 2, 1]
    assert table_of(table.handle.clone()) is table
    for start in (1, 2, 3):  # others come in between: the content leads to an equal one
        segment_table((Segment(0, start, (1, 1)),))
    assert table_of(table.handle) is not table and table_of(table.handle).segments == table.segments


def test_mask_by_hand():
    table = SegmentTable(segments_of((2, 1, 2)))
    visible = table.mask(2, 4, 2, torch.zeros(1)) == 0  # rejected at positions 2 and 3, a window of 2
    assert visible.tolist() == [[False, True, True, False], [False, False, True, True]]
    assert table.mask(2, 4, 2, torch.zeros(1)) is table.mask(2, 4, 2, torch.zeros(1))
