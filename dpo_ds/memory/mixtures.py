"""Lets mixtures of experts run on shapes alone, where they ask for values or torch has no rule for their type."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_grouped_product, _read_number = torch.ops.aten._grouped_mm.default, torch.ops.aten._local_scalar_dense.default


class EvenRouting(TorchDispatchMode):
    """Takes every expert's share of a forward of so many tokens to be the same. To be entered within a FakeTensorMode.

    No size depends on the shares: the rows of all experts together are tokens times experts a token.
    """

    def __init__(self, text_config, tokens: int):
        super().__init__()
        self._rows = tokens * (getattr(text_config, "num_experts_per_tok", None) or 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is _grouped_product:
            return _shape_of_product(*args[:3])
        if func is _read_number and (experts := _numbers_beside(args[0])) > 1 and self._rows:
            each, left = divmod(self._rows, experts)  # as JetMoE reads them, one by one, to cut its rows apart
            return each + (args[0].storage_offset() < left)
        return func(*args, **(kwargs or {}))


def _shape_of_product(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """Returns what torch's product of groups makes, in any type: torch 2.13's own rule for tensors without data takes
    bfloat16 alone, which the product does not. ends [groups]: of each, where rows or columns of all lie in a row.
    """
    groups = [] if a.dim() != b.dim() else [len(ends) if a.dim() == 2 else len(a)]
    return a.new_empty(*groups, a.shape[-2], b.shape[-1])


def _numbers_beside(number: Tensor) -> int:
    """Returns how many whole numbers there are in the tensor of which this one is a view; 0 for other numbers."""
    return 0 if number.is_floating_point() else number.untyped_storage().nbytes() // number.itemsize
