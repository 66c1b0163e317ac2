"""Packed, shared-prompt attention, registered with transformers under the name PACKED_ATTENTION.

A pack is one row of pairs, each prompt ++ chosen ++ rejected (`batch.packed_batch`). A pair is two blocks of causal
attention: queries prompt ++ chosen against the same keys, and queries rejected against keys prompt ++ rejected, the
triangle aligned bottom-right: a key's index in its block is its position in the sequence. How that is computed is in
`models/packed`. The segments reach every layer as a keyword argument of the model call:
`model(..., segments=segment_table(batch.segments))`.

Whether a model really takes this attention is checked, never assumed: `packed_refusal`.

Letters: T tokens of the pack, H query heads, G key heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from dpo_ds.batch import Batch, Group, Segment, packed_batch, padded_batch
from dpo_ds.errors import first_line
from dpo_ds.models.packed.backends import attend, backend_of, try_backends
from dpo_ds.models.packed.operator import packed_attention
from dpo_ds.models.packed.probe import open_probe, probe_attention, refuse
from dpo_ds.models.packed.sdpa import ScoreRule
from dpo_ds.models.packed.segments import SegmentTable, segment_table
from dpo_ds.models.packed.spread import to_heads, to_tokens

PACKED_ATTENTION = "dpo_ds_packed"
HARMLESS_TENSORS = frozenset({"position_ids", "cache_position"})  # passed on by models, read by no attention
CANARY_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}  # mean nats a token


def packed_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    segments: SegmentTable | None = None,
    is_spread: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, H, T, D], key and value [1, G, T, D] -> ([1, T, H, D], None).

    is_spread: these are this rank's tokens of a row that its sequence group has together (`packed.spread`).

    sliding_window counts positions of the sequence, the query's own included. Under torch.compile no line here reads
    the table but for its handle: a graph serves every batch. Raises UnsupportedAttention.
    """
    if segments is None:
        refuse("its attention gets no segments (calls other than on a packed batch need another implementation)")
        segments = segment_table((Segment(0, query.shape[2], ()),))
    if attention_mask is not None:
        refuse("the model builds an attention mask of its own")
    if dropout:
        refuse(f"attention dropout {dropout} is not implemented")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        refuse("attention is not causal")
    for name in sorted(k for k, v in kwargs.items() if isinstance(v, Tensor) and k not in HARMLESS_TENSORS):
        refuse(f"the model's attention takes a tensor '{name}', which is not implemented")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if is_spread:
        query, key, value = to_heads(query, key, value)
    if torch.compiler.is_compiling():
        inputs = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
        output = packed_attention(*inputs, segments.handle, scale, sliding_window, softcap)[0].unsqueeze(0)
        return to_tokens(output) if is_spread else output, None
    if not (query.shape[0] == 1 and query.shape[2] == key.shape[2] == segments.length):
        shapes = f"{tuple(query.shape)} and keys {tuple(key.shape)}"
        refuse(f"for a pack of {segments.length} tokens its attention has queries {shapes}")
    rule = ScoreRule(scale, sliding_window, softcap)
    if (probe := open_probe()) is not None:
        try_backends(query, key, value, rule)
        probe.backends.append(backend_of(query, value, rule))
        probe.windowed.update([sliding_window] if sliding_window else [])
    output = attend(query, key, value, segments, rule)
    return to_tokens(output) if is_spread else output, None


def _no_mask(*args: Any, local_size: int | None = None, **kwargs: Any) -> None:
    """transformers' mask interface: nothing is built, the segments say it all."""
    if local_size and (probe := open_probe()) is not None:
        probe.masked.add(local_size)


AttentionInterface.register(PACKED_ATTENTION, packed_attention_forward)
AttentionMaskInterface.register(PACKED_ATTENTION, _no_mask)


def use_packed_attention(causal_lm: PreTrainedModel) -> str | None:
    """Switches a model with its sub-models to packed attention, unchecked. None, or why its class cannot; then it keeps
    the implementation it had. No parameter is read: before or after ZeRO-3 takes the model, as you like."""
    before = causal_lm.config._attn_implementation
    refusal = None
    try:
        causal_lm.set_attn_implementation(PACKED_ATTENTION)
    except ValueError as error:
        refusal = first_line(error)
    stuck = {type(m).__name__ for m in causal_lm.modules() if isinstance(m, PreTrainedModel) and not _is_packed(m)}
    if stuck and not refusal:
        refusal = f"{', '.join(sorted(stuck))} does not use transformers' attention interface"
    if refusal:
        causal_lm.set_attn_implementation(before)
    return refusal


def packed_refusal(causal_lm: PreTrainedModel, forward_logps: Callable[[Batch], Tensor]) -> str | None:
    """Switches `causal_lm` to packed attention if that is right for it (None), else says why not in one line and leaves
    the model with the attention it came with.

    forward_logps(batch) -> token log-probs [N] runs the (wrapped) model: on a packed batch, which must call our
    attention once a layer, and on four unpadded rows with the model's own eager attention, which must agree.
    Collective under ZeRO-3: all ranks enter, with the same batches, and come to the same answer.
    """
    padded = causal_lm.config._attn_implementation
    assert padded != PACKED_ATTENTION, "the model comes with the attention of its padded layout"
    with torch.compiler.set_stance("force_eager"):  # a compiled layer would hide what it calls, and compile for this
        refusal = use_packed_attention(causal_lm) or _canary(causal_lm, forward_logps)
    causal_lm.set_attn_implementation(padded if refusal else PACKED_ATTENTION)
    return refusal


@torch.no_grad()
def _canary(causal_lm: PreTrainedModel, forward_logps: Callable[[Batch], Tensor]) -> str | None:
    text = causal_lm.config.get_text_config()
    pairs = canary_pairs(text.vocab_size)
    with probe_attention() as probe:
        try:
            packed = forward_logps(packed_batch(pairs))
        except (TypeError, ValueError, LookupError, RuntimeError) as error:  # the model's own code, on unwonted input
            return next(iter(probe.refusals), f"its forward fails on a packed batch: {first_line(error)}")
    if probe.refusals:
        return probe.refusals[0]
    if len(probe.backends) != text.num_hidden_layers:
        return f"{len(probe.backends)} of its {text.num_hidden_layers} layers call the registered attention"
    if not probe.masked <= probe.windowed:
        return f"it limits attention to {max(probe.masked)} tokens by a mask alone"
    causal_lm.set_attn_implementation("eager")
    alone = torch.cat([forward_logps(padded_batch([alone])) for pair in pairs for alone in one_by_one(pair)])
    error = (packed.float() - alone.float()).abs().mean().item()
    tolerance = canary_tolerance(causal_lm, alone)
    if not error <= tolerance:  # also when it is not a number
        return f"packed outputs differ from unpacked ones by {error:.1e} on average, more than {tolerance:.0e}"
    return None


def canary_tolerance(model: PreTrainedModel, outputs: Tensor) -> float:
    """Returns the tolerance of log-probs in nats; small outputs, such as the scores of a new reward head, are judged by
    their own size.
    """
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return CANARY_TOLERANCE[dtype] * min(1.0, outputs.abs().mean().item())


def canary_pairs(vocab_size: int) -> list[Group]:
    """Draws two short pairs of random tokens, the same on every rank."""
    generator = np.random.default_rng(0)
    lengths = ((5, 4, 6), (7, 3, 5))
    tokens = [[generator.integers(vocab_size, size=n) for n in pair] for pair in lengths]
    return [Group.pair(p, c, r, np.ones(len(c), bool), np.ones(len(r), bool)) for p, c, r in tokens]


def one_by_one(group: Group) -> list[Group]:
    """Returns each completion behind the prompt, alone."""
    return [Group(group.prompt, (ids,), (mask,)) for ids, mask in zip(group.completions, group.masks, strict=True)]


def _is_packed(model: PreTrainedModel) -> bool:
    return model.config._attn_implementation == PACKED_ATTENTION
