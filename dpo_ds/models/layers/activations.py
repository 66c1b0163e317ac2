"""What a layer keeps from forward to backward: everything, its input alone, or its input in host memory.

checkpoint: each decoder layer keeps its input and is computed again in backward. selective: attention and the products
around it are kept too (`layers/selective`). offload: the input lies in pinned host memory meanwhile, copied beside the
computation, there and back; and of rows that are long the MLP, whose inner width is a layer's largest, is computed a
tile of tokens at a time, each tile again in backward (TiledMLP, arXiv 2506.13996). A layer then needs memory for
attention and for one tile, and the GPU holds one layer's input.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from dpo_ds.errors import ModelError
from dpo_ds.models.layers.selective import keep_attention
from dpo_ds.models.layers.units import decoder_layers

MLPS = ("mlp", "feed_forward", "ffn")  # as decoder layers call it
LEAST_TILE = 1024  # tokens: enough for products to be as fast as with all of them


def save_activation_memory(model: PreTrainedModel, how: str, parked: type[Parked] | None = None) -> None:
    """Makes the model's layers keep what `how` says: none (everything), selective, checkpoint or offload.

    parked: what an input becomes that waits, Parked if not given.

    Raises:
        ModelError: its layers cannot be computed again, as far as transformers knows.
    """
    if how == "none":
        return
    arguments = {"use_reentrant": False} | ({"context_fn": keep_attention} if how == "selective" else {})
    try:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)
    except ValueError as error:
        raise ModelError(f"--train.activation_memory {how}: {error} Leave the key out") from None
    if how == "offload":
        parking = _Parking(parked or Parked)
        for module in model.modules():
            if getattr(module, "gradient_checkpointing", False):
                module._gradient_checkpointing_func = parking.run
        for mlp in _mlps(model):
            mlp.tile = max(model.config.get_text_config().hidden_size, LEAST_TILE)
            mlp.forward = partial(_in_tiles, mlp, mlp.forward)


def inputs_stay(layer: nn.Module) -> bool:
    """Returns whether the input of a layer that is checkpointed stays where it is until backward."""
    return not isinstance(getattr(layer._gradient_checkpointing_func, "__self__", None), _Parking)


def _mlps(model: PreTrainedModel) -> Iterator[nn.Module]:
    """Yields the layers' MLPs of linear layers alone: experts choose among all of their tokens."""
    for layer in decoder_layers(model):
        for name in MLPS:
            mlp = getattr(layer, name, None)
            if isinstance(mlp, nn.Module):
                owners = [m for m in mlp.modules() if next(m.parameters(recurse=False), None) is not None]
                if owners and all(isinstance(owner, nn.Linear) for owner in owners):
                    yield mlp


@contextmanager
def tiles_of(model: PreTrainedModel, tokens: int) -> Iterator[bool]:
    """Opens a time in which tiles are as small as that, for a check on short rows; gives whether there are any."""
    tiled = [mlp for mlp in _mlps(model) if hasattr(mlp, "tile")]
    before = [mlp.tile for mlp in tiled]
    for mlp in tiled:
        mlp.tile = tokens
    yield bool(tiled)
    for mlp, tile in zip(tiled, before, strict=True):
        mlp.tile = tile


def take_tiles_away(model: PreTrainedModel) -> None:
    for mlp in _mlps(model):
        vars(mlp).pop("forward", None)
        vars(mlp).pop("tile", None)


def _in_tiles(mlp: nn.Module, forward: Callable[..., Tensor], hidden: Tensor, *others: Any) -> Tensor:
    """[..., tokens, D] -> [..., tokens, D]: all at once where they are few. others: what else a family gives its MLP;
    a residual (Bloom, MPT) is cut as the hidden states are."""
    if hidden.shape[-2] <= 2 * mlp.tile:
        return forward(hidden, *others)
    return _tile_by_tile(mlp.tile, forward, hidden, *others)


@torch.compiler.disable
def _tile_by_tile(tile: int, forward: Callable[..., Tensor], hidden: Tensor, *others: Any) -> Tensor:
    def cut(given: Any) -> Iterable[Any]:
        is_of_tokens = isinstance(given, Tensor) and given.shape == hidden.shape
        return given.split(tile, dim=-2) if is_of_tokens else repeat(given)

    run = partial(checkpoint, forward, use_reentrant=False) if torch.is_grad_enabled() else forward
    parts = zip(hidden.split(tile, dim=-2), *map(cut, others), strict=False)
    return torch.cat([run(*part) for part in parts], dim=-2)


class _Parking:
    """Checkpoints layers whose inputs wait in host memory; one copy is under way while a layer is computed."""

    def __init__(self, parked: type[Parked]):
        self._parked = parked
        self._last: Callable[[], Parked | None] = lambda: None
        self._stream: torch.cuda.Stream | None = None

    def run(self, layer: Callable[..., Any], hidden: Tensor, *args: Any) -> Any:
        """Computes `layer(hidden, *args)`, as torch's checkpoint does, and again in backward."""
        if not torch.is_grad_enabled():
            return layer(hidden, *args)
        if hidden.is_cuda and self._stream is None:
            self._stream = torch.cuda.Stream(hidden.device)
        parked = self._parked(hidden, self._last(), self._stream)
        self._last = weakref.ref(parked)
        place = hidden.new_empty(0)  # tells torch on which device random numbers are drawn
        return checkpoint(lambda _: layer(parked.take(), *args), place, use_reentrant=False)


class Parked:
    """A layer's input: itself when it is taken first, a copy from host memory when it is taken again. On a CPU there is
    nowhere to park it: it stays."""

    def __init__(self, hidden: Tensor, before: Parked | None, stream: torch.cuda.Stream | None):
        self._hidden: Tensor | None = hidden
        self._before = None if before is None else weakref.ref(before)  # the layer before, whose turn comes next
        self._stream, self._device, self._needs_grad = stream, hidden.device, hidden.requires_grad
        self._back: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None
        if stream is None:
            self._host = self._stay(hidden)
            return
        self._host = torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream(hidden.device))
        with torch.cuda.stream(stream):
            self._host.copy_(hidden.detach(), non_blocking=True)
        hidden.record_stream(stream)  # its memory is not given away before the copy is made

    def _stay(self, hidden: Tensor) -> Any:
        """Returns what `fetch` makes it of where there is no stream to copy on."""
        return hidden.detach()

    def take(self) -> Tensor:
        if (hidden := self._hidden) is not None:
            self._hidden = None
            return hidden
        self.fetch()
        if self._arrived is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(self._arrived)
            self._back.record_stream(current)
        if self._before is not None and (before := self._before()) is not None:
            before.fetch()
        back, self._back = self._back, None
        return back.detach().requires_grad_(self._needs_grad)

    def fetch(self) -> None:
        """Begins to bring it back, where that has not begun."""
        if self._back is not None:
            return
        if self._stream is None:
            self._back = self._host
            return
        with torch.cuda.stream(self._stream):
            self._back = self._host.to(self._device, non_blocking=True)
        self._arrived = self._stream.record_event()
