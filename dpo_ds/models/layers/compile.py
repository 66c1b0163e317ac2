"""Compiles decoder layers with torch.compile, which fuses the small operators between a layer's products and attention.

Each layer's own forward is compiled, inside ZeRO-3's hooks, so that these are never traced. All layers of a class share
one code object, and the number of tokens is dynamic: a model has one graph to train with and one for forwards without
gradients, again for every other kind of layer. Packed attention is one opaque operator in them. Activation checkpoints
are within a graph, whose backward then computes again only what a gradient needs: not the layer's last product, a
quarter of a Llama's. Inputs that wait in host memory are beside it, as in eager code, and so are checkpoints of layers
whose routers are watched (`layers/routers`): torch compiles nothing of a checkpoint that a hook interrupts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from deepspeed.utils import z3_leaf_module
from torch import nn
from torch._dynamo.callback import callback_handler
from torch._dynamo.exc import TorchDynamoException
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from dpo_ds.cluster.process_group import Say
from dpo_ds.errors import first_line
from dpo_ds.models.layers.activations import inputs_stay
from dpo_ds.models.layers.quantized import is_quantized
from dpo_ds.models.layers.selective import contexts_of
from dpo_ds.models.layers.units import decoder_layers

if TYPE_CHECKING:
    from dpo_ds.models.engine import LoadedModel

OPTIONS = {
    "deterministic": True,  # no kernel is chosen by timing it: a run that is resumed has the same ones
    "emulate_precision_casts": True,  # rounds where eager code does, so that all graphs of a layer agree
}
GRAPHS = 64  # of one class: to train, to evaluate, of the reference, each for every kind of layer; torch allows 8
WORDS = 200  # characters of a compiler's complaint
CACHES = ("past_key_values", "past_key_value", "layer_past")  # keyword arguments


def settle_compilation(wanted: bool | str, models: Sequence[LoadedModel], say: Say) -> None:
    """Lets every decoder layer of these models run compiled, where `wanted` says so: true, or auto on a GPU. A graph is
    made when it is first needed, which takes a while and is told; so is why a model's layers stay as they are.

    To be called once the layout is settled: the checks before that run the layers in ways that nothing else does.
    """
    for model in models:
        if wanted is True or (wanted == "auto" and model.device.type == "cuda"):
            if refusal := _use_compiled_layers(model.causal_lm, model.device, say):
                say([f"{type(model.causal_lm).__name__} is not compiled: {refusal}"])


def _use_compiled_layers(causal_lm: nn.Module, device: torch.device, say: Say) -> str:
    """Returns why this model keeps its layers as they are, "" where it does not."""
    layers = decoder_layers(causal_lm)
    if not layers:
        return "it has no list of decoder layers"
    if is_quantized(causal_lm):
        return "its weights are in 4 bits"
    if any(hasattr(p, "ds_id") for p in causal_lm.parameters()) and not all(map(z3_leaf_module, layers)):
        return "ZeRO-3 has hooks within its layers"
    if reason := missing_compiler(device):
        return reason
    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    _Clock.tells(say)
    _undo_deepspeeds_linear()
    compiled = CompiledLayers(layers, say)
    for layer in layers:
        layer.forward = partial(compiled, layer)
    return ""


@cache
def missing_compiler(device: torch.device) -> str:
    """Returns why nothing can be compiled for `device` here, "" where a small function and its gradient could be."""
    x = torch.ones(4, 2, device=device, requires_grad=True)
    try:
        torch.compile(lambda x: (x.sin() * 2).sum(), dynamic=True, options=OPTIONS)(x).backward()
    except Exception as error:  # whatever compilers, drivers and caches on disk run into
        return first_line(error)[:WORDS]
    return ""


def _undo_deepspeeds_linear() -> None:
    """Takes back what zero.Init put in the place of F.linear, so that no weight is kept from forward to backward.

    A graph keeps none, and torch 2.11 traces that function with each parameter's number: one graph for every layer.
    """
    if torch.nn.functional.linear is zero3_linear_wrap:
        torch.nn.functional.linear = torch._C._nn.linear


@cache
def _compiled(forward: Callable) -> Callable:
    return torch.compile(forward, dynamic=True, options=OPTIONS)


@cache
def _recomputed(forward: Callable, contexts: Callable | None) -> Callable:
    """Returns `forward` as one that keeps for backward its inputs and what `contexts`, as torch's checkpoint takes
    them, keep; without gradients it is the same."""
    given = {"context_fn": contexts} if contexts else {}

    def recomputed(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(partial(forward, layer, **kwargs), *args, use_reentrant=False, **given)

    return recomputed


class CompiledLayers:
    """Calls the forward of a layer's class: compiled for whole sequences, as it was written for all else."""

    def __init__(self, layers: list[nn.Module], say: Say):
        self._layers, self._say = layers, say
        inner = {layer: [module for module in layer.modules() if module is not layer] for layer in layers}
        self._watched = {layer for layer, modules in inner.items() if any(m._forward_hooks for m in modules)}

    def __call__(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        forward, saves = type(layer).forward, False
        if isinstance(layer, GradientCheckpointingLayer):
            forward = forward.__wrapped__  # the class puts checkpointing around what it was given
            saves = layer.gradient_checkpointing and layer.training
        compiles = _is_whole_sequence(args, kwargs)
        if saves and compiles and inputs_stay(layer) and layer not in self._watched:
            return self._run(_recomputed(forward, contexts_of(layer)), layer, *args, **kwargs)
        if compiles:
            forward = partial(self._run, forward)
        if saves:
            return layer._gradient_checkpointing_func(partial(forward, layer, **kwargs), *args)
        return forward(layer, *args, **kwargs)

    def _run(self, forward: Callable, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        try:
            return _compiled(forward)(layer, *args, **kwargs)
        except TorchDynamoException as error:  # before the graph has run
            for each in self._layers:
                vars(each).pop("forward", None)
            why = first_line(error)[:WORDS]
            self._say([f"{type(layer).__name__} cannot be compiled, its layers run as they are: {why}"])
            return forward(layer, *args, **kwargs)


def _is_whole_sequence(args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether a call is of the kind that graphs are made for: no cache to generate with, and more than the one token of
    a micro-batch without pairs, of which torch would make a graph of its own.
    """
    return bool(args) and args[0].shape[1] > 1 and all(kwargs.get(name) is None for name in CACHES)


class _Clock:
    """Tells how long each compilation took, as torch announces them."""

    _only: _Clock | None = None

    def __init__(self):
        self.say: Say = print
        self._started = 0.0
        callback_handler.register_start_callback(self._start)
        callback_handler.register_end_callback(self._end)

    @classmethod
    def tells(cls, say: Say) -> None:
        if cls._only is None or cls._only._start not in callback_handler.start_callbacks:
            cls._only = cls()  # torch._dynamo.reset() forgets whom it called
        cls._only.say = say

    def _start(self, _) -> None:
        self._started = time.perf_counter()

    def _end(self, _) -> None:
        self.say([f"compiled a decoder layer in {time.perf_counter() - self._started:.1f} s"])
