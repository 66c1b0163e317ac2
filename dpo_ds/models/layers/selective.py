"""Says what a layer that is computed again in backward has kept all the same: selective activation checkpointing.

Kept are attention's result and the products that cost most for the memory that they take: each of a product's [T, W]
numbers is a sum over K, so those are kept where W is at most 2 K. They are queries, keys, values and the product behind
attention, not an MLP's first ones, which widen. Of a Llama's layer with four query heads a key head this is 3.5 times
the memory of its input, and leaves its MLP, norms and elementwise operators to be computed again. Outside a graph the
MLP's last product, which no gradient needs, is kept as well.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}  # the factor [K, W] comes last


def _policy(_, operator: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if operator in PRODUCTS:
        inner, width = args[-1].shape
        is_kept = width <= 2 * inner
    else:
        is_kept = any(word in operator.name() for word in ("attention", "attn"))  # a kernel, of torch's or a package's
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


keep_attention = partial(create_selective_checkpoint_contexts, _policy)
"""The contexts of torch's checkpoint around a layer's first and second forward."""
