"""Finds a model's decoder layers and makes each one unit under ZeRO-3: fetched, hooked and released once.

DeepSpeed hooks every module that holds a parameter, nine in a Llama's layer, and each hook runs some dozen Python calls
in forward and in backward: of a small model's step that is most. As a "leaf" a layer is one module to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

_linear = torch._C._nn.linear  # torch.nn.functional's name is bound to DeepSpeed's function
Call = tuple[tuple[Any, ...], dict[str, Any]]


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Returns the blocks that the model repeats: the elements of its longest list of modules, lists within lists (a
    layer's experts) not counted. Empty where there is no list.
    """
    return list(max(_outermost_lists(model), key=len, default=[]))


def make_units(model: nn.Module, zero: dict) -> str:
    """Makes every decoder layer a leaf to ZeRO-3, unless its configuration `zero` names leaf modules itself; to be
    called before the engine takes the model. Returns why this model cannot have it, "" where it can.
    """
    from deepspeed.utils import set_z3_leaf_module

    if "leaf_module" in zero:
        return ""
    layers = decoder_layers(model)
    owners = [*(set(layer.parameters()) for layer in layers), set(_parameters_beside(layers, model))]
    if len(set().union(*owners)) < sum(map(len, owners)):  # DeepSpeed knows one leaf of a parameter
        return "its decoder layers share weights, with each other or with what surrounds them"
    for layer in layers:
        set_z3_leaf_module(layer, True)
        if any(parameter.requires_grad for parameter in layer.parameters()):
            layer.register_forward_pre_hook(with_gradients_at_the_input, with_kwargs=True)
        layer.register_forward_hook(_as_tuple)
        for module in layer.modules():
            if type(module) is nn.Linear:
                module.__class__ = UnitLinear
        layer.parameters_of_unit = tuple(layer.named_parameters())
        layer.named_parameters = MethodType(_named_parameters, layer)  # a method: torch.compile looks into it
    return "" if layers else "it has no list of decoder layers"


class UnitLinear(nn.Linear):
    """Multiplies within a leaf. Under autograd torch would keep the transpose of the gathered weight until backward,
    and so the weight; DeepSpeed 0.19.8 puts a function of its own in torch's place, which costs the host three times
    the product's own time. This one keeps the parameter, which is gathered again by then, and does nothing else. The
    input is kept for a weight that is trained alone.
    """

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return _linear(input, self.weight, self.bias)
        return _LinearOfParameters.apply(input, self.weight, self.bias)


class _LinearOfParameters(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input if ctx.needs_input_grad[1] else None, weight)
        return _linear(input, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        return (
            grad @ weight if needs_input else None,
            rows.T @ input.flatten(0, -2) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
        )


def _named_parameters(layer: nn.Module, prefix: str = "", recurse: bool = True, **options: Any) -> Iterator:
    """nn.Module.named_parameters from a list: DeepSpeed asks a leaf for its parameters ten times a step."""
    if prefix or not recurse:
        return type(layer).named_parameters(layer, prefix, recurse, **options)
    return iter(layer.parameters_of_unit)


def with_gradients_at_the_input(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Call | None:
    """Lets the backward hook of a leaf fire when all of its parameters have their gradients.

    torch runs it at the gradient of the inputs that come by position, and before everything else where none of them
    needs one (frozen embeddings under LoRA): DeepSpeed 0.19.8 would then take every gradient of the layer for zero.
    """
    if not torch.is_grad_enabled():
        return None
    if not args:
        name = next(name for name, value in kwargs.items() if isinstance(value, Tensor) and value.is_floating_point())
        args, kwargs = (kwargs[name],), {key: value for key, value in kwargs.items() if key != name}
    hidden = args[0]
    return (args if hidden.requires_grad else (hidden.requires_grad_(), *args[1:])), kwargs


def _as_tuple(layer: nn.Module, args: tuple, output: Any) -> Any:
    """DeepSpeed 0.19.8 sees no tensor in a list, as GPT-1's layers return, and would take every gradient for zero."""
    return tuple(output) if isinstance(output, list) else None


def is_compiled(model: nn.Module) -> bool:
    """Returns whether its decoder layers run compiled, as far as they could be until now (`layers/compile`)."""
    return any("forward" in vars(layer) for layer in decoder_layers(model))


def _parameters_beside(layers: list[nn.Module], module: nn.Module) -> Iterator[nn.Parameter]:
    yield from module.parameters(recurse=False)
    for child in module.children():
        if child not in layers:
            yield from _parameters_beside(layers, child)


def _outermost_lists(module: nn.Module) -> Iterator[nn.ModuleList]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from _outermost_lists(child)
