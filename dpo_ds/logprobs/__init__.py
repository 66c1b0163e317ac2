"""Log-probabilities of given tokens from hidden states and the head's weight, without a [N, V] matrix in memory.

Legend: N rows that predict a token, D hidden width, V vocabulary.
"""

from __future__ import annotations

import difflib
import importlib
from typing import NamedTuple

import torch
from torch import Tensor

BACKENDS = ("eager", "chunked", "triton")


class TokenStatistics(NamedTuple):
    """Holds what one pass over the vocabulary knows of each token, all [N] and float32; only `logps` carries a
    gradient.

    entropy: of the distribution, in nats. hits: 1 where no token has a higher logit than the target. log_sum_p2: log of
    the sum of squared probabilities (the expected probability of a draw; WPO, arXiv 2406.11827).
    """

    logps: Tensor
    entropy: Tensor
    hits: Tensor
    log_sum_p2: Tensor


def token_logps(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """log softmax(y)[target] with y = softcap tanh(z / softcap) where given, z = scale (hidden weight^T + bias).

    targets_N: int64 in [0, V). Returns logps_N, float32 whatever the inputs' type (float64 for float64 inputs),
    differentiable in hidden, weight and bias with any gradient per token. backend: eager (oracle), chunked (any
    device), triton (CUDA); auto picks triton on CUDA and chunked elsewhere. With the latter two a row's value does not
    depend on the rows beside it, to the last bit. Raises ValueError for shapes, targets or a backend that do not fit.
    """
    return _apply(hidden_ND, weight_VD, targets_N, bias, scale, softcap, backend, False)[0]


def token_statistics(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    backend: str = "auto",
) -> TokenStatistics:
    """`token_logps`, bit for bit, with entropy, hits and log sum p^2 out of the same matmul."""
    return TokenStatistics(*_apply(hidden_ND, weight_VD, targets_N, bias, scale, softcap, backend, True))


def _apply(hidden, weight, targets, bias, scale, softcap, backend, with_statistics):
    _check(hidden, weight, targets, bias, softcap)
    if backend == "auto":
        backend = "triton" if hidden.is_cuda else "chunked"
    if backend not in BACKENDS:
        nearest = difflib.get_close_matches(str(backend), (*BACKENDS, "auto"), n=1, cutoff=0.0)[0]
        known = ", ".join(("auto", *BACKENDS))
        raise ValueError(f"log-prob backend {backend!r} is unknown; did you mean {nearest!r}? Known: {known}")
    module = importlib.import_module(f"{__name__}.{backend}")  # triton is imported only where it is used
    with torch.autocast(hidden.device.type, enabled=False):  # autocast would round the logits
        return module.token_statistics(hidden, weight, bias, targets, float(scale), softcap, with_statistics)


def _check(hidden, weight, targets, bias, softcap):
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        shapes = f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        raise ValueError(f"hidden must be [N, D] and weight [V, D]; got {shapes}")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64 [{len(hidden)}]; got {targets.dtype} {tuple(targets.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{len(weight)}] like the weight's rows; got {tuple(bias.shape)}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive or None (off); got {softcap}")
    in_range = ((targets >= 0) & (targets < len(weight))).all()
    if targets.is_cuda:
        torch._assert_async(in_range, "a target lies outside the vocabulary")  # a plain check would wait for the GPU
    elif not in_range:
        row = ((targets < 0) | (targets >= len(weight))).nonzero()[0].item()
        raise ValueError(f"target {targets[row].item()} of row {row} lies outside the vocabulary of {len(weight)}")
