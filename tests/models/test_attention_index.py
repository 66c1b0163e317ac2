"""The segment table's indices and masks, and the varlen backends against kernels emulated in plain torch."""

import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpo_ds.batch import Segment
from dpo_ds.models import attention
from dpo_ds.models.attention import ScoreRule, backend_for, segment_table

CPU = torch.device("cpu")
HEADS, KEY_HEADS, WIDTH = 4, 2, 8


def segments_of(*lengths: tuple[int, int, int]) -> tuple[Segment, ...]:
    segments, start = [], 0
    for pair in lengths:
        segments.append(Segment(start, *pair))
        start = segments[-1].end
    return tuple(segments)


def varlen_reference(query, key, value, cu_queries, cu_keys, scale, window_size, softcap=0.0) -> Tensor:
    """Bottom-right causal attention of [T, heads, D] tensors, block by block and query by query."""
    group = query.shape[1] // key.shape[1]
    outputs = []
    for (q0, q1), (k0, k1) in zip(cu_queries.unfold(0, 2, 1).tolist(), cu_keys.unfold(0, 2, 1).tolist(), strict=True):
        for row in range(q0, q1):
            last = (k1 - k0) - (q1 - q0) + (row - q0)  # the query's own position
            first = 0 if window_size[0] < 0 else max(0, last - window_size[0])
            k, v = (x[k0 + first : k0 + last + 1].repeat_interleave(group, 1) for x in (key, value))
            scores = scale * torch.einsum("hd,khd->hk", query[row], k)
            scores = softcap * torch.tanh(scores / softcap) if softcap else scores
            outputs.append(torch.einsum("hk,khd->hd", scores.softmax(-1), v))
    return torch.stack(outputs)


def emulate_varlen_attn(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa, num_splits
) -> Tensor:
    """torch.nn.attention.varlen.varlen_attn: causal when the window's right side is 0."""
    assert window_size[1] == 0 and num_splits == 1 and enable_gqa == (query.shape[1] != key.shape[1])
    assert (max_q, max_k) == (cu_seq_q.diff().max(), cu_seq_k.diff().max())
    return varlen_reference(query, key, value, cu_seq_q, cu_seq_k, scale, window_size)


def emulate_flash_attn(
    q, k, v, cu_q, cu_k, max_q, max_k, *, softmax_scale, causal, window_size, softcap, deterministic
) -> Tensor:
    """flash_attn.flash_attn_varlen_func; heads are grouped by their numbers."""
    assert causal and not deterministic and cu_q.dtype == cu_k.dtype == torch.int32
    assert (max_q, max_k) == (cu_q.diff().max(), cu_k.diff().max())
    return varlen_reference(q, k, v, cu_q, cu_k, softmax_scale, window_size, softcap)


def test_varlen_index_by_hand():
    index = segment_table(segments_of((2, 1, 2), (1, 2, 1))).varlen(CPU)
    #            p p c r r | p c c r          blocks: ppc, rr; pcc, r
    assert index.cu_queries.tolist() == [0, 3, 5, 8, 9]
    assert index.cu_keys.tolist() == [0, 3, 7, 10, 12]
    assert index.key_rows.tolist() == [0, 1, 2, 0, 1, 3, 4, 5, 6, 7, 5, 8]
    assert (index.max_queries, index.max_keys) == (3, 4)
    assert index.cu_queries.dtype == index.cu_keys.dtype == torch.int32


def test_blocks_without_queries_are_left_out():
    index = segment_table(segments_of((1, 0, 0), (3, 2, 0), (0, 0, 2))).varlen(CPU)
    assert index.cu_queries.tolist() == [0, 1, 6, 8]
    assert index.cu_keys.tolist() == [0, 1, 6, 8]


@given(st.lists(st.tuples(*[st.integers(0, 6)] * 3).filter(any), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_varlen_index_lists_what_each_token_may_see(lengths):
    """A token sees its pair's prompt up to itself and its own side up to itself: nothing else, and nothing twice."""
    segments = segments_of(*lengths)
    index = segment_table(segments).varlen(CPU)
    seen, row = {}, 0
    for queries, keys, end in zip(
        index.cu_queries.diff().tolist(), index.cu_keys.diff().tolist(), index.cu_keys[1:].tolist(), strict=True
    ):
        for i in range(queries):
            seen[row] = index.key_rows[end - keys : end - queries + i + 1].tolist()
            row += 1
    expected = {}
    for s in segments:
        prompt_end, chosen_end = s.start + s.prompt, s.start + s.prompt + s.chosen
        for token in range(s.start, s.end):
            side = chosen_end if token >= chosen_end else prompt_end
            expected[token] = [*range(s.start, min(prompt_end, token + 1)), *range(side, token + 1)]
    assert seen == expected
    assert (index.max_queries, index.max_keys) == (index.cu_queries.diff().max(), index.cu_keys.diff().max())


def test_mask_by_hand():
    table = segment_table(segments_of((2, 1, 2)))
    visible = table.mask(2, 4, 2, torch.zeros(1)) == 0  # rejected at positions 2 and 3, a window of 2
    assert visible.tolist() == [[False, True, True, False], [False, False, True, True]]
    assert table.mask(2, 4, 2, torch.zeros(1)) is table.mask(2, 4, 2, torch.zeros(1))


@pytest.mark.parametrize(
    ("backend", "rule"),
    [
        ("torch-varlen", ScoreRule(0.3)),
        ("torch-varlen", ScoreRule(0.3, window=3)),
        ("flash-attn", ScoreRule(0.3)),
        ("flash-attn", ScoreRule(0.3, window=3)),
        ("flash-attn", ScoreRule(0.3, window=1, softcap=0.7)),
    ],
)
def test_varlen_backends_agree_with_sdpa(backend, rule, monkeypatch):
    monkeypatch.setattr(attention.torch_varlen, "varlen_attn", emulate_varlen_attn)
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=emulate_flash_attn))
    table = segment_table(segments_of((5, 3, 4), (1, 1, 6), (0, 2, 3), (4, 1, 0)))
    torch.manual_seed(0)
    inputs = [torch.randn(1, heads, table.length, WIDTH, requires_grad=True) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    results = []
    for name in (backend, "sdpa"):
        output = attention.BACKENDS[name](*inputs, table, rule)
        assert output.shape == (1, table.length, HEADS, WIDTH)
        gradients = torch.autograd.grad((output * torch.arange(WIDTH)).sum(), inputs)
        results.append((output, *gradients))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_backend_is_one_line_to_tell(monkeypatch):
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    installed = []
    monkeypatch.setattr(attention, "find_spec", lambda name: name if name in installed else None)
    pick = backend_for.__wrapped__  # past the cache
    assert pick(CPU, torch.bfloat16, 64) == "sdpa"
    assert pick(cuda, torch.float32, 64) == "sdpa"
    assert pick(cuda, torch.bfloat16, 64) == "torch-varlen"
    assert pick(cuda, torch.bfloat16, 64, softcap=True) == "sdpa"
    assert pick(cuda, torch.bfloat16, 192, 128) == "sdpa"
    installed.append("flash_attn")
    assert pick(cuda, torch.bfloat16, 64, 64) == "flash-attn"
    assert pick(cuda, torch.bfloat16, 256, 256, softcap=True) == "flash-attn"
    assert pick(cuda, torch.bfloat16, 320) == "sdpa"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert pick(cuda, torch.float16, 64) == "sdpa"
