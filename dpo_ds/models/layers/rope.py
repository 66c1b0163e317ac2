"""Rotary embeddings whose frequencies depend on a sequence's length: each group gets those of its own.

transformers takes them from the longest sequence of the batch ("longrope": Phi-3 and 4, MiniCPM; "dynamic": NTK-aware
scaling), and "dynamic" keeps those of the longest one seen. A short pair's log-probs would then change with what lies
beside it, and between precompute and train. A group's length is that of its longest completion.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from dpo_ds.batch import Batch
from dpo_ds.errors import ModelError

VARYING = ("dynamic", "longrope")  # transformers' types whose frequencies depend on the length


def take_lengths(model: nn.Module) -> None:
    """Makes the model's rotary embeddings that vary heed `tell_lengths`; others are left alone."""
    model.ropes_of_length = [module for module in model.modules() if any(map(_varies, _kinds(module)))]
    for module in model.ropes_of_length:
        module.lengths = module.spread = None
        module.forward = MethodType(_by_length, module)


def tell_lengths(model: nn.Module, batch: Batch | None) -> None:
    """Tells the groups' lengths for the forward that follows, and its recomputation; None: transformers' own way."""
    if modules := getattr(model, "ropes_of_length", None):
        lengths = None if batch is None else lengths_of(batch)
        for module in modules:
            module.lengths, module.spread = lengths, batch if batch is not None and batch.part is not None else None


def lengths_of(batch: Batch) -> Tensor:  # [rows, length] int64
    """Returns for every token how long its group's longest sequence is; 0 for padding."""
    if batch.segments is not None:
        spans = [(s.prompt + max(s.completions, default=0), s.end - s.start) for s in batch.segments]
        lengths, counts = torch.tensor(spans or [(1, 1)]).T
        lengths = lengths.repeat_interleave(counts)[None].to(batch.input_ids.device)
        return lengths if lengths.shape == batch.input_ids.shape else torch.ones_like(batch.input_ids)
    rows = batch.attention_mask.sum(1)
    if sum(batch.group_sizes) == len(rows):
        longest = [group.max() for group in rows.split(batch.group_sizes)]
        rows = torch.stack(longest).repeat_interleave(torch.tensor(batch.group_sizes, device=rows.device))
    return rows[:, None] * batch.attention_mask


@torch.no_grad()
def check_lengths(model: nn.Module) -> None:
    """Tries lengths on both sides of the boundary beside each other.

    Raises:
        ModelError: the frequencies of a short sequence change with a long one beside it all the same.
    """
    for module in model.ropes_of_length:
        short, long = 4, boundary_of(module) + 4
        positions = torch.cat([torch.arange(short), torch.arange(long)])[None]
        lengths = torch.tensor([short] * short + [long] * long)[None]
        for layer_type in module.rope_type if isinstance(module.rope_type, dict) else (None,):
            options = {} if layer_type is None else {"layer_type": layer_type}
            mixed = _at(module, positions, lengths, options)
            alone = _at(module, positions[:, :short], lengths[:, :short], options)
            if not all(torch.equal(one[:, :short], other) for one, other in zip(mixed, alone, strict=True)):
                raise ModelError(
                    f"{type(module).__name__}: its frequencies depend on the batch's longest sequence in a way that "
                    "dpo_ds does not know, so a pair's log-probs would change with what lies beside it"
                )


def boundary_of(module: nn.Module) -> int:
    """Returns the length up to which the frequencies are the same for all sequences."""
    parameters = module.config.rope_parameters
    kinds = parameters.values() if isinstance(module.rope_type, dict) else [parameters]
    given = [kind["original_max_position_embeddings"] for kind in kinds if "original_max_position_embeddings" in kind]
    return min([module.original_max_seq_len, *given])


def _by_length(module: nn.Module, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Computes cosines and sines of tokens of one length at a time, of all up to the boundary together. A rank that has
    a part of a row computes the whole row's: a part of a long sequence may not tell how long it is.
    """
    if (batch := module.spread) is not None:
        module.spread = None
        found = _by_length(module, x, batch.position_ids, *args, **kwargs)
        module.spread = batch
        own = [batch.part.of_row(tensor.transpose(1, -1)).transpose(1, -1) for tensor in _tensors(found)]
        return own[0] if isinstance(found, Tensor) else tuple(own)

    def forward(positions: Tensor) -> Any:
        _forget(module)
        return type(module).forward(module, x, positions, *args, **kwargs)

    if module.lengths is None:
        return forward(position_ids)
    kinds = torch.where(module.lengths > boundary_of(module), module.lengths, (module.lengths > 0).long())
    if not _is_dynamic(module):
        kinds = kinds.clamp_max(2)
    found = kinds.unique().tolist()
    if len(found) == 1:
        return forward(position_ids)
    whole = None
    for kind in found:
        if kind == 0:  # padding
            continue
        rows, columns = (kinds == kind).nonzero(as_tuple=True)
        part = forward(position_ids.expand_as(kinds)[rows, columns][None])
        if whole is None:
            whole = [tensor.new_zeros(*kinds.shape, *tensor.shape[2:]) for tensor in _tensors(part)]
        for target, tensor in zip(whole, _tensors(part), strict=True):
            target[rows, columns] = tensor[0]
    return whole[0] if isinstance(part, Tensor) else tuple(whole)


def _forget(module: nn.Module) -> None:
    """Takes "dynamic" frequencies back to those of short sequences: they are kept from the longest one seen."""
    if not _is_dynamic(module):
        return
    for name in [name for name, _ in module.named_buffers() if name.endswith("original_inv_freq")]:
        prefix = name.removesuffix("original_inv_freq")
        own = getattr(module, f"{prefix}inv_freq")
        module.register_buffer(f"{prefix}inv_freq", getattr(module, name).to(own.device), persistent=False)
        setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def _varies(kind: str) -> bool:
    return any(word in kind for word in VARYING)


def _is_dynamic(module: nn.Module) -> bool:
    return any("dynamic" in kind for kind in _kinds(module))


def _kinds(module: nn.Module) -> list[str]:
    kinds = getattr(module, "rope_type", None)
    kinds = list(kinds.values()) if isinstance(kinds, dict) else [kinds]
    return [kind for kind in kinds if isinstance(kind, str)]


def _at(module: nn.Module, positions: Tensor, lengths: Tensor, options: dict[str, Any]) -> list[Tensor]:
    device = next(module.buffers()).device
    module.lengths = lengths.to(device)
    found = module(torch.zeros(1, device=device), positions.to(device), **options)
    module.lengths = None
    return _tensors(found)


def _tensors(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)

