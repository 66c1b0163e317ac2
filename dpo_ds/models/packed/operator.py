"""Packed attention as one opaque operator with its fake and its backward, for layers under torch.compile.

torch.compile sees `dpo_ds::packed_attention` as a call of tensors: query, key and value, whose T is dynamic, and the
segment table's handle, a small int64 tensor on the CPU that is a graph input like any other. Inside, the table is
looked up by the handle's content (`table_of`), so that no graph depends on the lengths of a batch and nothing must be
kept alive from forward to backward. Kernels are chosen inside as well, as in eager mode, by the same function. Eager
code calls the autograd function itself, which costs the host less than an operator written in Python.

Letters: T tokens of the pack, H query heads, G key heads, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpo_ds.models.packed.backends import backend_of
from dpo_ds.models.packed.probe import open_probe
from dpo_ds.models.packed.sdpa import ScoreRule, sdpa, sdpa_backward
from dpo_ds.models.packed.segments import table_of
from dpo_ds.models.packed.varlen import varlen_backward, varlen_forward


@torch.library.custom_op("dpo_ds::packed_attention", mutates_args=())
def packed_attention(
    query_THD: Tensor,
    key_TGD: Tensor,
    value_TGD: Tensor,
    handle: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Returns the output [T, H, D] and the log-sums [H, T], which are for backward alone (0 where SDPA serves)."""
    table, rule = table_of(handle), ScoreRule(scale, window, softcap)
    backend = backend_of(query_THD, value_TGD, rule)
    if (probe := open_probe()) is not None:
        probe.backends.append(backend)
        probe.windowed.update([window] if window else [])
    if backend != "sdpa":
        return varlen_forward(backend, query_THD, key_TGD, value_TGD, table, rule)
    output = sdpa(*(x.transpose(0, 1)[None] for x in (query_THD, key_TGD, value_TGD)), table, rule)[0]
    return output, _log_sums(query_THD).zero_()


@packed_attention.register_fake
def _(query_THD, key_TGD, value_TGD, handle, scale, window, softcap):
    return query_THD.new_empty(*query_THD.shape[:2], value_TGD.shape[2]), _log_sums(query_THD)


@torch.library.custom_op("dpo_ds::packed_attention_backward", mutates_args=())
def packed_attention_backward(
    grad_THD: Tensor,
    query_THD: Tensor,
    key_TGD: Tensor,
    value_TGD: Tensor,
    output_THD: Tensor,
    log_sums_HT: Tensor,
    handle: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients by query, key and value, shaped as these."""
    table, rule = table_of(handle), ScoreRule(scale, window, softcap)
    backend = backend_of(query_THD, value_TGD, rule)
    if backend == "sdpa":
        return sdpa_backward(grad_THD, query_THD, key_TGD, value_TGD, table, rule)
    grads = varlen_backward(backend, grad_THD, query_THD, key_TGD, value_TGD, output_THD, log_sums_HT, table, rule)
    return tuple(grad.contiguous() for grad in grads)


@packed_attention_backward.register_fake
def _(grad_THD, query_THD, key_TGD, value_TGD, output_THD, log_sums_HT, handle, scale, window, softcap):
    return tuple(x.new_empty(x.shape) for x in (query_THD, key_TGD, value_TGD))


def _log_sums(query_THD: Tensor) -> Tensor:
    exact = torch.promote_types(query_THD.dtype, torch.float32)
    return query_THD.new_empty(query_THD.shape[1], query_THD.shape[0], dtype=exact)


def _setup_context(ctx, inputs, output):
    query, key, value, handle, *ctx.rule = inputs
    ctx.save_for_backward(query, key, value, *output, handle)


def _backward(ctx, grad, _):
    query, key, value, output, log_sums, handle = ctx.saved_tensors
    grads = packed_attention_backward(grad, query, key, value, output, log_sums, handle, *ctx.rule)
    return *grads, None, None, None, None


packed_attention.register_autograd(_backward, setup_context=_setup_context)
