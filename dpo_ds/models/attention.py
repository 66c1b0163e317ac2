"""Packed, shared-prompt attention, registered with transformers under the name PACKED_ATTENTION.

A pack is one row of pairs, each prompt ++ chosen ++ rejected (`batch.packed_batch`). A pair is two blocks of causal
attention: queries prompt ++ chosen against the same keys, and queries rejected against keys prompt ++ rejected. Where
keys outnumber queries the triangle is aligned bottom-right: a key's place in its block is its position in the sequence.
The segments reach every layer as a keyword argument of the model call: `model(..., segments=batch.segments)`.

Whether a model really takes this attention is checked, never assumed: `packed_refusal`.

Letters: T tokens of the pack, H query heads, G key heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import varlen as torch_varlen
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from dpo_ds.batch import CHOSEN_ONLY, PAIR, Batch, PreferencePair, Segment, packed_batch, padded_batch

PACKED_ATTENTION = "dpo_ds_packed"
HARMLESS_TENSORS = frozenset({"position_ids", "cache_position"})  # passed on by models, read by no attention
CANARY_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}  # mean nats a token


class UnsupportedAttention(RuntimeError):
    """The model asks of attention what the packed one does not implement, or calls it without segments."""


class VarlenIndex(NamedTuple):
    """The blocks of a pack as varlen kernels want them: block i's keys are rows key_rows[cu_keys[i] : cu_keys[i + 1]].

    cu_queries, cu_keys [blocks + 1]: int32. key_rows: int64 rows of the pack, those of a prompt twice.
    """

    cu_queries: Tensor
    cu_keys: Tensor
    max_queries: int
    max_keys: int
    key_rows: Tensor


class ScoreRule(NamedTuple):
    """A query's score for a key: scale * query·key, if softcap is given softcap * tanh(score / softcap), for keys 0 to
    window - 1 positions back (None: for all that precede)."""

    scale: float
    window: int | None = None
    softcap: float | None = None


class SegmentTable:
    """The pairs of one pack and what attention derives from them, built at first use."""

    def __init__(self, segments: tuple[Segment, ...]):
        self.segments = segments
        self.length = self.segments[-1].end
        self._masks: dict[tuple, Tensor] = {}
        self._varlen: dict[torch.device, VarlenIndex] = {}

    def mask(self, queries: int, keys: int, window: int | None, like: Tensor) -> Tensor:
        """Additive mask [queries, keys] of a block: 0 where the key is 0 to window - 1 positions back, else -inf."""
        place = (queries, keys, window, like.dtype, like.device)
        if place not in self._masks:
            with torch.inference_mode(False):  # built by a reference pass, saved for backward by the policy's
                distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
                seen = (distance >= 0) & (distance < (window or keys))
                mask = torch.zeros(queries, keys, dtype=like.dtype).masked_fill_(~seen, float("-inf"))
                self._masks[place] = mask.to(like.device)
        return self._masks[place]

    def varlen(self, device: torch.device) -> VarlenIndex:
        if device not in self._varlen:
            queries, key_rows = [], []
            for segment in self.segments:
                prompt_end, chosen_end = segment.start + segment.prompt, segment.end - segment.rejected
                prompt, rejected = np.arange(segment.start, prompt_end), np.arange(chosen_end, segment.end)
                queries += [chosen_end - segment.start, segment.rejected]
                key_rows += [np.arange(segment.start, chosen_end), np.concatenate([prompt, rejected])]
            blocks = [(q, rows) for q, rows in zip(queries, key_rows, strict=True) if q]
            lengths = np.array([(q, len(rows)) for q, rows in blocks])
            cumulative = np.concatenate([np.zeros((1, 2), np.int32), lengths.cumsum(0, dtype=np.int32)])
            with torch.inference_mode(False):
                cu_queries, cu_keys = torch.from_numpy(cumulative.T.copy()).to(device)
                rows = torch.from_numpy(np.concatenate([rows for _, rows in blocks])).to(device)
            self._varlen[device] = VarlenIndex(cu_queries, cu_keys, *lengths.max(0).tolist(), rows)
        return self._varlen[device]


@lru_cache(maxsize=2)  # layers, policy, reference and recomputation of one batch share masks and indices
def segment_table(segments: tuple[Segment, ...]) -> SegmentTable:
    return SegmentTable(segments)


@cache
def backend_for(
    device: torch.device, dtype: torch.dtype, head_width: int, value_width: int | None = None, softcap: bool = False
) -> str:
    """The kernel packed attention runs: "flash-attn" when installed, else "torch-varlen", else "sdpa".

    The varlen kernels want an Ampere or later GPU, a 16-bit type and value heads as wide as the keys', 256 at most.
    """
    fits = head_width <= 256 and value_width in (None, head_width) and dtype in (torch.float16, torch.bfloat16)
    if not fits or device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return "sdpa"
    if find_spec("flash_attn"):
        return "flash-attn"
    return "sdpa" if softcap else "torch-varlen"


def _sdpa(query: Tensor, key: Tensor, value: Tensor, table: SegmentTable, rule: ScoreRule) -> Tensor:
    """query [1, H, T, D], key and value [1, G, T, D] -> [1, T, H, D]; two blocks a pair, whatever else is in the pack.

    `split` and not slices: a slice's backward is as large as the whole pack, a split's is one concatenation.
    """
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    queries = query.split([n for s in table.segments for n in (s.prompt + s.chosen, s.rejected)], dim=2)
    parts = [n for s in table.segments for n in (s.prompt, s.chosen, s.rejected)]
    keys, values = key.split(parts, dim=2), value.split(parts, dim=2)
    outputs = []
    for i, block_query in enumerate(queries):
        if block_query.shape[2]:
            prompt, own = i // 2 * 3, i // 2 * 3 + 1 + i % 2  # own: chosen in even blocks, rejected in odd ones
            block_key = torch.cat([keys[prompt], keys[own]], dim=2)
            block_value = torch.cat([values[prompt], values[own]], dim=2)
            outputs.append(_attend(block_query, block_key, block_value, table, rule))
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _attend(query: Tensor, key: Tensor, value: Tensor, table: SegmentTable, rule: ScoreRule) -> Tensor:
    """One block of bottom-right causal attention: [1, H, queries, D] against [1, H, keys, D]."""
    queries, keys = query.shape[2], key.shape[2]
    window = rule.window if rule.window and rule.window < keys else None
    if rule.softcap:
        scores = rule.softcap * torch.tanh(query @ key.mT * (rule.scale / rule.softcap))
        scores = scores + table.mask(queries, keys, window, query)
        return torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype) @ value
    causal = queries == keys and window is None
    mask = None if causal else table.mask(queries, keys, window, query)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, scale=rule.scale)


def _flash_attn(query: Tensor, key: Tensor, value: Tensor, table: SegmentTable, rule: ScoreRule) -> Tensor:
    from flash_attn import flash_attn_varlen_func  # optional: extra `flash`

    index = table.varlen(query.device)
    output_THD = flash_attn_varlen_func(
        *_varlen_inputs(query, key, value, index),
        *index[:4],
        softmax_scale=rule.scale,
        causal=True,
        window_size=_window_size(rule),
        softcap=rule.softcap or 0.0,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return output_THD[None]


def _torch_varlen(query: Tensor, key: Tensor, value: Tensor, table: SegmentTable, rule: ScoreRule) -> Tensor:
    assert not rule.softcap, "backend_for gives soft-capped models another kernel"
    index = table.varlen(query.device)
    output_THD = torch_varlen.varlen_attn(
        *_varlen_inputs(query, key, value, index),
        *index[:4],
        scale=rule.scale,
        window_size=_window_size(rule),
        enable_gqa=query.shape[1] != key.shape[1],
        num_splits=1,  # a pair's result does not depend on what else is in the pack
    )
    return output_THD[None]


def _window_size(rule: ScoreRule) -> tuple[int, int]:
    """(left, right) as flash attention counts: keys besides the query's own, -1 for no limit."""
    return (rule.window - 1 if rule.window else -1), 0


def _varlen_inputs(query: Tensor, key: Tensor, value: Tensor, index: VarlenIndex) -> tuple[Tensor, Tensor, Tensor]:
    """query [T, H, D]; key and value [keys of all blocks, G, D]."""
    key, value = (x[0].transpose(0, 1).index_select(0, index.key_rows) for x in (key, value))
    return query[0].transpose(0, 1), key, value


BACKENDS: dict[str, Callable[..., Tensor]] = {"flash-attn": _flash_attn, "torch-varlen": _torch_varlen, "sdpa": _sdpa}


@dataclass
class AttentionProbe:
    """What a model asked of packed attention while `probe_attention` was open.

    backends: one name per call. refusals: what it asked for in vain. masked, windowed: the local spans its masks were
    meant to have (transformers' `local_size`) and those it handed to attention itself.
    """

    backends: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    masked: set[int] = field(default_factory=set)
    windowed: set[int] = field(default_factory=set)


_probe: AttentionProbe | None = None


@contextmanager
def probe_attention() -> Iterator[AttentionProbe]:
    """While open, calls are recorded and what is unsupported is noted, not raised: an exception in the middle of a
    forward would leave ZeRO-3 with gathered parameters. Not for nesting."""
    global _probe
    _probe = AttentionProbe()
    try:
        yield _probe
    finally:
        _probe = None


def _refuse(reason: str) -> None:
    if _probe is None:
        raise UnsupportedAttention(f"packed attention: {reason}; train with --train.layout padded")
    _probe.refusals.append(reason)


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
    segments: tuple[Segment, ...] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, H, T, D], key and value [1, G, T, D] -> ([1, T, H, D], None).

    sliding_window counts positions of the sequence, the query's own included. Raises UnsupportedAttention.
    """
    if segments is None:
        _refuse("its attention gets no segments (calls other than on a packed batch need another implementation)")
        segments = (Segment(0, query.shape[2], 0, 0),)
    if attention_mask is not None:
        _refuse("the model builds an attention mask of its own")
    if dropout:
        _refuse(f"attention dropout {dropout} is not implemented")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        _refuse("attention is not causal")
    for name in sorted(k for k, v in kwargs.items() if isinstance(v, Tensor) and k not in HARMLESS_TENSORS):
        _refuse(f"the model's attention takes a tensor '{name}', which is not implemented")
    table = segment_table(segments)
    assert query.shape[0] == 1 and query.shape[2] == key.shape[2] == table.length, (
        f"a pack of {table.length} tokens, but queries {tuple(query.shape)} and keys {tuple(key.shape)}"
    )
    backend = backend_for(query.device, query.dtype, query.shape[-1], value.shape[-1], bool(softcap))
    if _probe is not None:
        _probe.backends.append(backend)
        _probe.windowed.update([sliding_window] if sliding_window else [])
    rule = ScoreRule(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap)
    return BACKENDS[backend](query, key, value, table, rule), None


def _no_mask(*args: Any, local_size: int | None = None, **kwargs: Any) -> None:
    """transformers' mask interface: nothing is built, the segments say it all."""
    if _probe is not None and local_size:
        _probe.masked.add(local_size)


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
        refusal = _first_line(error)
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
            return f"its forward fails on a packed batch: {_first_line(error)}"
    if probe.refusals:
        return probe.refusals[0]
    if len(probe.backends) != text.num_hidden_layers:
        return f"{len(probe.backends)} of its {text.num_hidden_layers} layers call the registered attention"
    if not probe.masked <= probe.windowed:
        return f"it limits attention to {max(probe.masked)} tokens by a mask alone"
    causal_lm.set_attn_implementation("eager")
    sides = [_as_chosen(pair, side) for pair in pairs for side in PAIR]
    alone = torch.cat([forward_logps(padded_batch([side], CHOSEN_ONLY)) for side in sides])
    error = (packed.float() - alone.float()).abs().mean().item()
    tolerance = canary_tolerance(causal_lm, alone)
    if not error <= tolerance:  # also when it is not a number
        return f"packed outputs differ from unpacked ones by {error:.1e} on average, more than {tolerance:.0e}"
    return None


def canary_tolerance(model: PreTrainedModel, outputs: Tensor) -> float:
    """Of log-probs in nats; small outputs, such as the scores of a new reward head, are judged by their own size."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return CANARY_TOLERANCE[dtype] * min(1.0, outputs.abs().mean().item())


def canary_pairs(vocab_size: int) -> list[PreferencePair]:
    """Two short pairs of random tokens, the same on every rank."""
    generator = np.random.default_rng(0)
    lengths = ((5, 4, 6), (7, 3, 5))
    tokens = [[generator.integers(vocab_size, size=n) for n in pair] for pair in lengths]
    return [PreferencePair(p, c, r, np.ones(len(c), bool), np.ones(len(r), bool)) for p, c, r in tokens]


def _as_chosen(pair: PreferencePair, side: str) -> PreferencePair:
    ids = pair.completion(side)
    return PreferencePair(pair.prompt, ids, ids, np.ones(len(ids), bool), np.ones(len(ids), bool))


def _is_packed(model: PreTrainedModel) -> bool:
    return model.config._attn_implementation == PACKED_ATTENTION


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
