"""Token log-probs by chunks of the vocabulary on any device: online log-sum-exp forward, logits made again in backward
unless they are few.

`recomputed_logps` and its backward are shared with triton.py: a kernel says how rows are folded and how a tile of the
logits' gradient is made, everything else (which rows, which chunks, accumulation, rounding) is decided here, once.

Legend: N rows, D hidden width, V vocabulary, C columns of one vocabulary chunk, B rows of one block.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def token_statistics(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    scale: float,
    softcap: float | None,
    with_statistics: bool,
) -> tuple[Tensor, ...]:
    """(logps,) or (logps, entropy, hits, log_sum_p2), each [N]."""
    kernel = ChunkedKernel(scale, softcap, TILES["cuda" if hidden_ND.is_cuda else "cpu"])
    return recomputed_logps(kernel, hidden_ND, weight_VD, bias_V, targets_N, with_statistics)


class Tiles(NamedTuple):
    """Sizes of what is computed at once. None depends on N, so that a row's log-prob does not either."""

    fold_rows: int  # rows of a forward block; the last block is filled up, so that every matmul has the same shape
    gradient_rows: int  # rows of a backward block
    logits_bytes: int  # budget of one backward tile of logits; with gradient_rows it gives the columns of a chunk
    kept_bytes: int  # up to here exp(logits) is kept for backward, which is then spared a matmul and an exp

    def columns(self, logit_bytes: int) -> int:
        return max(self.logits_bytes // (self.gradient_rows * logit_bytes) // 64 * 64, 64)

    def kernel_columns(self, rows: int, logit_bytes: int) -> int:
        """Returns the columns of a Triton kernel's chunk: what the budget gives for these rows. Only the order in which
        the gradient of hidden states is summed depends on it."""
        return self._padded(self.logits_bytes, rows, logit_bytes) or PADDING

    def kept_columns(self, rows: int, vocabulary: int) -> int:
        """Returns for how many columns, from the first on, a Triton kernel keeps exponentials in 16 bits; the backward
        pass computes the rest again. They are one chunk, in one block of rows."""
        fit = self._padded(self.kept_bytes, rows, 2) if 0 < rows <= self.gradient_rows else 0
        return min(fit, vocabulary)

    def _padded(self, budget: int, rows: int, size: int) -> int:
        return budget // (max(min(rows, self.gradient_rows), 1) * size) // PADDING * PADDING


PADDING = 256  # columns of logits in memory come in multiples of it; every Triton kernel's tile divides it
# cpu: a tile stays in the second-level cache. cuda: tiles large enough for cuBLAS. triton: nothing but the two budgets.
TILES = {
    "cpu": Tiles(128, 512, 4 << 20, 256 << 20),
    "cuda": Tiles(4096, 4096, 512 << 20, 0),
    "triton": Tiles(0, 65536, 1 << 30, 1 << 30),
}


def recomputed_logps(kernel, hidden_ND, weight_VD, bias_V, targets_N, with_statistics) -> tuple[Tensor, ...]:
    """What `kernel` folds, with its gradient."""
    differentiable = torch.is_grad_enabled()  # an autograd function's forward cannot tell
    return RecomputedLogps.apply(hidden_ND, weight_VD, bias_V, targets_N, kernel, with_statistics, differentiable)


class RecomputedLogps(torch.autograd.Function):
    """Saves its inputs and one log-sum-exp per row. The weight is saved as the very Parameter: ZeRO-3 gathers it again
    before backward by putting new data under it."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, targets_N, kernel, with_statistics, differentiable):
        differentiable = differentiable and any(ctx.needs_input_grad)
        results, kept = kernel.fold(hidden_ND, weight_VD, bias_V, targets_N, with_statistics, differentiable)
        logps_N, lse_N, *statistics = results
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, targets_N, lse_N, *chain.from_iterable(kept))
        ctx.kernel, ctx.kept_is_spent = kernel, False
        ctx.mark_non_differentiable(*statistics)
        return logps_N, *statistics

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_N, *_):
        kernel, saved = ctx.kernel, ctx.saved_tensors
        width = kernel.kept_a_chunk
        kept = [saved[i : i + width] for i in range(5, len(saved), width)]
        if ctx.kept_is_spent:  # a second backward pass through a retained graph
            kept = []
        ctx.kept_is_spent = kernel.spends_kept
        with torch.autocast(grad_N.device.type, enabled=False), _whole_sums():
            gradients = _gradients(kernel, ctx.needs_input_grad[:3], grad_N, *saved[:5], kept)
        return *gradients, None, None, None, None


def _gradients(kernel, needed, grad_N, hidden_ND, weight_VD, bias_V, targets_N, lse_N, kept):
    """Gradients of hidden, weight and bias, None where not needed, each rounded once to its tensor's dtype."""
    needs_hidden, needs_weight, needs_bias = needed
    rows = None if kept else grad_N.nonzero().squeeze(1)  # a row without gradient adds nothing
    everything = rows is None or len(rows) == len(grad_N)
    hidden, targets, grad, lse = (x if everything else x[rows] for x in (hidden_ND, targets_N, grad_N, lse_N))
    dtype, gemm = accumulator_dtype(hidden, weight_VD), matmul_dtype(hidden, weight_VD)
    # One matmul of 16-bit factors over all rows has float32 sums and a single rounding by itself.
    whole = gemm != dtype and 0 < len(hidden) <= kernel.tiles.gradient_rows
    d_hidden = hidden.new_zeros(hidden.shape, dtype=dtype) if needs_hidden else None
    d_weight = (torch.empty_like if whole else torch.zeros_like)(weight_VD) if needs_weight else None
    d_bias = torch.zeros_like(bias_V) if needs_bias else None
    d_logits_BC = None
    for index, chunk in enumerate(slices(len(weight_VD), kernel.columns(len(hidden), gemm.itemsize, kept))):
        weight_CD = weight_VD[chunk].to(gemm)
        bias_C = None if bias_V is None else bias_V[chunk].to(dtype)
        if needs_weight and not whole:  # in the accumulator's dtype the gradient itself is the accumulator
            d_weight_CD = d_weight[chunk].to(dtype)
        d_bias_C = weight_CD.new_zeros(len(weight_CD), dtype=dtype)
        for block in slices(len(hidden), kernel.tiles.gradient_rows):
            hidden_BD = hidden[block].to(gemm)
            rest = targets[block] - chunk.start, lse[block], grad[block]
            if index < len(kept):
                d_logits_BC = kernel.kept_logit_gradient(*(x[block] for x in kept[index]), *rest)
            else:
                d_logits_BC = kernel.logit_gradient(hidden_BD, weight_CD, bias_C, *rest, d_logits_BC)
            if needs_hidden:
                _accumulate(d_hidden[block], d_logits_BC, weight_CD)
            if needs_weight and whole:
                torch.mm(d_logits_BC.t(), hidden_BD, out=d_weight[chunk])
            elif needs_weight:
                _accumulate(d_weight_CD, d_logits_BC.t(), hidden_BD)
            if needs_bias:
                d_bias_C += d_logits_BC.sum(0, dtype=dtype)
        if needs_weight and not whole and d_weight.dtype != dtype:
            d_weight[chunk] = d_weight_CD
        if needs_bias:
            d_bias[chunk] = d_bias_C
    if needs_hidden:
        d_hidden = d_hidden.to(hidden_ND.dtype)
        if not everything:
            d_hidden = torch.zeros_like(hidden_ND).index_copy_(0, rows, d_hidden)
    return d_hidden, d_weight, d_bias


@dataclass(frozen=True)
class ChunkedKernel:
    """Plain torch operators on tiles of float32 logits (float64 for float64 inputs)."""

    scale: float
    softcap: float | None
    tiles: Tiles
    kept_a_chunk: ClassVar[int] = 2  # tensors
    spends_kept: ClassVar[bool] = False

    def columns(self, rows: int, logit_bytes: int, kept) -> int:
        """Returns the columns of a chunk in backward."""
        return self.tiles.columns(logit_bytes)

    def fold(self, hidden_ND, weight_VD, bias_V, targets_N, with_statistics, differentiable):
        """([logps, log-sum-exp, then entropy, hits and log sum p^2 if asked for], each [N]; what backward may use).

        The latter is empty, or holds for every chunk (exp(y - top) [N, C], top [N]).
        """
        dtype, gemm = accumulator_dtype(hidden_ND, weight_VD), matmul_dtype(hidden_ND, weight_VD)
        rows = self.tiles.fold_rows
        blocks = list(slices(len(hidden_ND), rows))
        if not blocks:
            return [hidden_ND.new_empty(0, dtype=dtype) for _ in range(5 if with_statistics else 2)], []
        # The gradient of a soft-cap needs the logits themselves.
        keep = differentiable and self.softcap is None
        keep = keep and len(hidden_ND) * len(weight_VD) * dtype.itemsize <= self.tiles.kept_bytes
        kept = []
        states = [_Fold(rows, dtype, hidden_ND.device) for _ in blocks]
        for chunk in slices(len(weight_VD), self.tiles.columns(gemm.itemsize)):
            weight_CD = weight_VD[chunk].to(gemm)
            bias_C = None if bias_V is None else bias_V[chunk].to(dtype)
            logits = [None] * len(blocks)
            if gemm == dtype:
                distinct = len(blocks) if keep else 1
                logits = weight_CD.new_empty((distinct, rows, len(weight_CD))).expand(len(blocks), -1, -1)
            for state, block, out in zip(states, blocks, logits, strict=True):
                missing = rows - (block.stop - block.start)
                hidden_BD = F.pad(hidden_ND[block].to(gemm), (0, 0, 0, missing))
                targets_B = F.pad(targets_N[block] - chunk.start, (0, missing), value=-1)
                logits_BC = self._logits(hidden_BD, weight_CD, bias_C, out)
                state.add(logits_BC, targets_B, with_statistics)
            if keep:
                kept.append((logits.flatten(0, 1), torch.cat([state.top for state in states])))
        results = zip(*(state.results(with_statistics) for state in states), strict=True)
        return [torch.cat(result)[: len(hidden_ND)] for result in results], kept

    def logit_gradient(self, hidden_BD, weight_CD, bias_C, targets_B, lse_B, grad_B, spent_BC=None) -> Tensor:
        """Gradient of the matmul's result: grad (1[target] - exp(y - lse)) scale (1 - (y / softcap)^2), y the logit.

        targets_B count from the chunk's first column and may lie outside it. spent_BC: the tile before, which a kernel
        may write over. Returns [B, C] in the matmul's dtype.
        """
        logits_BC = self._logits(hidden_BD, weight_CD, bias_C)
        slope_BC = None if self.softcap is None else 1 - (logits_BC / self.softcap) ** 2
        d_logits_BC = logits_BC.sub_(lse_B[:, None]).exp_().mul_(-grad_B[:, None])
        inside_B, targets_B = _inside(targets_B, len(weight_CD))
        d_logits_BC.scatter_add_(1, targets_B[:, None], torch.where(inside_B, grad_B, 0)[:, None])
        if slope_BC is not None:
            d_logits_BC *= slope_BC
        if self.scale != 1.0:
            d_logits_BC *= self.scale
        return d_logits_BC.to(weight_CD.dtype)

    def kept_logit_gradient(self, exp_BC, top_B, targets_B, lse_B, grad_B) -> Tensor:
        """`logit_gradient` from the exp(y - top) of the forward pass."""
        d_logits_BC = exp_BC * (-self.scale * grad_B * (top_B - lse_B).exp())[:, None]
        inside_B, targets_B = _inside(targets_B, exp_BC.shape[1])
        return d_logits_BC.scatter_add_(1, targets_B[:, None], torch.where(inside_B, self.scale * grad_B, 0)[:, None])

    def _logits(self, hidden_BD, weight_CD, bias_C, out=None) -> Tensor:
        y = _float32_mm(hidden_BD, weight_CD.t(), out)
        if bias_C is not None:
            y += bias_C
        if self.scale != 1.0:
            y *= self.scale
        if self.softcap is not None:
            y.div_(self.softcap).tanh_().mul_(self.softcap)
        return y


class _Fold:
    """What the chunks seen so far say of a block of rows; all sums are relative to exp(top). Operators see whole blocks
    only: their last bit may depend on a tensor's shape."""

    def __init__(self, rows, dtype, device):
        self.top = torch.full((rows,), torch.finfo(dtype).min, dtype=dtype, device=device)
        self.target = torch.zeros_like(self.top)
        self.total, self.moment, self.square = (torch.zeros_like(self.top) for _ in range(3))

    def add(self, logits_BC, targets_B, with_statistics):
        """Overwrites logits_BC by exp(logits - top)."""
        inside_B, targets_B = _inside(targets_B, logits_BC.shape[1])
        self.target = torch.where(inside_B, logits_BC.gather(1, targets_B[:, None]).squeeze(1), self.target)
        top = torch.maximum(self.top, logits_BC.amax(1))
        moved = self.top - top
        shrink = moved.exp()
        logits_BC -= top[:, None]
        gap_BC = logits_BC.clone() if with_statistics else None
        exp_BC = logits_BC.exp_()
        if with_statistics:
            self.moment = shrink * (self.moment + moved * self.total) + gap_BC.mul_(exp_BC).sum(1)
            self.square = shrink.square() * self.square + torch.mul(exp_BC, exp_BC, out=gap_BC).sum(1)
        self.total = shrink * self.total + exp_BC.sum(1)
        self.top = top

    def results(self, with_statistics):
        log_total = self.total.log()
        logps, lse = self.target - self.top - log_total, self.top + log_total
        if not with_statistics:
            return logps, lse
        entropy = log_total - self.moment / self.total
        return logps, lse, entropy, (self.target == self.top).to(lse.dtype), self.square.log() - 2 * log_total


def slices(size: int, length: int) -> Iterator[slice]:
    return (slice(start, min(start + length, size)) for start in range(0, size, length))


def accumulator_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """float32, or float64 where an input is."""
    return torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)


def matmul_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """What matmuls read: CUDA accumulates two 16-bit factors in float32, a CPU is given float32."""
    native = hidden.is_cuda and hidden.dtype == weight.dtype
    return hidden.dtype if native else accumulator_dtype(hidden, weight)


def _inside(targets_B, columns):
    """Which targets lie in the chunk, and all of them moved into it."""
    return (targets_B >= 0) & (targets_B < columns), targets_B.clamp(0, columns - 1)


def _float32_mm(a, b, out=None):
    if a.dtype in (torch.float32, torch.float64):
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=torch.float32)


def _accumulate(total, a, b):
    """total += a b without rounding in between."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:  # right from torch 2.10 on: pytorch/pytorch#167931
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


@contextmanager
def _whole_sums():
    """Makes cuBLAS add the parts of a split matmul in float32; torch's default lets it round them to 16 bits."""
    flags = torch.backends.cuda.matmul
    names = [f"allow_{kind}_reduced_precision_reduction" for kind in ("fp16", "bf16")]
    names = [name for name in names if getattr(flags, name)]
    for name in names:
        setattr(flags, name, False)
    try:
        yield
    finally:
        for name in names:
            setattr(flags, name, True)
