"""The product with a weight of 4 bits, by bitsandbytes, that lets ZeRO-3 free the weight between its two passes."""

from __future__ import annotations

import torch
from bitsandbytes import matmul_4bit
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor


class UnitLinear4bit(Linear4bit):
    """Multiplies with a packed weight as `units.UnitLinear` with a whole one. bitsandbytes 0.50 keeps a view of the
    gathered weight for backward, and so the whole model on every rank; this keeps the parameter, which is gathered
    again by then. Products are computed in the input's type, which is the run's.
    """

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return _ProductOfParameter.apply(input, self.weight, self.bias)
        return _product(input, self.weight, self.bias)


class _ProductOfParameter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input: Tensor, weight: Params4bit, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.blocks = weight.quant_state  # an activation checkpoint gives the weight back without it
        return _product(input, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return grad @ dequantize_4bit(weight.data, ctx.blocks).to(grad.dtype), None, None


def _product(input: Tensor, weight: Params4bit, bias: Tensor | None) -> Tensor:
    return matmul_4bit(input, weight.data, weight.quant_state, bias=bias)
