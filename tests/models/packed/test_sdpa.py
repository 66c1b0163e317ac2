"""Attention by torch's own functions: groups too long for a mask, in parts, against the whole mask."""

import pytest
import torch

from dpo_ds.batch import Segment
from dpo_ds.models.packed import sdpa as module
from dpo_ds.models.packed.sdpa import ScoreRule, sdpa
from dpo_ds.models.packed.segments import SegmentTable

SEGMENTS = (Segment(0, 50, (40, 30, 1)), Segment(121, 100, (10, 80)), Segment(311, 3, (90, 2)))


def attend(rule: ScoreRule, dtype: torch.dtype) -> list[torch.Tensor]:
    """Output and gradients."""
    generator = torch.Generator().manual_seed(0)
    length = SEGMENTS[-1].end
    shapes = [(1, heads, length, 16) for heads in (4, 2, 2)]
    inputs = [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]
    output = sdpa(*inputs, SegmentTable(SEGMENTS), rule)
    assert output.is_contiguous()
    grad = torch.randn(output.shape, generator=generator, dtype=dtype)
    return [output, *torch.autograd.grad(output, inputs, grad)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("window", [None, 7, 60, 129])
def test_in_parts_as_with_one_mask(monkeypatch, window, dtype):
    rule = ScoreRule(0.25, window)
    expected = attend(rule, dtype)
    masks = []
    monkeypatch.setattr(module, "MASK_ELEMENTS", 64)
    monkeypatch.setattr(module, "BLOCK", 16)
    own = SegmentTable.mask
    monkeypatch.setattr(SegmentTable, "mask", lambda table, *sizes: masks.append(sizes[:2]) or own(table, *sizes))
    found = attend(rule, dtype)
    assert all(queries <= max(16, 64 // keys) for queries, keys in masks), masks
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)
