"""Packed attention by torch's scaled_dot_product_attention, a block a completion: for the CPU, for float32, for GPUs
before Ampere, and for soft-caps where no kernel takes them. No mask is larger than MASK_ELEMENTS: what would need one
goes block by block under a window, and without one in two calls that need none (`_AfterPrompt`). Soft-caps alone form
a block's scores, [H, queries, keys].

Letters: T tokens of the pack, H query heads, G key heads, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from dpo_ds.models.packed.segments import SegmentTable

MASK_ELEMENTS = 1 << 22  # of a mask at most: 16 MiB in float32
BLOCK = 512  # rows that a window is shown to at a time


class _Flash:
    """torch's attention on a CPU, by its operators, which tell the log-sum-exps [1, H, queries]."""

    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class ScoreRule(NamedTuple):
    """A query's score for a key: scale * query·key, if softcap is given softcap * tanh(score / softcap), for keys 0 to
    window - 1 positions back (None: for all that precede)."""

    scale: float
    window: int | None = None
    softcap: float | None = None


def sdpa(query: Tensor, key: Tensor, value: Tensor, table: SegmentTable, rule: ScoreRule) -> Tensor:
    """Attends: query [1, H, T, D], key and value [1, G, T, D] -> [1, T, H, D], contiguous; a block a completion,
    whatever the pack.

    `split` and not slices: a slice's backward is as large as the whole pack, a split's is one concatenation. The prompt
    and y_1 lie side by side, so that the prompt's keys are copied for the other completions alone.
    """
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    blocks = [n for s in table.segments for n in (s.prompt + sum(s.completions[:1]), *s.completions[1:])]
    parts = zip(*(x.split(blocks, dim=2) for x in (query, key, value)), strict=True)
    outputs = []
    for segment in table.segments:
        first, *keys_and_values = next(parts)
        if first.shape[2]:
            outputs.append(_attend(first, *keys_and_values, table, rule).transpose(1, 2))
        for own_query, *own in islice(parts, len(segment.completions[1:])):
            if own_query.shape[2]:
                prompt_and_own = (
                    torch.cat([shared[:, :, : segment.prompt], x], dim=2)
                    for shared, x in zip(keys_and_values, own, strict=True)
                )
                outputs.append(_attend(own_query, *prompt_and_own, table, rule).transpose(1, 2))
    return torch.cat(outputs, dim=1)


def _attend(query: Tensor, key: Tensor, value: Tensor, table: SegmentTable, rule: ScoreRule) -> Tensor:
    """Attends in one block, causal and bottom-right: [1, H, queries, D] against [1, H, keys, D]."""
    queries, keys = query.shape[2], key.shape[2]
    window = rule.window if rule.window and rule.window < keys else None
    if window and queries * keys > MASK_ELEMENTS and not rule.softcap:
        return _attend_windowed(query, key, value, table, rule.scale, window)
    if rule.softcap:
        scores = rule.softcap * torch.tanh(query @ key.mT * (rule.scale / rule.softcap))
        scores = scores + table.mask(queries, keys, window, query)
        return torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype) @ value
    causal = queries == keys and window is None
    fits = query.device.type == "cpu" and query.shape[-1] == value.shape[-1]
    if not causal and window is None and queries * keys > MASK_ELEMENTS and fits:
        return _AfterPrompt.apply(query, key, value, rule.scale)
    mask = None if causal else table.mask(queries, keys, window, query)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, scale=rule.scale)


def _attend_windowed(
    query: Tensor, key: Tensor, value: Tensor, table: SegmentTable, scale: float, window: int
) -> Tensor:
    """Attends a block of rows at a time, each to the keys that its window reaches; blocks of a length share a mask."""
    queries, before, outputs = query.shape[2], key.shape[2] - query.shape[2], []
    for start in range(0, queries, BLOCK):
        stop = min(start + BLOCK, queries)
        seen = slice(max(0, before + start - window + 1), before + stop)
        mask = table.mask(stop - start, seen.stop - seen.start, window, query)
        rows = query[:, :, start:stop], key[:, :, seen], value[:, :, seen]
        outputs.append(scaled_dot_product_attention(*rows, attn_mask=mask, scale=scale))
    return torch.cat(outputs, dim=2)


class _AfterPrompt(torch.autograd.Function):
    """Attends to a prompt and, causally, to what stands behind it, on a CPU: two calls of torch's kernel without masks,
    merged by their log-sum-exps; backward as in `packed.varlen`.
    """

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        before = key.shape[2] - query.shape[2]
        parts = [
            _Flash.forward(query, k, v, 0.0, is_causal, scale=scale)
            for (k, v), is_causal in _parts_of(key, value, before)
        ]
        (shared, shared_sums), (own, own_sums) = parts
        log_sums = torch.logaddexp(shared_sums, own_sums)
        weight = torch.sigmoid(own_sums - shared_sums)[..., None].to(own.dtype)
        output = torch.lerp(shared, own, weight)
        ctx.save_for_backward(query, key, value, output, log_sums)
        ctx.scale = scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, log_sums = ctx.saved_tensors
        shares = [
            _Flash.backward(grad, query, k, v, output, log_sums, 0.0, is_causal, scale=ctx.scale)
            for (k, v), is_causal in _parts_of(key, value, key.shape[2] - query.shape[2])
        ]
        (query_shared, *shared), (query_own, *own) = shares
        return query_shared + query_own, *(torch.cat(both, dim=2) for both in zip(shared, own, strict=True)), None


def _parts_of(key: Tensor, value: Tensor, before: int) -> list[tuple[tuple[Tensor, Tensor], bool]]:
    """Returns keys and values of the prompt and of what stands behind it, and whether they are seen causally."""
    return [((key[:, :, :before], value[:, :, :before]), False), ((key[:, :, before:], value[:, :, before:]), True)]


def sdpa_backward(
    grad_THD: Tensor, query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, table: SegmentTable, rule: ScoreRule
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of `sdpa` by query, key and value, written out, in float32 at least: for compiled layers,
    where attention is one operator that autograd does not look into. Scores are recomputed, one key head at a time.
    """
    exact = torch.promote_types(query_THD.dtype, torch.float32)
    inputs = query_THD, key_TGD, value_TGD
    grads = [x.new_zeros(x.shape, dtype=exact) for x in inputs]
    group = query_THD.shape[1] // key_TGD.shape[1]
    for queries, keys in _blocks(table):
        mask = table.mask(len(queries), len(keys), rule.window, grads[0])
        for head in range(key_TGD.shape[1]):
            heads = slice(head * group, (head + 1) * group)
            q, g = (x[queries, heads].transpose(0, 1).to(exact) for x in (query_THD, grad_THD))
            k, v = (x[keys, head].to(exact) for x in (key_TGD, value_TGD))
            scores = q @ k.mT * rule.scale
            if rule.softcap:
                bend = torch.tanh(scores / rule.softcap)
                scores = rule.softcap * bend
            weights = torch.softmax(scores + mask, dim=-1)
            by_score = g @ v.mT
            by_score = weights * (by_score - (weights * by_score).sum(-1, keepdim=True))
            if rule.softcap:
                by_score = by_score * (1 - bend * bend)
            grads[0][queries, heads] += (by_score @ k * rule.scale).transpose(0, 1)
            grads[1][keys, head] += (by_score.mT @ q).sum(0) * rule.scale
            grads[2][keys, head] += (weights.mT @ g).sum(0)
    return tuple(grad.to(x.dtype) for grad, x in zip(grads, inputs, strict=True))


def _blocks(table: SegmentTable) -> Iterator[tuple[list[int], list[int]]]:
    """Yields the rows of queries and the rows of keys of every block; no row twice in either."""
    for segment in table.segments:
        prompt = [*range(segment.start, segment.start + segment.prompt)]
        for i, (end, length) in enumerate(zip(segment.ends, segment.completions, strict=True)):
            own = [*range(end - length, end)]
            if i == 0 and (first := prompt + own):
                yield first, first
            elif own:
                yield own, prompt + own
        if prompt and not segment.completions:
            yield prompt, prompt
