"""Fused CUDA kernels: no logits in memory forward, one 16-bit tile of their gradient backward.

Forward: a program takes a tile of rows and one split of the vocabulary, keeps (top, sum) and the statistics in
registers in float32 and writes one partial per row and split; a second kernel combines them in order. No atomics, and
no size depends on N: results repeat bit for bit, whatever rows lie beside. Where a backward pass will follow, as many
exponentials as TILES allows are written down in bfloat16: their gradient is one pass over memory. Backward:
recomputed_logps' chunks, the rest of the logits' gradient from a kernel, the products from cuBLAS.

Legend: N rows, D hidden width, V vocabulary, S splits, T tiles of columns, C columns of one vocabulary chunk, B rows of
one block. Runs on a CPU under TRITON_INTERPRET=1 (tests).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dpo_ds.logprobs.chunked import PADDING, TILES, Tiles, accumulator_dtype, recomputed_logps
from dpo_ds.logprobs.kernels import combine_kernel, fold_kernel, kept_gradient_kernel, logit_gradient_kernel


@dataclass(frozen=True)
class Launch:
    """How a matmul kernel is launched: the sizes of its tile first."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int
    split: int = 4096  # columns of the vocabulary that one program goes through
    group: int = 32  # row tiles that run side by side, so that their hidden states stay in the second-level cache
    descriptors: bool = False  # tiles come by tensor descriptors, where the tensors are aligned for them

    def __post_init__(self):
        assert self.split % self.columns == 0, (
            f"a split of {self.split} columns is no multiple of the tile's {self.columns}: some would be counted twice"
        )
        assert PADDING % self.columns == 0, f"{self.columns} columns of a tile do not divide the padding of {PADDING}"


@dataclass(frozen=True)
class Launches:
    """Of the pass that turns what was kept into the gradient there are rows and warps; its columns are the fold's."""

    fold: Launch
    gradient: Launch
    kept_rows: int = 32
    kept_warps: int = 4


# By (compute capability's major, bytes of an element); tests/benchmarks/logprobs.py --gpu-check tries others. What is
# not named goes as Ampere does. Hopper's are the best of a dozen on an H200 (RESULTS.md), Blackwell's are not measured.
_AMPERE = Launch(128, 128, 64, 8, 3)
_HOPPER = Launches(
    Launch(128, 256, 64, 8, 3, split=1024, group=16, descriptors=True),
    Launch(128, 256, 64, 8, 3, split=2048, group=16, descriptors=True),
    kept_rows=8,
)
_FULL_PRECISION = Launch(64, 64, 32, 4, 3)
LAUNCHES = {
    (8, 2): Launches(_AMPERE, _AMPERE),
    (8, 4): Launches(_FULL_PRECISION, _FULL_PRECISION),
    (9, 2): _HOPPER,
    (10, 2): _HOPPER,
}
INTERPRETED = Launches(*[Launch(32, 64, 64, 1, 1, descriptors=True)] * 2)


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
    kernel = TritonKernel(scale, softcap, _launches(hidden_ND))
    return recomputed_logps(kernel, hidden_ND.contiguous(), weight_VD.contiguous(), bias_V, targets_N, with_statistics)


def _launches(tensor: Tensor) -> Launches:
    if not tensor.is_cuda:
        return INTERPRETED
    major, _ = torch.cuda.get_device_capability(tensor.device)
    size = tensor.element_size()
    return LAUNCHES.get((major, size), LAUNCHES[8, size])


@dataclass(frozen=True)
class TritonKernel:
    """See ChunkedKernel, whose interface this is."""

    scale: float
    softcap: float | None
    launches: Launches
    tiles: Tiles = field(default_factory=lambda: TILES["triton"])
    kept_a_chunk: ClassVar[int] = 3  # tensors
    spends_kept: ClassVar[bool] = True  # backward turns them into the gradient where they lie

    def columns(self, rows: int, logit_bytes: int, kept) -> int:
        return kept[0][0].shape[1] if kept else self.tiles.kernel_columns(rows, logit_bytes)

    def fold(self, hidden_ND, weight_VD, bias_V, targets_N, with_statistics, differentiable):
        """([logps, log-sum-exp, then entropy, hits and log sum p^2 if asked for], each [N]; what backward may use).

        The latter is empty or one chunk: (e [N, C] bfloat16, each exp(y - top) with the top that its tile knew; those
        tops [N, T]; the targets' logits [N]). Nothing is kept with a soft-cap, whose gradient needs the logits
        themselves, nor of other types than bfloat16: 8 bits of a float16 gradient would be a loss.
        """
        (N, D), V, launch = hidden_ND.shape, len(weight_VD), self.launches.fold
        results = [hidden_ND.new_empty(N, dtype=torch.float32) for _ in range(5 if with_statistics else 2)]
        if N == 0:
            return results, []
        keeps = differentiable and self.softcap is None and hidden_ND.dtype == torch.bfloat16
        C = self.tiles.kept_columns(N, V) if keeps else 0
        exp_NC = _padded_tile(hidden_ND, N, C, torch.bfloat16) if C else None
        top_TN = hidden_ND.new_empty((triton.cdiv(C, launch.columns), N), dtype=torch.float32) if C else None
        splits = triton.cdiv(V, launch.split)
        partials = hidden_ND.new_empty((4 if with_statistics else 2, splits, N), dtype=torch.float32)
        target_N = hidden_ND.new_empty(N, dtype=torch.float32)
        operands, settings = self._operands(launch, hidden_ND, weight_VD, bias_V, exp_NC)
        hidden, weight, bias, exp = operands
        fold_kernel[(triton.cdiv(N, launch.rows) * splits,)](
            hidden, weight, bias, targets_N, partials, target_N, exp, top_TN,
            N, V, D, splits, C, exp_NC.stride(0) if C else 0, self.scale, self.softcap or 1.0,
            STATISTICS=with_statistics, KEEP=C > 0, **settings,
        )  # fmt: skip
        pointers = results if with_statistics else [*results, None, None, None]
        combine_kernel[(triton.cdiv(N, 128),)](
            partials, target_N, *pointers, N, splits, STATISTICS=with_statistics, ROWS=128
        )
        return results, [(exp_NC, top_TN.t(), target_N)] if C else []

    def logit_gradient(self, hidden_BD, weight_CD, bias_C, targets_B, lse_B, grad_B, spent_BC=None) -> Tensor:
        """[B, C] in the matmul's dtype, in spent_BC's memory where that is large enough."""
        (B, D), C, launch = hidden_BD.shape, len(weight_CD), self.launches.gradient
        fits = spent_BC is not None and spent_BC.dtype == hidden_BD.dtype
        if fits and len(spent_BC) >= B and spent_BC.shape[1] >= C:
            d_logits_BC = spent_BC[:B, :C]
        else:
            d_logits_BC = _padded_tile(hidden_BD, B, C, hidden_BD.dtype)
        splits = triton.cdiv(C, launch.split)
        operands, settings = self._operands(launch, hidden_BD, weight_CD, bias_C, d_logits_BC)
        hidden, weight, bias, d_logits = operands
        logit_gradient_kernel[(triton.cdiv(B, launch.rows) * splits,)](
            hidden, weight, bias, targets_B, lse_B.contiguous(), grad_B.contiguous(), d_logits,
            B, C, D, splits, d_logits_BC.stride(0), self.scale, self.softcap or 1.0,
            **settings,
        )  # fmt: skip
        return d_logits_BC

    def kept_logit_gradient(self, exp_BC, top_BT, target_logit_B, targets_B, lse_B, grad_B) -> Tensor:
        """`logit_gradient` from the exponentials of the forward pass, in their place."""
        B, C = exp_BC.shape
        rows, columns = self.launches.kept_rows, self.launches.fold.columns
        kept_gradient_kernel[(triton.cdiv(C, columns), triton.cdiv(B, rows))](
            exp_BC, top_BT, target_logit_B, targets_B, lse_B.contiguous(), grad_B.contiguous(),
            B, exp_BC.stride(0), top_BT.stride(1), self.scale,
            ROWS=rows, COLUMNS=columns, num_warps=self.launches.kept_warps,
        )  # fmt: skip
        return exp_BC if exp_BC.is_cuda else exp_BC.float()  # a CPU's matmuls are given float32

    def _operands(self, launch, hidden, weight, bias, tile):
        """([hidden, weight, bias, tile of logits to be written] as the kernel takes them, its constants)."""
        # A bulk copy starts at multiples of 16 bytes; what ZeRO-3 gathers into one flat buffer may lie anywhere.
        aligned = all(x.data_ptr() % 16 == 0 and x.stride(0) * x.itemsize % 16 == 0 for x in (hidden, weight))
        fixed = constants(
            launch, weight.shape, launch.descriptors and aligned, hidden.is_cuda,
            HAS_BIAS=bias is not None, HAS_SCALE=self.scale != 1.0, HAS_SOFTCAP=self.softcap is not None,
        )  # fmt: skip
        if fixed["DESCRIPTORS"]:
            hidden = TensorDescriptor.from_tensor(hidden, [launch.rows, launch.depth])
            weight = TensorDescriptor.from_tensor(weight, [launch.columns, launch.depth])
            if tile is not None:
                tile = TensorDescriptor.from_tensor(tile, [launch.rows, launch.columns])
        return (hidden, weight, bias, tile), fixed | options(launch)


def options(launch: Launch) -> dict:
    """Returns what the compiler is told besides. Where it may fuse a product and a sum into one rounding, it does so as
    the code around is: a token's log-prob would differ in its last bit with statistics, or where exponentials are kept.
    """
    return {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": False}


def constants(launch: Launch, shape, descriptors: bool, compiled: bool = True, **features: bool) -> dict:
    """Returns the constants of a matmul kernel for a weight (or chunk of it) of shape [V, D]; features that are not
    named are off."""
    V, D = shape
    return {
        "HAS_BIAS": False,
        "HAS_SCALE": False,
        "HAS_SOFTCAP": False,
        "EVEN_DEPTH": D % launch.depth == 0,
        "EVEN_COLUMNS": V % launch.columns == 0,
        "DESCRIPTORS": descriptors,
        "INTERPRETED": not compiled,
        "SPLIT": launch.split,
        "GROUP": launch.group,
        "ROWS": launch.rows,
        "COLUMNS": launch.columns,
        "DEPTH": launch.depth,
    } | features


def _padded_tile(like: Tensor, rows: int, columns: int, dtype) -> Tensor:
    """Returns [rows, columns] with rows that begin at multiples of PADDING elements: kernels write whole tiles."""
    return like.new_empty((rows, triton.cdiv(columns, PADDING) * PADDING), dtype=dtype)[:, :columns]
