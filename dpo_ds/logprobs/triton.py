"""Fused CUDA kernels: no logits in memory forward, one 16-bit tile of their gradient backward.

Forward: a program takes a tile of rows and one split of the vocabulary, keeps (top, sum) and the statistics in
registers in float32 and writes one partial per row and split; a second kernel combines them in order. No atomics, and
no size depends on N: results repeat bit for bit, whatever rows lie beside. Backward: recomputed_logps' chunks, the
logits' gradient from a kernel, the products from cuBLAS.

Legend: N rows, D hidden width, V vocabulary, S splits, C columns of one vocabulary chunk, B rows of one block.
Runs on a CPU under TRITON_INTERPRET=1 (tests).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpo_ds.logprobs.chunked import TRITON_TILES, Tiles, accumulator_dtype, recomputed_logps

SPLIT_COLUMNS = 4096  # of the vocabulary, one program's share
GROUP_ROWS = 32  # row tiles that run side by side, so that their hidden states stay in the second-level cache


class Launch(NamedTuple):
    """Tile sizes [rows, columns, depth] and launch parameters of both matmul kernels."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


# By (compute capability's major, bytes of an element); tests/benchmarks/logprobs.py --tune tries others.
LAUNCHES = {
    (8, 2): Launch(128, 128, 64, 8, 3),
    (8, 4): Launch(64, 64, 32, 4, 3),
    (9, 2): Launch(128, 256, 64, 8, 3),
    (9, 4): Launch(64, 64, 32, 4, 3),
}
INTERPRETED = Launch(32, 32, 32, 1, 1)


def token_statistics(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    scale: float,
    softcap: float | None,
    with_statistics: bool,
) -> tuple[Tensor, ...]:
    """(logps,) or (logps, entropy, hits, log_sum_p2), each [N] float32. Raises ValueError off CUDA and for float64."""
    if not hidden_ND.is_cuda and not triton.knobs.runtime.interpret:
        raise ValueError(f"log-prob backend 'triton' needs CUDA tensors, got {hidden_ND.device}; use 'chunked'")
    if accumulator_dtype(hidden_ND, weight_VD) != torch.float32:
        raise ValueError("log-prob backend 'triton' accumulates in float32; use 'eager' or 'chunked' for float64")
    if hidden_ND.dtype != weight_VD.dtype:
        hidden_ND, weight_VD = hidden_ND.float(), weight_VD.float()
    kernel = TritonKernel(scale, softcap, _launch(hidden_ND))
    return recomputed_logps(kernel, hidden_ND.contiguous(), weight_VD.contiguous(), bias_V, targets_N, with_statistics)


def _launch(tensor: Tensor) -> Launch:
    if not tensor.is_cuda:
        return INTERPRETED
    major, _ = torch.cuda.get_device_capability(tensor.device)
    return LAUNCHES[9 if major == 9 else 8, tensor.element_size()]


@dataclass(frozen=True)
class TritonKernel:
    """See ChunkedKernel, whose interface this is."""

    scale: float
    softcap: float | None
    launch: Launch
    tiles: Tiles = TRITON_TILES

    def fold(self, hidden_ND, weight_VD, bias_V, targets_N, with_statistics, differentiable):
        (N, D), V = hidden_ND.shape, len(weight_VD)
        results = [hidden_ND.new_empty(N, dtype=torch.float32) for _ in range(5 if with_statistics else 2)]
        if N == 0:
            return results, []
        launch = self.launch
        splits = triton.cdiv(V, SPLIT_COLUMNS)
        partials = hidden_ND.new_empty((4 if with_statistics else 2, splits, N), dtype=torch.float32)
        target_N = hidden_ND.new_empty(N, dtype=torch.float32)
        grid = (triton.cdiv(N, launch.rows) * splits,)
        constants = self._constants(D, bias_V, hidden_ND.is_cuda)
        _fold_kernel[grid](
            hidden_ND, weight_VD, bias_V, targets_N, partials, target_N,
            N, V, D, splits, self.scale, self.softcap or 1.0,
            STATISTICS=with_statistics, SPLIT=SPLIT_COLUMNS, **constants,
        )  # fmt: skip
        pointers = results if with_statistics else [*results, None, None, None]
        _combine_kernel[(triton.cdiv(N, 128),)](
            partials, target_N, *pointers, N, splits, STATISTICS=with_statistics, ROWS=128
        )
        return results, []

    def logit_gradient(self, hidden_BD, weight_CD, bias_C, targets_B, lse_B, grad_B) -> Tensor:
        """[B, C] in the matmul's dtype."""
        (B, D), C = hidden_BD.shape, len(weight_CD)
        d_logits_BC = hidden_BD.new_empty((B, C))
        grid = (triton.cdiv(B, self.launch.rows) * triton.cdiv(C, self.launch.columns),)
        _logit_gradient_kernel[grid](
            hidden_BD, weight_CD, bias_C, targets_B, lse_B.contiguous(), grad_B.contiguous(), d_logits_BC,
            B, C, D, self.scale, self.softcap or 1.0,
            **self._constants(D, bias_C, hidden_BD.is_cuda),
        )  # fmt: skip
        return d_logits_BC

    def _constants(self, depth, bias, compiled):
        launch = self.launch
        return {
            "HAS_BIAS": bias is not None,
            "HAS_SOFTCAP": self.softcap is not None,
            "EVEN_DEPTH": depth % launch.depth == 0,
            "INTERPRETED": not compiled,
            "GROUP": GROUP_ROWS,
            "ROWS": launch.rows,
            "COLUMNS": launch.columns,
            "DEPTH": launch.depth,
            "num_warps": launch.num_warps,
            "num_stages": launch.num_stages,
        }


@triton.jit
def _tanh(x):  # libdevice's does not run in the interpreter
    e = tl.exp(-2.0 * tl.abs(x))
    return tl.where(x < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)


@triton.jit
def _tile_order(tiles_of_rows, tiles_of_columns, GROUP: tl.constexpr):
    """Which (row, column) tile this program takes: GROUP row tiles of one column tile, then the next column tile."""
    program = tl.program_id(0)
    group = program // (GROUP * tiles_of_columns)
    first = group * GROUP
    height = tl.minimum(tiles_of_rows - first, GROUP)
    inside = program - group * GROUP * tiles_of_columns
    return first + inside % height, inside // height


@triton.jit
def _logits(
    hidden, weight, bias, rows, columns, V, D, scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, EVEN_DEPTH: tl.constexpr, INTERPRETED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """[ROWS, COLUMNS] float32 from the accumulator. rows and columns lie in range: the caller clamps and masks."""
    depth = tl.arange(0, DEPTH)
    hidden += rows.to(tl.int64)[:, None] * D + depth[None, :]
    weight += columns.to(tl.int64)[None, :] * D + depth[:, None]
    y = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, D, DEPTH):
        if EVEN_DEPTH:
            a, b = tl.load(hidden), tl.load(weight)
        else:
            a = tl.load(hidden, mask=depth[None, :] < D - start, other=0.0)
            b = tl.load(weight, mask=depth[:, None] < D - start, other=0.0)
        if INTERPRETED:  # triton 3.9's interpreter multiplies bfloat16 wrongly without saying so
            a, b = a.to(tl.float32), b.to(tl.float32)
        y = tl.dot(a, b, y, input_precision="ieee")
        hidden += DEPTH
        weight += DEPTH
    if HAS_BIAS:
        y += tl.load(bias + columns).to(tl.float32)[None, :]
    y *= scale
    if HAS_SOFTCAP:
        y = softcap * _tanh(y / softcap)
    return y


@triton.jit
def _fold_kernel(
    hidden, weight, bias, targets, partials, target_logits, N, V, D, splits, scale, softcap,
    STATISTICS: tl.constexpr, SPLIT: tl.constexpr, GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, EVEN_DEPTH: tl.constexpr, INTERPRETED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """partials [2 or 4, S, N]: top, then the split's sums of e = exp(y - top), e (y - top) and e^2."""
    tile, split = _tile_order(tl.cdiv(N, ROWS), splits, GROUP)
    rows = tile * ROWS + tl.arange(0, ROWS)
    within = rows < N
    clamped = tl.minimum(rows, N - 1)
    target = tl.load(targets + clamped)
    top = tl.full((ROWS,), -3.0e38, dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    moment = tl.zeros((ROWS,), dtype=tl.float32)
    square = tl.zeros((ROWS,), dtype=tl.float32)
    for start in range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, V), COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        y = _logits(
            hidden, weight, bias, clamped, tl.minimum(columns, V - 1), V, D, scale, softcap,
            HAS_BIAS, HAS_SOFTCAP, EVEN_DEPTH, INTERPRETED, ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
        hit = columns[None, :] == target[:, None]
        found = (target >= start) & (target < start + COLUMNS) & within
        tl.store(target_logits + rows, tl.sum(tl.where(hit, y, 0.0), 1), mask=found)
        y = tl.where((columns < V)[None, :], y, -3.0e38)
        new_top = tl.maximum(top, tl.max(y, 1))
        moved = top - new_top
        shrink = tl.exp(moved)
        gap = y - new_top[:, None]
        e = tl.exp(gap)
        if STATISTICS:
            moment = shrink * (moment + moved * total) + tl.sum(e * gap, 1)
            square = shrink * shrink * square + tl.sum(e * e, 1)
        total = shrink * total + tl.sum(e, 1)
        top = new_top
    at = partials + split.to(tl.int64) * N + rows
    plane = tl.cast(splits, tl.int64) * N  # splits of 1 comes as a constant
    tl.store(at, top, mask=within)
    tl.store(at + plane, total, mask=within)
    if STATISTICS:
        tl.store(at + 2 * plane, moment, mask=within)
        tl.store(at + 3 * plane, square, mask=within)


@triton.jit
def _combine_kernel(
    partials, target_logits, logps, lse, entropies, hits, log_sum_p2s, N, splits,
    STATISTICS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    within = rows < N
    plane = tl.cast(splits, tl.int64) * N  # splits of 1 comes as a constant
    top = tl.full((ROWS,), -3.0e38, dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    moment = tl.zeros((ROWS,), dtype=tl.float32)
    square = tl.zeros((ROWS,), dtype=tl.float32)
    at = partials + rows
    for _ in range(splits):
        part_top = tl.load(at, mask=within, other=0.0)
        part_total = tl.load(at + plane, mask=within, other=1.0)
        new_top = tl.maximum(top, part_top)
        moved, part_moved = top - new_top, part_top - new_top
        shrink, part_shrink = tl.exp(moved), tl.exp(part_moved)
        if STATISTICS:
            part_moment = tl.load(at + 2 * plane, mask=within, other=0.0)
            part_square = tl.load(at + 3 * plane, mask=within, other=1.0)
            moment = shrink * (moment + moved * total) + part_shrink * (part_moment + part_moved * part_total)
            square = shrink * shrink * square + part_shrink * part_shrink * part_square
        total = shrink * total + part_shrink * part_total
        top = new_top
        at += N
    target = tl.load(target_logits + rows, mask=within, other=0.0)
    log_total = tl.log(total)
    tl.store(logps + rows, target - top - log_total, mask=within)
    tl.store(lse + rows, top + log_total, mask=within)
    if STATISTICS:
        tl.store(entropies + rows, log_total - moment / total, mask=within)
        tl.store(hits + rows, tl.where(target == top, 1.0, 0.0), mask=within)
        tl.store(log_sum_p2s + rows, tl.log(square) - 2.0 * log_total, mask=within)


@triton.jit
def _logit_gradient_kernel(
    hidden, weight, bias, targets, lse, grad, d_logits, N, V, D, scale, softcap, GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, EVEN_DEPTH: tl.constexpr, INTERPRETED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """ChunkedKernel.logit_gradient on one tile; N and V are the block's rows and the chunk's columns here."""
    tile, column_tile = _tile_order(tl.cdiv(N, ROWS), tl.cdiv(V, COLUMNS), GROUP)
    rows = tile * ROWS + tl.arange(0, ROWS)
    columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    clamped = tl.minimum(rows, N - 1)
    y = _logits(
        hidden, weight, bias, clamped, tl.minimum(columns, V - 1), V, D, scale, softcap,
        HAS_BIAS, HAS_SOFTCAP, EVEN_DEPTH, INTERPRETED, ROWS, COLUMNS, DEPTH,
    )  # fmt: skip
    hit = columns[None, :] == tl.load(targets + clamped)[:, None]
    dy = tl.where(hit, 1.0, 0.0) - tl.exp(y - tl.load(lse + clamped)[:, None])
    dy *= (tl.load(grad + clamped) * scale)[:, None]
    if HAS_SOFTCAP:
        slope = y / softcap
        dy *= 1.0 - slope * slope
    at = d_logits + rows.to(tl.int64)[:, None] * V + columns[None, :]
    tl.store(at, dy.to(d_logits.dtype.element_ty), mask=(rows < N)[:, None] & (columns < V)[None, :])
