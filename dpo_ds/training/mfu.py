"""Counts the floating-point operations that a step needs, and what share that is of what the GPUs could do: MFU.

Model FLOPs utilisation as of PaLM (arXiv 2204.02311, appendix B): the products and the attention of one forward and its
backward. A prompt counts once, whatever the layout; what activation checkpointing computes again does not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import PreTrainedModel

from dpo_ds.data.batching import Lengths
from dpo_ds.memory.cards import card_of_device
from dpo_ds.models.layers.quantized import shape_of
from dpo_ds.models.layers.units import decoder_layers

if TYPE_CHECKING:
    from dpo_ds.models.engine import LoadedModel


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Returns how much `device` computes in a second at most; None where the table does not know."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    card = card_of_device(torch.cuda.get_device_name(device))
    return card and card.peak


@dataclass(frozen=True)
class ModelFlops:
    """Tells what a forward of one model costs, in FLOPs.

    token: of a token, in the products of all layers; trained: of those with weights that are trained. pairs: of a query
    and a key, in each layer's attention. windows: of each layer, None where it sees all that precedes. target: of a
    scored token, in the head. A backward costs the same again for the inputs, and for the weights that are trained.
    """

    token: float
    trained: float
    pairs: Sequence[float]
    windows: Sequence[int | None]
    target: float
    trains_head: bool

    @classmethod
    def of(cls, causal_lm: PreTrainedModel) -> ModelFlops:
        settings, layers = causal_lm.config.get_text_config(), decoder_layers(causal_lm)
        products = [(2 * _used(p, settings), p.requires_grad) for layer in layers for p in layer.parameters()]
        head = causal_lm.get_output_embeddings()
        return cls(
            token=sum(flops for flops, _ in products),
            trained=sum(flops for flops, is_trained in products if is_trained),
            pairs=[_pair(of_layer) for of_layer in _of_each(settings, len(layers))],
            windows=_windows(settings, len(layers)),
            target=0 if head is None else 2 * _used(head.weight, settings),
            trains_head=head is not None and head.weight.requires_grad,
        )

    def forward(self, lengths: Lengths, targets: int) -> float:
        """Returns what the groups of these lengths cost, of which `targets` tokens are scored."""
        return self.token * _tokens(lengths) + self._attention(lengths) + self.target * targets

    def with_backward(self, lengths: Lengths, targets: int) -> float:
        weights = self.trained * _tokens(lengths) + self.trains_head * self.target * targets
        return 2 * self.forward(lengths, targets) + weights + self._attention(lengths)  # attention has no weights

    def _attention(self, lengths: Lengths) -> float:
        layers = zip(self.pairs, self.windows, strict=True)
        return sum(pair * attended(lengths, window) for pair, window in layers)


class Utilisation:
    """Tells which share of what all GPUs could have computed a step's model FLOPs are."""

    def __init__(self, peak: float, policy: ModelFlops, forwards: Sequence[ModelFlops]):
        """peak: FLOP/s of all ranks. forwards: of the models that a batch goes through without gradients."""
        self._peak, self._policy, self._forwards = peak, policy, forwards

    @classmethod
    def of(cls, policy: LoadedModel, forwards: Sequence[LoadedModel], ranks: int) -> Utilisation | None:
        """Returns None where the device's peak is not known."""
        peak = peak_flops(policy.device, next(policy.causal_lm.parameters()).dtype)
        if peak is None:
            return None
        return cls(peak * ranks, ModelFlops.of(policy.causal_lm), [ModelFlops.of(m.causal_lm) for m in forwards])

    def __call__(self, lengths: Lengths, targets: int, seconds: float) -> float:
        flops = self._policy.with_backward(lengths, targets)
        flops += sum(model.forward(lengths, targets) for model in self._forwards)
        return flops / (seconds * self._peak)


def attended(lengths: Lengths, window: int | None) -> float:
    """Returns the number of (query, key) pairs: each token sees itself and, within `window`, what precedes it in prompt
    and its own completion. A completion of no token counts nothing.
    """
    prompt = _causal(lengths.prompt, window)
    completions = _causal(lengths.prompt[:, None] + lengths.completions, window).sum(1)
    return float((completions - (lengths.completions.shape[1] - 1) * prompt).sum())


def _causal(length: np.ndarray, window: int | None) -> np.ndarray:
    """1 + 2 + ... + length, no summand larger than the window."""
    rising = length if window is None else np.minimum(length, window)
    return rising * (rising + 1) / 2 + (length - rising) * rising


def _tokens(lengths: Lengths) -> int:
    return int(lengths.tokens.sum())


def _used(parameter: torch.nn.Parameter, settings) -> float:
    """Weights that a token is multiplied with: all of a matrix, of stacked experts those that are chosen, no vector."""
    shape = shape_of(parameter) or getattr(parameter, "ds_shape", parameter.shape)
    if len(shape) < 2:
        return 0
    chosen = getattr(settings, "num_experts_per_tok", None) or getattr(settings, "moe_topk", None)
    return float(np.prod(shape)) * (chosen / shape[0] if chosen and len(shape) == 3 else 1)


def _of_each(settings, layers: int) -> list:
    """Returns each layer's settings: of some families, as Gemma 4, heads differ in width."""
    found = list(settings.per_layer_config)
    return found if len(found) == layers else [settings] * layers


def _pair(settings) -> float:
    """Of a query and a key in one layer, whose settings these are: its key and its value in each head."""
    if not (heads := getattr(settings, "num_attention_heads", None)):
        return 0  # a model of recurrent layers alone
    return 2 * heads * sum(_widths(settings))


def _widths(settings) -> tuple[int, int]:
    """Of a key and of a value of one head."""
    width = getattr(settings, "head_dim", None) or settings.hidden_size // settings.num_attention_heads
    latent = getattr(settings, "qk_nope_head_dim", 0) + getattr(settings, "qk_rope_head_dim", 0)  # DeepSeek's
    return latent or width, getattr(settings, "v_head_dim", None) or width


def _windows(settings, layers: int) -> list[int | None]:
    window = getattr(settings, "sliding_window", None)
    kinds = getattr(settings, "layer_types", None) or ["sliding_attention"] * layers
    return [window if kind == "sliding_attention" else None for kind in kinds]
