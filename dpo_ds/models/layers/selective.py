"""Says what a layer that is computed again in backward has kept all the same: selective activation checkpointing.

Kept are attention's result and the products that cost most for the memory that they take: each of a product's [T, W]
numbers is a sum over K, so those are kept where W is at most 2 K. They are queries, keys, values and the product behind
attention, not an MLP's first ones, which widen. Of a Llama's layer with four query heads a key head this is 3.5 times
the memory of its input, and leaves its MLP, norms and elementwise operators to be computed again. Outside a graph the
MLP's last product, which no gradient needs, is kept as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}  # the factor [K, W] comes last


def _is_kept(operator: torch._ops.OpOverload, *args: Any) -> bool:
    if operator in PRODUCTS:
        inner, width = args[-1].shape
        return width <= 2 * inner
    return any(word in operator.name() for word in ("attention", "attn"))  # a kernel, of torch's or a package's


def _policy(_, operator: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if _is_kept(operator, *args) else CheckpointPolicy.PREFER_RECOMPUTE


keep_attention = partial(create_selective_checkpoint_contexts, _policy)
"""The contexts of torch's checkpoint around a layer's first and second forward."""


def contexts_of(module: nn.Module) -> Callable | None:
    """Returns what torch's checkpoint around this layer is given as `context_fn`; None: nothing, or no checkpoint."""
    function = getattr(module, "_gradient_checkpointing_func", None)
    return getattr(function, "keywords", {}).get("context_fn")


def keeps_attention(model: nn.Module) -> bool:
    """Returns whether layers of the model were told to."""
    return any(map(contexts_of, model.modules()))


@contextmanager
def changes_in_place(layers: list[nn.Module]) -> Iterator[set[str]]:
    """Gives the names of operators that change, within these layers, what would be kept: it would be what they made of
    it, and torch's own check does not see that through a view (OLMo's clip_qkv).
    """
    watch = _Watch()
    hooks = [layer.register_forward_pre_hook(watch.begin) for layer in layers]
    hooks += [layer.register_forward_hook(watch.end) for layer in layers]
    try:
        with watch:
            yield watch.found
    finally:
        for hook in hooks:
            hook.remove()


class _Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found: set[str] = set()
        self._is_within = False
        self._kept: dict[int, Tensor] = {}  # by storage

    def begin(self, *_) -> None:
        self._is_within = True

    def end(self, *_) -> None:
        self._is_within = False
        self._kept.clear()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not self._is_within:
            return result
        if _is_kept(func, *args):
            self._kept |= {_storage(x): x for x in tree_leaves(result) if isinstance(x, Tensor)}
        elif func._schema.is_mutable and any(_storage(x) in self._kept for x in args[:1] if isinstance(x, Tensor)):
            self.found.add(func.name())
        return result


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
