"""Packed attention by two calls of a varlen flash kernel, and its backward, as one autograd function.

The first call is causal over the blocks of each group, prompt ++ y_1 and the other completions; the second, where a
group's prompt is not copied before these, has their queries against the keys prompt (`packed.segments`). A query's two
partial results o1, o2 with log-sums l1, l2 make the whole one: l = log(e^l1 + e^l2), o = e^(l1 - l) o1 + e^(l2 - l) o2,
where e^(l1 - l) = sigmoid(l1 - l2).

In backward each call is given the whole o and l in place of its own, as in ring attention (arXiv 2310.01889): a weight
is e^(score - l) whichever call it came in, and the score's gradient is weight * (do·v - do·o). So both calls give the
exact shares of the gradients, which are added where rows meet: dq of the completions, dk and dv of the prompt.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpo_ds.models.packed.kernels import KERNELS
from dpo_ds.models.packed.sdpa import ScoreRule
from dpo_ds.models.packed.segments import PackIndex, SegmentTable


def varlen_attention(
    kernel: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: SegmentTable,
    rule: ScoreRule,
    merge: bool | None = None,
) -> Tensor:
    """Attends: query [1, H, T, D], key and value [1, G, T, D] -> [1, T, H, D]. merge: as in SegmentTable.index."""
    return _VarlenAttention.apply(query, key, value, table, rule, kernel, merge)


class _VarlenAttention(torch.autograd.Function):
    """Takes its views inside: to autograd x[0] is a selection, whose gradient is zeros as large as x and a copy."""

    @staticmethod
    def forward(ctx, query, key, value, table, rule, kernel, merge):
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
        output, log_sums = varlen_forward(kernel, query, key, value, table, rule, merge)
        ctx.save_for_backward(query, key, value, output, log_sums)
        ctx.rest = table, rule, kernel, merge
        return output[None]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        table, rule, kernel, merge = ctx.rest
        gradients = varlen_backward(kernel, grad[0], *ctx.saved_tensors, table, rule, merge)
        return *(x.transpose(0, 1)[None] for x in gradients), None, None, None, None


def varlen_forward(
    kernel: str,
    query_THD: Tensor,
    key_TGD: Tensor,
    value_TGD: Tensor,
    table: SegmentTable,
    rule: ScoreRule,
    merge: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns the output [T, H, D], contiguous, and the log-sums [H, T] of the whole attention."""
    forward, index = KERNELS[kernel].forward, _index(table, query_THD, rule, merge)
    keys, values = (_copied(x, index) for x in (key_TGD, value_TGD))
    output, log_sums = forward(query_THD, keys, values, index.own, rule, True)
    if index.shared:
        blocks, query_rows, key_rows = index.shared
        part, part_sums = forward(
            _take(query_THD, query_rows), _take(key_TGD, key_rows), _take(value_TGD, key_rows), blocks, rule, False
        )
        own, own_sums = _take(output, query_rows), _take(log_sums, query_rows, dim=1)
        own_weight = torch.sigmoid(own_sums - part_sums).t()[..., None]  # e^own / (e^own + e^part), float32
        whole = (part * (1 - own_weight)).addcmul_(own, own_weight)
        _put(output, query_rows, whole.to(output.dtype))
        _put(log_sums, query_rows, torch.logaddexp(own_sums, part_sums), dim=1)
    return output.contiguous(), log_sums  # kernels lay it out as the query


def varlen_backward(
    kernel: str,
    grad_THD: Tensor,
    query_THD: Tensor,
    key_TGD: Tensor,
    value_TGD: Tensor,
    output_THD: Tensor,
    log_sums_HT: Tensor,
    table: SegmentTable,
    rule: ScoreRule,
    merge: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients by query, key and value, from what `varlen_forward` was given and gave."""
    backward, index = KERNELS[kernel].backward, _index(table, query_THD, rule, merge)
    grad_THD = grad_THD.contiguous()
    keys, values = (_copied(x, index) for x in (key_TGD, value_TGD))
    by_query, by_key, by_value = backward(
        grad_THD, query_THD, keys, values, output_THD, log_sums_HT, index.own, rule, True
    )
    by_key, by_value = (_gathered_back(x, index) for x in (by_key, by_value))
    if index.shared:
        blocks, query_rows, key_rows = index.shared
        grad, query, output = (_take(x, query_rows) for x in (grad_THD, query_THD, output_THD))
        key, value = (_take(x, key_rows) for x in (key_TGD, value_TGD))
        log_sums = _take(log_sums_HT, query_rows, dim=1).contiguous()
        shares = backward(grad, query, key, value, output, log_sums, blocks, rule, False)
        rows = query_rows, key_rows, key_rows
        for whole, share, its_rows in zip((by_query, by_key, by_value), shares, rows, strict=True):
            _add(whole, its_rows, share)
    return by_query, by_key, by_value


def _index(table: SegmentTable, query_THD: Tensor, rule: ScoreRule, merge: bool | None) -> PackIndex:
    """Copies under a window, which counts positions across the border between prompt and rejected."""
    assert not (merge and rule.window), "a sliding window needs copied keys"
    return table.index(query_THD.device, False if rule.window or rule.softcap else merge)


def _copied(x: Tensor, index: PackIndex) -> Tensor:
    return x.index_select(0, index.copies.rows) if index.copies else x


def _gathered_back(grad: Tensor, index: PackIndex) -> Tensor:
    """Returns gradients by the pack's rows from those by copied keys. No operation writes a row twice, unlike
    index_select's own backward, whose atomic additions come in any order.
    """
    if not index.copies:
        return grad
    whole = grad.index_select(0, index.copies.first)
    for again, rows in index.copies.again:
        whole.index_add_(0, rows, grad.index_select(0, again))
    return whole


def _take(x: Tensor, rows: Tensor | slice, dim: int = 0) -> Tensor:
    if isinstance(rows, slice):
        return x.narrow(dim, rows.start, rows.stop - rows.start)
    return x.index_select(dim, rows)


def _put(x: Tensor, rows: Tensor | slice, part: Tensor, dim: int = 0) -> None:
    if isinstance(rows, slice):
        x.narrow(dim, rows.start, rows.stop - rows.start).copy_(part)
    else:
        x.index_copy_(dim, rows, part)


def _add(x: Tensor, rows: Tensor | slice, share: Tensor) -> None:
    if isinstance(rows, slice):
        x[rows] += share
    else:
        x.index_add_(0, rows, share)
