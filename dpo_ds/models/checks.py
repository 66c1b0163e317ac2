"""What is found out by trying a loaded model before it trains: that its log-probs are right, and in which layout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from dpo_ds.batch import Batch, Group, packed_batch, padded_batch
from dpo_ds.cluster import collectives
from dpo_ds.cluster.foreign import SHOWN_BY, refusing
from dpo_ds.errors import ModelError
from dpo_ds.models import lora
from dpo_ds.models.attention import PACKED_ATTENTION, canary_pairs, canary_tolerance, one_by_one, packed_refusal
from dpo_ds.models.engine import LoadedModel
from dpo_ds.models.layers.activations import take_tiles_away, tiles_of
from dpo_ds.models.layers.quantized import shape_of
from dpo_ds.models.layers.rope import check_lengths
from dpo_ds.models.layers.selective import changes_in_place, keeps_attention
from dpo_ds.models.layers.units import decoder_layers
from dpo_ds.models.packed.backends import refused_backends


def settle_layout(wanted: str, models: Sequence[LoadedModel]) -> tuple[str, str]:
    """Returns the layout that every model takes, and why it is not the one asked for, "" where it is. All ranks enter.

    The head is checked first (`check_head`). Packed attention is tried on each model before it is relied on
    (attention.packed_refusal).
    """
    for model in models:
        check_head(model)
    if wanted == "padded":
        _check_padding(models)
        return "padded", ""
    for model in models:
        with model.evaluating():
            refusal = packed_refusal(model.causal_lm, model.token_logps)
        if refusal:
            for switched in models:
                switched.causal_lm.set_attn_implementation(switched.padded_attention)
            _check_padding(models)
            return "padded", f"{type(model.causal_lm).__name__}: {refusal}"
    return "packed", ""


def settle_sequence(ranks: int, refusal: str, models: Sequence[LoadedModel], section: str = "train") -> int:
    """Forms sequence groups of so many ranks, and tries a spread row on each model; returns `ranks`. All ranks enter.

    section: of the key, train or precompute. refusal: why the models do not take packed rows, "" where they do.

    Raises:
        ModelError: they do not, or a spread row's log-probs are not those of the whole.
    """
    if ranks == 1:
        return ranks
    if refusal:
        raise ModelError(f"{section}.sequence_parallel {ranks} needs the packed layout: {refusal}")
    collectives.form_sequence_groups(ranks)
    for model in models:
        batch = packed_batch(canary_pairs(model.causal_lm.config.get_text_config().vocab_size))
        with model.evaluating(), torch.compiler.set_stance("force_eager"), _naming(model):
            together = model.token_logps(batch.spread(ranks, collectives.sequence_place()))
            alone = model.token_logps(batch)
        error = _difference(together, alone)
        if not error <= canary_tolerance(model.causal_lm, alone):
            name = type(model.causal_lm).__name__
            raise ModelError(
                f"{section}.sequence_parallel {ranks}: {name}: log-probs of a row that ranks compute together differ "
                f"by {error:.1e} on average from those of one rank: its layers look at other tokens beside attention"
            )
    return ranks


@torch.no_grad()
def settle_activations(model: LoadedModel) -> list[str]:
    """Tries what the layers keep for backward on short rows. MLPs in tiles are taken away where that changes what comes
    of them. Returns lines for the user. All ranks enter.

    Raises:
        ModelError: its layers change in place what they are to keep.
    """
    batch = packed_batch if model.causal_lm.config._attn_implementation == PACKED_ATTENTION else padded_batch
    pairs = batch(canary_pairs(model.causal_lm.config.get_text_config().vocab_size)).to(model.device)
    name = type(model.causal_lm).__name__

    def outputs() -> Tensor:
        with model.evaluating(), torch.compiler.set_stance("force_eager"):
            return model.engine(pairs)

    if keeps_attention(model.causal_lm):
        with changes_in_place(decoder_layers(model.causal_lm)) as changed:
            outputs()
        if changed:
            problem = f"{name} changes in place ({', '.join(sorted(changed))}) what its layers are to keep"
            raise ModelError(f"--train.activation_memory selective: {problem}; take checkpoint")
    with tiles_of(model.causal_lm, 2) as are_there:
        if not are_there:
            return []
        tiled = outputs()
    whole = outputs()
    error = _difference(tiled, whole)
    if error <= canary_tolerance(model.causal_lm, whole):
        return []
    take_tiles_away(model.causal_lm)
    return [f"train.activation_memory offload: {name}'s MLP stays whole: by tiles of tokens it differs by {error:.1e}"]


def layout_notes(key: str, refusal: str) -> list[str]:
    """Returns the lines for the user of what `settle_layout` found: why the layout `key` asks for is not taken, or else
    which attention kernels are installed and do not serve it."""
    return [f"{key} padded, not packed: {refusal}"] if refusal else refused_backends()


@torch.no_grad()
def check_head(model: LoadedModel) -> None:
    """Some families scale or bend their logits in their own way; one whose way the head does not know is refused. So is
    one that sees what comes behind a token, and one that is random while it trains.

    All ranks enter, with the model's padded attention in place.

    Raises:
        ModelError: the head's log-probs or scores are not those of the model's own logits, or these are no numbers;
            they depend on later tokens or on chance; the model's own code fails.
    """
    check_lengths(model.causal_lm)
    vocabulary = model.causal_lm.config.get_text_config().vocab_size
    pairs = canary_pairs(vocabulary)
    twin = _twin(pairs[0], vocabulary)
    batch, name = padded_batch([*pairs, twin]).to(model.device), type(model.causal_lm).__name__
    with model.evaluating(), _naming(model):
        with _counting(decoder_layers(model.causal_lm)) as calls:
            ours = model.engine(batch)
        own = model.engine(batch, own_logits=True)
    if model.engine.training and calls and max(calls.values()) > 1:
        raise ModelError(
            f"{name}: runs its layers {max(calls.values())} times in a forward; DeepSpeed takes the gradients of a "
            "layer once, so it cannot be trained under ZeRO-3"
        )
    if not own.isfinite().all():
        raise ModelError(_not_finite(model))
    tolerance = canary_tolerance(model.causal_lm, own)
    error = _difference(ours, own)
    if not error <= tolerance:  # also when it is not a number
        raise ModelError(
            f"{name} computes its logits in a way that dpo_ds does not know: what comes of them differs by "
            f"{error:.1e} on average from its own, more than {tolerance:.0e}"
        )
    if _are_of_tokens(ours, batch):  # scores stand at the end
        chosen, other_end = _sides(ours, batch)[-2:]
        error = _difference(chosen[:-1], other_end[:-1])
        if not error <= tolerance:
            raise ModelError(
                f"{name}: a token's log-prob changes by {error:.1e} with the token behind it, so it is no causal "
                "language model (a BERT must have is_decoder true in its config.json)"
            )
    if model.engine.training:
        _check_chance(model, batch, tolerance)


def _check_chance(model: LoadedModel, batch: Batch, tolerance: float) -> None:
    """Compares the same sequence with itself in training mode. LoRA's own dropout, which a user asks for, is off."""
    adapted = lora.is_adapted(model.causal_lm)
    with model.evaluating(), _naming(model), lora.adapters_off(model.causal_lm) if adapted else nullcontext():
        model.engine.train()
        found = model.engine(batch)
    sides = _sides(found, batch)
    error = _difference(sides[0], sides[-2])
    if not error <= tolerance / 10:
        raise ModelError(
            f"{type(model.causal_lm).__name__}: equal sequences differ by {error:.1e} while it trains: it has a "
            "dropout that nothing in its config.json switches off, so policy and reference would differ by chance"
        )


@torch.no_grad()
def _check_padding(models: Sequence[LoadedModel]) -> None:
    """Raises ModelError where a row's outputs change with the padding beside it. All ranks enter."""
    for model in models:
        pairs = canary_pairs(model.causal_lm.config.get_text_config().vocab_size)
        name, batch = type(model.causal_lm).__name__, padded_batch(pairs)
        shortest = min(pairs, key=lambda pair: len(pair.prompt) + len(pair.chosen))
        with model.evaluating(), _naming(model):
            together = model.engine(batch.to(model.device))
            alone = model.engine(padded_batch(one_by_one(shortest)[:1]).to(model.device))
        error = _difference(_sides(together, batch)[2 * pairs.index(shortest)], alone)
        if not error <= canary_tolerance(model.causal_lm, alone):
            raise ModelError(
                f"{name}: a sequence's outputs differ by {error:.1e} on average beside longer ones: it does not heed "
                "the attention mask, so no layout is right for it"
            )


@contextmanager
def _counting(layers: Sequence[nn.Module]) -> Iterator[Counter]:
    """Counts the calls of each layer."""
    calls: Counter = Counter()
    hooks = [layer.register_forward_pre_hook(lambda layer, _: calls.update([layer])) for layer in layers]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _twin(pair: Group, vocabulary: int) -> Group:
    """Returns a pair whose sides are the first one's chosen, and the same with another last token."""
    other = pair.chosen.copy()
    other[-1] = (other[-1] + 1) % vocabulary
    return replace(pair, completions=(pair.chosen, other), masks=(pair.masks[0],) * 2)


def _are_of_tokens(outputs: Tensor, batch: Batch) -> bool:
    return len(outputs) == len(batch.targets)


def _sides(outputs: Tensor, batch: Batch) -> Sequence[Tensor]:
    """Splits log-probs of tokens, or scores, into those of each sequence."""
    return outputs.split(batch.target_counts.tolist() if _are_of_tokens(outputs, batch) else 1)


def _difference(one: Tensor, other: Tensor) -> float:
    return (one.float() - other.float()).abs().mean().item()


def _naming(model: LoadedModel) -> AbstractContextManager:
    name = type(model.causal_lm).__name__
    return refusing(lambda what: ModelError(f"{name}: its own forward fails: {what}{SHOWN_BY}"))


def _not_finite(model: LoadedModel) -> str:
    """Says whose fault it is that a model's own outputs are NaN or infinite. All ranks enter."""
    parameters = model.causal_lm.named_parameters()
    numbers = [(name, getattr(p, "ds_tensor", p)) for name, p in parameters if shape_of(p) is None]
    own = [name for name, tensor in numbers if not tensor.isfinite().all()]
    names = sorted({name for part in collectives.gather_objects(own) for name in part})
    path = model.causal_lm.config._name_or_path or type(model.causal_lm).__name__
    if not names:
        return f"{path}: its own outputs are NaN or infinite, though its weights are finite: they overflow in its dtype"
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{path}: its own outputs are NaN or infinite, as its weights {', '.join(names[:3])}{more} hold such values"


