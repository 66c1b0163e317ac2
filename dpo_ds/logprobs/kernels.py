"""The Triton kernels behind logprobs/triton.py, which says when each runs; here is one tile's arithmetic.

A tile of logits is a matmul of ROWS rows of hidden states and COLUMNS rows of the weight, DEPTH at a time. With
DESCRIPTORS the two are tensor descriptors (Hopper's and Blackwell's bulk copies: one thread asks for a whole tile, what
lies outside the tensor comes as zeros), else pointers.

Sizes that change from one micro-batch to the next are not specialised: a kernel is compiled once, not again for a
number of rows that 16 divides.

Legend: N rows, D hidden width, V vocabulary, S splits of it, T tiles of columns.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tanh(x):  # libdevice's does not run in the interpreter
    return 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x))


@triton.jit
def _tile_order(tiles_of_rows, splits, GROUP: tl.constexpr):
    """Which (row tile, split) this program takes: GROUP row tiles of one split, then the next split."""
    program = tl.program_id(0)
    group = program // (GROUP * splits)
    first = group * GROUP
    height = tl.minimum(tiles_of_rows - first, GROUP)
    inside = program - group * GROUP * splits
    return first + inside % height, inside // height


@triton.jit
def _logits(
    hidden, weight, bias, first_row, first_column, N, V, D, scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    EVEN_DEPTH: tl.constexpr, EVEN_COLUMNS: tl.constexpr, DESCRIPTORS: tl.constexpr,
    INTERPRETED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """[ROWS, COLUMNS] float32 from the accumulator; rows and columns outside hold anything finite."""
    columns = first_column + tl.arange(0, COLUMNS)
    if not EVEN_COLUMNS:
        columns = tl.minimum(columns, V - 1)
    y = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    if DESCRIPTORS:
        for start in range(0, D, DEPTH):
            a = hidden.load([first_row, start])
            b = weight.load([first_column, start]).T
            if INTERPRETED:
                a, b = a.to(tl.float32), b.to(tl.float32)
            y = tl.dot(a, b, y)
    else:
        rows = tl.minimum(first_row + tl.arange(0, ROWS), N - 1)
        depth = tl.arange(0, DEPTH)
        hidden += rows.to(tl.int64)[:, None] * D + depth[None, :]
        weight += columns.to(tl.int64)[None, :] * D + depth[:, None]
        for start in range(0, D, DEPTH):
            if EVEN_DEPTH:
                a, b = tl.load(hidden), tl.load(weight)
            else:
                a = tl.load(hidden, mask=depth[None, :] < D - start, other=0.0)
                b = tl.load(weight, mask=depth[:, None] < D - start, other=0.0)
            if INTERPRETED:  # triton's interpreter multiplies bfloat16 wrongly without saying so
                a, b = a.to(tl.float32), b.to(tl.float32)
            y = tl.dot(a, b, y, input_precision="ieee")
            hidden += DEPTH
            weight += DEPTH
    if HAS_BIAS:
        y += tl.load(bias + columns).to(tl.float32)[None, :]
    if HAS_SCALE:
        y *= scale
    if HAS_SOFTCAP:
        y = softcap * _tanh(y / softcap)
    return y


@triton.jit(do_not_specialize=["N", "V", "splits", "kept_columns"])
def fold_kernel(
    hidden, weight, bias, targets, partials, target_logits, kept, kept_tops,
    N, V, D, splits, kept_columns, kept_stride, scale, softcap,
    STATISTICS: tl.constexpr, KEEP: tl.constexpr, SPLIT: tl.constexpr, GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    EVEN_DEPTH: tl.constexpr, EVEN_COLUMNS: tl.constexpr, DESCRIPTORS: tl.constexpr,
    INTERPRETED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """partials [2 or 4, S, N]: top, then the split's sums of e = exp(y - top), e (y - top) and e^2.

    KEEP: kept [N, kept_columns] is each e with the top that its tile saw, kept_tops [T, N] are those.
    """
    tile, split = _tile_order(tl.cdiv(N, ROWS), splits, GROUP)
    rows = tile * ROWS + tl.arange(0, ROWS)
    within = rows < N
    target = tl.load(targets + tl.minimum(rows, N - 1)).to(tl.int32)
    top = tl.full((ROWS,), -3.0e38, dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    moment = tl.zeros((ROWS,), dtype=tl.float32)
    square = tl.zeros((ROWS,), dtype=tl.float32)
    for start in tl.range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, V), COLUMNS, flatten=DESCRIPTORS):
        y = _logits(
            hidden, weight, bias, tile * ROWS, start, N, V, D, scale, softcap,
            HAS_BIAS, HAS_SCALE, HAS_SOFTCAP, EVEN_DEPTH, EVEN_COLUMNS, DESCRIPTORS, INTERPRETED, ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
        columns = start + tl.arange(0, COLUMNS)
        hit = columns[None, :] == target[:, None]
        found = (target >= start) & (target < start + COLUMNS) & within
        tl.store(target_logits + rows, tl.sum(tl.where(hit, y, 0.0), 1), mask=found)
        if not EVEN_COLUMNS:
            y = tl.where((columns < V)[None, :], y, -3.0e38)
        new_top = tl.maximum(top, tl.max(y, 1))
        moved = top - new_top
        shrink = tl.exp(moved)
        gap = y - new_top[:, None]
        e = tl.exp(gap)
        sum_e = tl.sum(e, 1)  # first: with STATISTICS registers would spill otherwise
        if STATISTICS:
            moment = shrink * (moment + moved * total) + tl.sum(e * gap, 1)
            square = shrink * shrink * square + tl.sum(e * e, 1)
        total = shrink * total + sum_e
        top = new_top
        if KEEP:  # without a branch, which a flattened loop cannot hold: a descriptor drops what lies outside
            tops = kept_tops + N.to(tl.int64) * (start // COLUMNS) + rows
            tl.store(tops, top, mask=within & (start < kept_columns))
            if DESCRIPTORS:
                kept.store([tile * ROWS, start], e.to(tl.bfloat16))
            else:
                at = kept + rows.to(tl.int64)[:, None] * kept_stride + columns[None, :]
                tl.store(at, e.to(tl.bfloat16), mask=within[:, None] & (start < kept_columns))
    at = partials + split.to(tl.int64) * N + rows
    plane = splits.to(tl.int64) * N
    tl.store(at, top, mask=within)
    tl.store(at + plane, total, mask=within)
    if STATISTICS:
        tl.store(at + 2 * plane, moment, mask=within)
        tl.store(at + 3 * plane, square, mask=within)


@triton.jit(do_not_specialize=["N", "splits"])
def combine_kernel(
    partials, target_logits, logps, lse, entropies, hits, log_sum_p2s, N, splits,
    STATISTICS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    within = rows < N
    plane = splits.to(tl.int64) * N
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


@triton.jit(do_not_specialize=["N", "V", "splits"])
def logit_gradient_kernel(
    hidden, weight, bias, targets, lse, grad, d_logits, N, V, D, splits, stride, scale, softcap,
    SPLIT: tl.constexpr, GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    EVEN_DEPTH: tl.constexpr, EVEN_COLUMNS: tl.constexpr, DESCRIPTORS: tl.constexpr,
    INTERPRETED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """ChunkedKernel.logit_gradient; N and V are the block's rows and the chunk's columns here."""
    tile, split = _tile_order(tl.cdiv(N, ROWS), splits, GROUP)
    rows = tile * ROWS + tl.arange(0, ROWS)
    clamped = tl.minimum(rows, N - 1)
    target, row_lse = tl.load(targets + clamped).to(tl.int32), tl.load(lse + clamped)
    row_grad = tl.load(grad + clamped) * scale
    for start in tl.range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, V), COLUMNS, flatten=DESCRIPTORS):
        y = _logits(
            hidden, weight, bias, tile * ROWS, start, N, V, D, scale, softcap,
            HAS_BIAS, HAS_SCALE, HAS_SOFTCAP, EVEN_DEPTH, EVEN_COLUMNS, DESCRIPTORS, INTERPRETED, ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
        columns = start + tl.arange(0, COLUMNS)
        dy = tl.where(columns[None, :] == target[:, None], 1.0, 0.0) - tl.exp(y - row_lse[:, None])
        dy *= row_grad[:, None]
        if HAS_SOFTCAP:
            slope = y / softcap
            dy *= 1.0 - slope * slope
        if DESCRIPTORS:
            d_logits.store([tile * ROWS, start], dy.to(hidden.dtype))
        else:
            at = d_logits + rows.to(tl.int64)[:, None] * stride + columns[None, :]
            tl.store(at, dy.to(d_logits.dtype.element_ty), mask=(rows < N)[:, None])


@triton.jit(do_not_specialize=["N", "tops_stride"])
def kept_gradient_kernel(
    kept, kept_tops, target_logits, targets, lse, grad, N, stride, tops_stride, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The same from what the fold kept, in its place: kept [N, stride] becomes d_logits.

    The target's own probability comes from its float32 logit: of 1 - p the bfloat16 e would leave little.
    """
    column_tile = tl.program_id(0)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    clamped = tl.minimum(rows, N - 1)
    row_lse = tl.load(lse + clamped)
    row_grad = tl.load(grad + clamped) * scale
    at_top = tl.exp(tl.load(kept_tops + column_tile.to(tl.int64) * tops_stride + clamped) - row_lse)
    at_target = 1.0 - tl.exp(tl.load(target_logits + clamped) - row_lse)
    at = kept + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    mask = (rows < N)[:, None]
    e = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    hit = columns[None, :] == tl.load(targets + clamped).to(tl.int32)[:, None]
    dy = tl.where(hit, at_target[:, None], -e * at_top[:, None]) * row_grad[:, None]
    tl.store(at, dy.to(tl.bfloat16), mask=mask)
