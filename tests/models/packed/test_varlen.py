"""Packed attention by varlen calls, keys copied or merged by log-sums, against the definition in float64."""

import sys
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpo_ds.models.packed import kernels, segments
from dpo_ds.models.packed.sdpa import ScoreRule, sdpa, sdpa_backward
from dpo_ds.models.packed.segments import SegmentTable
from dpo_ds.models.packed.varlen import varlen_attention
from tests.models.packed.emulated import (
    BACKWARD,
    CPU_KERNEL,
    FORWARDS,
    HEADS,
    KEY_HEADS,
    WIDTH,
    fake_aten,
    fake_cute,
    fake_flash2,
    segments_of,
)

UNEVEN = (  # prompt, completions
    (5, 3, 4), (1, 1, 6), (0, 2, 3), (4, 1, 0), (9, 0, 2), (3, 2, 1), (2, 3), (6, 1, 2, 3, 1), (3, 2, 2, 1),
)  # fmt: skip


@pytest.fixture(autouse=True)
def _cpu_kernel(monkeypatch):
    monkeypatch.setitem(kernels.KERNELS, "cpu", CPU_KERNEL)


def by_definition(query, key, value, table: SegmentTable, rule: ScoreRule) -> Tensor:
    """[1, H, T, D] -> [1, T, H, D]: of its pair, a token sees the prompt and its own side, not after itself."""
    pair, side, position = [], [], []
    for i, s in enumerate(table.segments):
        pair += [i] * (s.end - s.start)
        side += [0] * s.prompt + [i for i, n in enumerate(s.completions, 1) for _ in range(n)]
        position += [*range(s.prompt), *(s.prompt + i for n in s.completions for i in range(n))]
    pair, side, position = (torch.tensor(x) for x in (pair, side, position))
    distance = position[:, None] - position
    seen = (pair[:, None] == pair) & ((side == 0) | (side[:, None] == side)) & (distance >= 0)
    seen &= distance < (rule.window or table.length)
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = query @ key.mT * rule.scale
    if rule.softcap:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    return (scores.masked_fill(~seen, float("-inf")).softmax(-1) @ value).transpose(1, 2).contiguous()


def random_inputs(table: SegmentTable, heads=HEADS, key_heads=KEY_HEADS, dtype=torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, n, table.length, WIDTH) for n in (heads, key_heads, key_heads)]
    return [torch.randn(shape, generator=generator, dtype=dtype, requires_grad=True) for shape in shapes]


def with_gradients(attention, inputs: list[Tensor]) -> list[Tensor]:
    output = attention(*inputs)
    assert output.is_contiguous()
    weights = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view_as(output)
    return [output, *torch.autograd.grad((output * weights).sum(), inputs)]


def assert_equal(actual: list[Tensor], expected: list[Tensor], gradients: float = 1e-11) -> None:
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-12, atol=1e-13)
    for x, y in zip(actual[1:], expected[1:], strict=True):
        assert (x - y).norm() <= gradients * y.norm()


@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("merge", [True, False])
def test_values_and_gradients_are_those_of_the_definition(merge, key_heads):
    table, rule = SegmentTable(segments_of(*UNEVEN)), ScoreRule(0.3)
    inputs = random_inputs(table, key_heads=key_heads)
    actual = with_gradients(lambda *x: varlen_attention("cpu", *x, table, rule, merge), inputs)
    assert_equal(actual, with_gradients(lambda *x: by_definition(*x, table, rule), inputs))


@pytest.mark.parametrize("lengths", [((7, 3, 2),), ((4, 5, 0), (6, 1, 0)), ((0, 3, 2),), ((1, 0, 0),)])
def test_one_pair_no_rejected_no_prompt(lengths):
    table, rule = SegmentTable(segments_of(*lengths)), ScoreRule(0.3)
    inputs = random_inputs(table)
    actual = with_gradients(lambda *x: varlen_attention("cpu", *x, table, rule, True), inputs)
    assert_equal(actual, with_gradients(lambda *x: by_definition(*x, table, rule), inputs))


@given(
    lengths=st.lists(st.tuples(*[st.integers(0, 6)] * 3).filter(any), min_size=1, max_size=5),
    threshold=st.integers(0, 6),
)
@settings(max_examples=40, deadline=None)
def test_some_pairs_merged_and_some_copied(lengths, threshold):
    table, rule = SegmentTable(segments_of(*lengths)), ScoreRule(0.3)
    inputs = random_inputs(table)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(kernels.KERNELS, "cpu", CPU_KERNEL)
        patch.setattr(segments, "is_merged", lambda segment: segment.prompt >= threshold)
        actual = with_gradients(lambda *x: varlen_attention("cpu", *x, table, rule), inputs)
    assert_equal(actual, with_gradients(lambda *x: by_definition(*x, table, rule), inputs))


def test_a_pairs_result_does_not_depend_on_the_pack(monkeypatch):
    """Bit by bit, where one pair is merged and its neighbour is copied."""
    monkeypatch.setattr(segments, "is_merged", lambda segment: segment.prompt >= 5)
    pack, alone = SegmentTable(segments_of((5, 3, 4), (2, 2, 3))), SegmentTable(segments_of((5, 3, 4)))
    inputs = random_inputs(pack)
    together = varlen_attention("cpu", *inputs, pack, ScoreRule(0.3))
    first = varlen_attention("cpu", *(x[:, :, :12] for x in inputs), alone, ScoreRule(0.3))
    assert torch.equal(together[:, :12], first)


def test_a_window_copies(monkeypatch):
    monkeypatch.setattr(segments, "is_merged", lambda segment: True)
    table, rule = SegmentTable(segments_of(*UNEVEN)), ScoreRule(0.3, window=3)
    inputs = random_inputs(table)
    actual = with_gradients(lambda *x: varlen_attention("cpu", *x, table, rule), inputs)
    assert_equal(actual, with_gradients(lambda *x: by_definition(*x, table, rule), inputs))


@pytest.mark.parametrize("rule", [ScoreRule(0.3), ScoreRule(0.3, window=3), ScoreRule(0.3, window=1, softcap=0.7)])
def test_sdpa_and_its_backward_written_out(rule):
    table = SegmentTable(segments_of(*UNEVEN))
    inputs = random_inputs(table)
    expected = with_gradients(lambda *x: by_definition(*x, table, rule), inputs)
    # A soft-cap's softmax is in float32, as the models have it.
    tolerance = 1e-6 if rule.softcap else 1e-11
    output, *gradients = with_gradients(lambda *x: sdpa(*x, table, rule), inputs)
    assert (output - expected[0]).abs().max() < tolerance
    assert all((x - y).norm() <= tolerance * y.norm() for x, y in zip(gradients, expected[1:], strict=True))
    weights = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view_as(output)[0]
    flat = (x.detach()[0].transpose(0, 1) for x in inputs)
    written = [x.transpose(0, 1)[None] for x in sdpa_backward(weights, *flat, table, rule)]
    assert_equal([expected[0], *written], expected)


@pytest.mark.parametrize("rule", [ScoreRule(0.3), ScoreRule(0.3, window=3)], ids=["whole", "window"])
@pytest.mark.parametrize("kernel", [*FORWARDS, "flash-attn-4", "flash-attn"])
def test_every_kernel_is_called_as_its_signature_says(kernel, rule, monkeypatch):
    """torch 2.11's operator knows no num_splits, 2.14's must be told to split nothing."""
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", fake_cute())
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", fake_flash2())
    if kernel in FORWARDS:
        monkeypatch.setattr(kernels, "aten", fake_aten(kernel))
    kernels.import_package.cache_clear()
    table = SegmentTable(segments_of(*UNEVEN))
    inputs = random_inputs(table)
    expected = with_gradients(lambda *x: by_definition(*x, table, rule), inputs)
    name = "torch-varlen" if kernel in FORWARDS else kernel
    for merge in (False,) if rule.window else (False, True):
        attention = partial(varlen_attention, name, table=table, rule=rule, merge=merge)
        assert_equal(with_gradients(attention, inputs), expected)
    kernels.import_package.cache_clear()


def test_this_torch_declares_its_operators_as_the_fakes_do():
    """The names and the order of what is given by place; a release that changes them is seen here, without a GPU."""
    for name, schema in (("_flash_attention_forward", FORWARDS["2.11"]), ("_flash_attention_backward", BACKWARD)):
        declared = getattr(torch.ops.aten, name).default._schema.arguments
        faked = torch._C.parse_schema(schema).arguments
        assert [a.name for a in declared if not a.kwarg_only] == [a.name for a in faked if not a.kwarg_only]
        given = {"scale", "window_size_left", "window_size_right"}
        assert given <= {a.name for a in declared if a.kwarg_only}
