"""The auxiliary loss of a mixture of experts, which keeps its routers from sending every token to the same few experts.

    E Σ_e f_e P_e        eq. 4 to 6 of arXiv 2101.03961, for top-k routing, over all layers at once: transformers' form

f_e: how many of its k experts a token finds in e, P_e: the probability that routers give e, both as means over the
layers' tokens; E experts. Here these are all tokens of a global batch, so that neither ranks nor micro-batches change
the loss (global balance, which arXiv 2501.11873 finds better than that of micro-batches, too). f_e has no gradient:
once it is known, every token's part of the loss stands alone. So the gradient enters where the logits are made, within
each router's layer, whatever recomputes, compiles or partitions that layer.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from dpo_ds.batch import Batch
from dpo_ds.errors import ModelError

COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")  # as configs call it
FORMULA = ["gate_logits", "num_experts", "top_k", "attention_mask"]  # what transformers' own function takes


def check_wanted(wanted: float | None, config: PreTrainedConfig) -> None:
    """Raises ModelError for a model of this config that has no auxiliary loss, where one is wanted. Builds nothing; a
    model of the folder's own code is looked at when it is loaded.
    """
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model_class is not None and not _knows_the_loss(model_class, config):
        _refuse(wanted, model_class)


def coefficient_of(causal_lm: PreTrainedModel, wanted: float | None) -> float:
    """Returns what the auxiliary loss counts: `wanted`, or by default what the model's config says; 0: it has none.

    Raises:
        ModelError: it is wanted of a model that has no such loss.
    """
    if not _knows_the_loss(type(causal_lm), causal_lm.config) or not any(True for _ in _routers(causal_lm)):
        _refuse(wanted, type(causal_lm))
        return 0.0
    config = causal_lm.config.get_text_config()
    own = next((getattr(config, name) for name in COEFFICIENTS if getattr(config, name, None) is not None), 0.0)
    return float(own if wanted is None else wanted)


def _refuse(wanted: float | None, model_class: type) -> None:
    if wanted:
        problem = f"{model_class.__name__} has no routers with an auxiliary loss that transformers knows"
        raise ModelError(f"--model.router_aux_loss {wanted:g}: {problem}; leave the key out")


def _knows_the_loss(model_class: type, config: PreTrainedConfig) -> bool:
    """Whether transformers has it for this class, with routers that give scores beside their logits: DBRX's do not, and
    its config does not say k where others do."""
    function = getattr(sys.modules[model_class.__module__], "load_balancing_loss_func", None)
    if function is None or not hasattr(config.get_text_config(), "num_experts_per_tok"):
        return False
    return list(inspect.signature(function).parameters) == FORMULA


def _routers(causal_lm: PreTrainedModel) -> Iterator[tuple[nn.Module, int]]:
    """Yields the modules that make routing logits, and which of their outputs these are, as transformers records them.
    """
    recorders = {}
    for module in causal_lm.modules():
        if isinstance(module, PreTrainedModel):
            found = (getattr(type(module), "_can_record_outputs", None) or {}).get("router_logits", [])
            recorders |= {each.target_class: each.index for each in (found if isinstance(found, list) else [found])}
    for module in causal_lm.modules():
        if type(module) in recorders:
            yield module, recorders[type(module)]


class Tally(NamedTuple):
    """Sums over tokens and layers, each token as often as there are completions that see it; float64, so that counts
    are exact.

    chosen [E]: how often each expert was among a token's k. probabilities [E]: what the routers gave it. tokens [].
    """

    chosen: Tensor
    probabilities: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, logits: Tensor, weights: Tensor, k: int) -> Tally:  # [T, E], [T]
        probabilities = logits.detach().float().softmax(-1)
        chosen = torch.zeros_like(probabilities).scatter_(1, probabilities.topk(k, dim=-1).indices, 1.0)
        both = ((each * weights[:, None]).sum(0, dtype=torch.float64) for each in (chosen, probabilities))
        return cls(*both, weights.sum(dtype=torch.float64))

    @classmethod
    def total(cls, tallies: Sequence[Tally]) -> Tally:
        return cls(*(torch.stack(column).sum(0) for column in zip(*tallies, strict=True)))


class RouterBalance:
    """Watches a model's routers: counts where they send tokens, and adds the auxiliary loss's gradient to their logits.

    module: takes batches, as LogProbModel and RewardModel do, and holds `causal_lm`. coefficient: what the loss counts.
    """

    def __init__(self, module: nn.Module, coefficient: float):
        self.coefficient = coefficient
        causal_lm = module.causal_lm
        self._k = causal_lm.config.get_text_config().num_experts_per_tok
        self._weights: Tensor | None = None  # [T] of the batch that goes through the model
        self._counts: bool | None = None  # forwards with gradients, those without, None
        self._tallies: list[Tally] = []
        self._pull: Tensor | None = None  # [E]: the loss's slope by a token's probabilities
        self._slope: Tensor | None = None  # what a backward under way began with
        module.register_forward_pre_hook(self._take_batch, with_kwargs=True)
        for router, index in _routers(causal_lm):
            router.register_forward_hook(torch.compiler.disable(partial(self._watch, index)))

    @contextlib.contextmanager
    def counting(self, with_gradients: bool) -> Iterator[list[Tally]]:
        """Opens a time in which forwards of this kind are counted, a tally a layer: neither those of a reference that
        is the policy without adapters, nor the recomputation of layers in backward.
        """
        self._counts, self._tallies = with_gradients, []
        try:
            yield self._tallies
        finally:
            self._counts = None

    def minimised(self, loss: Tensor, load: Tensor, tokens: Tensor) -> Tensor:
        """Returns the loss, whose backward also adds coefficient times the auxiliary loss's gradient.

        load: f [E] of the global batch; tokens []: of the global batch, over all layers.
        """
        self._pull = (self.coefficient * len(load) / tokens * load).float()
        return _Loss.apply(loss, self)

    def _take_batch(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        batch = args[0] if args else kwargs.get("batch")
        if batch is None:
            self._weights = None
            return
        seen = sight(batch) if batch.part is None else batch.part.of_row(sight(batch))
        self._weights = seen.to(batch.input_ids.device, non_blocking=True)

    def _watch(self, index: int, router: nn.Module, args: tuple, outputs: Any) -> Any:
        if self._weights is None:
            return None
        logits = outputs[index]
        if self._counts is torch.is_grad_enabled():
            self._tallies.append(Tally.of(logits, self._weights, self._k))
        if not (torch.is_grad_enabled() and logits.requires_grad):
            return None
        carriers = (i for i, out in enumerate(outputs) if i != index and isinstance(out, Tensor) and out.requires_grad)
        carrier = next(carriers)  # the scores, by which experts' outputs are weighted
        pulled = _Pulled.apply(outputs[carrier], logits, self._weights, self)
        return *outputs[:carrier], pulled, *outputs[carrier + 1 :]


def sight(batch: Batch) -> Tensor:  # [rows * length] float32
    """Returns for every token how many completions see it, 0 for padding: so both layouts tell the same."""
    if batch.segments is None:
        return batch.attention_mask.flatten().float() * bool(batch.group_sizes)
    seen = torch.zeros(batch.input_ids.shape[1])
    for segment in batch.segments:
        seen[segment.start : segment.end] = 1.0
        seen[segment.start : segment.start + segment.prompt] = len(segment.completions)
    return seen


class _Pulled(torch.autograd.Function):
    """Passes an output of a router on, and adds the auxiliary loss's gradient to the logits that it was made of."""

    @staticmethod
    def forward(ctx, output: Tensor, logits: Tensor, weights: Tensor, balance: RouterBalance) -> Tensor:
        ctx.balance = balance
        ctx.save_for_backward(logits, weights)
        return output.view_as(output)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (logits, weights), pull = ctx.saved_tensors, ctx.balance._pull
        if pull is None:
            return grad, None, None, None
        probabilities = logits.float().softmax(-1)
        slopes = probabilities * (pull - (probabilities @ pull)[:, None])
        slopes = slopes * weights[:, None] * ctx.balance._slope
        return grad, slopes.to(logits.dtype), None, None


class _Loss(torch.autograd.Function):
    """Passes the loss on; in backward, which begins here, it keeps what the loss is multiplied with."""

    @staticmethod
    def forward(ctx, loss: Tensor, balance: RouterBalance) -> Tensor:
        ctx.balance = balance
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.balance._slope = grad
        return grad, None
