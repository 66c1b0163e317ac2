"""Packed rows whose tokens are spread over the ranks of a sequence group (DeepSpeed-Ulysses, arXiv 2309.14509).

Everything in a layer but attention looks at one token at a time. For attention each rank trades its tokens' heads for
all tokens of a few heads, attends over the whole row, and trades back. What the head makes of a rank's own target rows
is then summed up over the group, so that every rank goes on with all of them; in backward each takes up the gradient of
its own. The sum of the ranks' gradients is then the row's, once.

Letters: k ranks, t tokens of each, T = kt, H query heads, G key heads, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpo_ds.cluster import collectives
from dpo_ds.errors import ModelError


def refusal(heads: int, key_heads: int, ranks: int) -> str:
    """Returns why attention with so many heads cannot be spread over `ranks`, "" where it can."""
    if heads % ranks:
        return f"its {heads} attention heads cannot be dealt out to {ranks} ranks"
    if key_heads % ranks and ranks % key_heads:
        return f"its {key_heads} key heads can neither be dealt out to {ranks} ranks nor be repeated for them"
    return ""


def to_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Trades [1, H, t, D] of this rank's tokens for [1, H / k, T, D] of all; key heads are repeated where there are
    fewer than ranks.

    Raises:
        ModelError: the heads cannot be dealt out.
    """
    ranks = collectives.sequence_size()
    if reason := refusal(query.shape[1], key.shape[1], ranks):
        raise ModelError(f"sequence_parallel {ranks}: {reason}")
    if key.shape[1] < ranks:
        key, value = (x.repeat_interleave(ranks // x.shape[1], dim=1) for x in (key, value))
    parts = [_by_rank(x[0].transpose(0, 1), ranks) for x in (query, key, value)]
    widths = [part.shape[-1] for part in parts]
    everyones = exchange(torch.cat(parts, dim=-1)).flatten(0, 1).split(widths, dim=-1)  # [T, width]
    return tuple(
        x.unflatten(-1, (-1, before.shape[-1])).transpose(0, 1)[None]
        for x, before in zip(everyones, (query, key, value), strict=True)
    )


def to_tokens(output: Tensor) -> Tensor:
    """Trades [1, T, H / k, D] of all tokens for [1, t, H, D] of this rank's."""
    ranks, width = collectives.sequence_size(), output.shape[-1]
    parts = output[0].flatten(1).unflatten(0, (ranks, -1))  # [k, t, H / k * D]
    own = exchange(parts).transpose(0, 1)  # [t, k, H / k * D]
    return own.flatten(1).unflatten(-1, (-1, width))[None]


def _by_rank(x: Tensor, ranks: int) -> Tensor:  # [t, heads, D] -> [k, t, heads / k * D]
    return x.unflatten(1, (ranks, -1)).flatten(2).transpose(0, 1)


@torch.library.custom_op("dpo_ds::exchange", mutates_args=())
def exchange(parts: Tensor) -> Tensor:
    """Gives parts[i] [k, ...] to the group's rank i, and returns what each of them gave to this one."""
    return collectives.exchange_sequence(parts.contiguous())


@exchange.register_fake
def _(parts):
    return torch.empty_like(parts, memory_format=torch.contiguous_format)


exchange.register_autograd(lambda ctx, grad: exchange(grad))


class _Whole(torch.autograd.Function):
    """Sums up what each rank of the group knows a part of; each takes up the gradient of its own part."""

    @staticmethod
    def forward(ctx, values: Tensor) -> Tensor:
        return collectives.reduce_sequence(values.clone())

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


def whole(own: Tensor, places: Tensor, count: int) -> Tensor:
    """Returns [count] values on every rank of the group, of which this one has `own` for `places`; no two ranks have
    one for the same place.
    """
    return _Whole.apply(own.new_zeros(count).index_copy(0, places, own))
