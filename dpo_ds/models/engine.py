"""DeepSpeed behind two small classes; the only module that calls deepspeed.initialize."""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import deepspeed
import deepspeed.ops
import deepspeed.utils.nvtx
import torch
from deepspeed.runtime.comm.coalesced_collectives import reduce_scatter_coalesced
from deepspeed.runtime.zero import partition_parameters, stage3
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor
from transformers import PreTrainedModel

from dpo_ds.batch import Batch
from dpo_ds.cluster import collectives
from dpo_ds.cluster.foreign import SHOWN_BY, refusing
from dpo_ds.config import ModelSection
from dpo_ds.errors import ConfigError, ModelError
from dpo_ds.logprobs import TokenStatistics
from dpo_ds.models.causal_lm import LogProbModel, freeze_beside_text
from dpo_ds.models.layers.units import make_units
from dpo_ds.models.loading import load_causal_lm

deepspeed.utils.nvtx.enable_nvtx = False  # ranges for Nsight alone, around each of a thousand calls a step
# DeepSpeed describes each parameter that it fetches or frees, in text that it shows only where its source is changed.
partition_parameters.print_rank_0 = partition_parameters.debug_param2name_id_shape_device = lambda *_, **__: None


def _reduced(gradients: list[Tensor], group: Any = None) -> list[Tensor]:
    """Returns a single rank's gradients, flat: DeepSpeed 0.19.8 would copy them twice and divide them by one."""
    if collectives.world_size() == 1:
        return [gradient.view(-1) for gradient in gradients]
    return reduce_scatter_coalesced(gradients, group)


stage3.reduce_scatter_coalesced = _reduced


class LoadedModel(Protocol):
    """Offers what layouts, checks, references and evaluations ask of a model, however its weights are kept.

    engine: called like the module itself. padded_attention: the implementation that the model came with.
    """

    engine: Any
    device: torch.device
    padded_attention: str

    @property
    def causal_lm(self) -> PreTrainedModel: ...

    def token_logps(self, batch: Batch) -> Tensor:  # [N] float32
        """Returns the log-prob of every target."""

    def evaluating(self) -> contextlib.AbstractContextManager:
        """Opens a time of forwards without gradients, in evaluation mode."""


class Policy:
    """The model being trained: log-probs forward, gradients backward, AdamW under ZeRO-3."""

    def __init__(self, model: LogProbModel, ds_config: dict, device: torch.device):
        kept = freeze_beside_text(model.causal_lm)
        if kept and collectives.rank() == 0:
            what = f"{', '.join(kept)} stay as they are; the text model alone is trained"
            print(f"dpo-ds: {type(model.causal_lm).__name__}: {what}", flush=True)
        groups = parameter_groups(model, ds_config["optimizer"]["params"]["weight_decay"])
        self.padded_attention = model.causal_lm.config._attn_implementation
        self.engine = _initialize(model, ds_config, model_parameters=groups)
        self.engine.train()  # models are loaded in evaluation mode, in which they do not checkpoint activations
        self.device = device
        self.has_run_backward = False

    @property
    def causal_lm(self):
        return self.engine.module.causal_lm

    def token_logps(self, batch: Batch) -> Tensor:  # [N] float32
        return self.engine(batch.to(self.device))

    def token_statistics(self, batch: Batch) -> TokenStatistics:
        """Token log-probs with what else one pass over the vocabulary tells."""
        return TokenStatistics(*self.engine(batch.to(self.device), with_statistics=True))

    def scores(self, batch: Batch) -> Tensor:  # [completions] float32
        """Returns the completions' scores by a RewardModel."""
        return self.engine(batch.to(self.device))

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Adds the gradient; `is_last` says that an update follows. Gradients are averaged over ranks."""
        self.engine.set_gradient_accumulation_boundary(is_last)
        self.engine.backward(loss, scale_wrt_gas=False)
        if not self.has_run_backward:
            self._check_gradients()
        self.has_run_backward = True

    def _check_gradients(self) -> None:
        """Raises ModelError where DeepSpeed has not taken a gradient that autograd gave: it would be lost."""
        left = [name for name, parameter in self.causal_lm.named_parameters() if parameter.grad is not None]
        if left:
            raise ModelError(
                f"{type(self.causal_lm).__name__}: DeepSpeed does not see the gradients of {len(left)} parameters, the "
                f"first {left[0]}: it does not know how this model's layers call each other"
            )

    def step(self, learning_rate: float) -> float:
        """One clipped AdamW update; returns the gradient norm before clipping."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    @contextlib.contextmanager
    def evaluating(self):
        """No gradients, evaluation mode; within another one it ends nothing."""
        was_training = self.engine.training
        self.engine.eval()
        with torch.no_grad(), contextlib.nullcontext() if self.has_run_backward else _leaving_no_trace(self.engine):
            yield
        self.engine.train(was_training)


class FrozenModel:
    """An inference-only ZeRO-3 engine: partitioned weights, no optimizer, no gradients."""

    def __init__(self, model: LogProbModel, ds_config: dict, device: torch.device):
        model.requires_grad_(False)
        self.padded_attention = model.causal_lm.config._attn_implementation
        self.engine = _initialize(model.eval(), ds_config)
        self.device = device

    @property
    def causal_lm(self):
        return self.engine.module.causal_lm

    @torch.no_grad()
    def token_logps(self, batch: Batch) -> Tensor:  # [N] float32
        return self.engine(batch.to(self.device))

    def evaluating(self):
        return contextlib.nullcontext()

    def slices(self) -> dict[str, Tensor]:
        """This rank's ZeRO-3 slice of every parameter, not copied: flat, ceil(numel / ranks) elements, padded."""
        return {name: parameter.ds_tensor for name, parameter in self.engine.module.named_parameters()}

    @torch.no_grad()
    def move_towards(self, policy: Policy, alpha: float) -> None:
        """weights <- alpha policy + (1 - alpha) weights, each rank on its own slices: nothing is gathered."""
        other = {name: parameter.ds_tensor for name, parameter in policy.engine.module.named_parameters()}
        self.set_slices({name: own.lerp(other[name].to(own), alpha) for name, own in self.slices().items()})

    @torch.no_grad()
    def set_slices(self, slices: dict[str, Tensor]) -> None:
        for name, parameter in self.engine.module.named_parameters():
            if parameter.ds_status == ZeroParamStatus.AVAILABLE:  # small ones stay gathered until told otherwise
                parameter.partition(has_been_updated=False)
            parameter.ds_tensor.copy_(slices[name])


class Replica:
    """A whole, frozen model on this rank alone: no engine, no collective."""

    def __init__(self, model: LogProbModel, device: torch.device):
        self.padded_attention = model.causal_lm.config._attn_implementation
        self.engine = model.requires_grad_(False).eval().to(device)
        self.device = device

    @property
    def causal_lm(self):
        return self.engine.causal_lm

    @torch.no_grad()
    def token_logps(self, batch: Batch) -> Tensor:  # [N] float32
        return self.engine(batch.to(self.device))

    def evaluating(self):
        return contextlib.nullcontext()

    @torch.no_grad()
    def follow(self, policy: Policy) -> None:
        """weights <- the policy's, gathered one parameter at a time. All ranks enter."""
        own = dict(self.causal_lm.named_parameters())
        for name, parameter in policy.causal_lm.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter]):
                own[name].copy_(parameter)


def load_frozen(section: ModelSection, ds_config: dict | None, device: torch.device) -> FrozenModel | Replica:
    """Loads a model that only answers: its weights over the ranks by `ds_config`, or, with None, whole on each of them,
    in bf16 on a GPU that has it. All ranks enter.
    """
    if ds_config is not None:
        return FrozenModel(LogProbModel(load_causal_lm(section, ds_config)), ds_config, device)
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return Replica(LogProbModel(load_causal_lm(section, {"bf16": {"enabled": bf16}})), device)


def free(model: FrozenModel | Replica) -> None:
    """Frees the memory of a model that nobody needs any more.

    Dropping the last reference is not enough: an lru_cache in DeepSpeed 0.19.8 (on
    PartitionedParameterCoordinator.__params_to_release) holds the coordinator, and with it the module, for ever.
    """
    if isinstance(model, FrozenModel):
        model.engine.destroy()
    for parameter in model.causal_lm.parameters():
        for held in (parameter, getattr(parameter, "ds_tensor", parameter)):
            held.data = held.new_empty(0)
    gc.collect()  # modules hold each other
    if model.device.type == "cuda":
        torch.cuda.empty_cache()


@contextlib.contextmanager
def _leaving_no_trace(engine):
    """For forwards before the first backward. From the first complete trace it sees, DeepSpeed 0.19.8 settles for good
    (an lru_cache on __params_to_release) which parameters stay gathered from forward to backward; if that is a trace of
    forwards alone, none do, and every later step gathers every parameter twice.
    """
    coordinator = engine.optimizer.parameter_offload.get_param_coordinator()

    def forget(*_) -> None:
        if not coordinator.is_invalid_trace():
            coordinator._invalidate_trace()

    hook = engine.module.register_forward_hook(forget)
    try:
        yield
    finally:
        hook.remove()


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay on matrices only; biases and norms go without."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) > 1]
    vectors = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _initialize(model: LogProbModel, ds_config: dict, **kwargs):
    refusal = make_units(model.causal_lm, ds_config["zero_optimization"])
    if refusal and collectives.rank() == 0:
        print(f"dpo-ds: {type(model.causal_lm).__name__}: each module fetched alone, slower: {refusal}", flush=True)
    with refusing(lambda what: ConfigError(f"DeepSpeed refuses deepspeed.config or the model: {what}{SHOWN_BY}")):
        engine = deepspeed.initialize(model=model, config=ds_config, **kwargs)[0]
    engine.module.modules = partial(iter, tuple(engine.module.modules()))  # it walks through them in every forward
    return engine


def own_slice(slices: Sequence[Tensor], numel: int) -> Tensor:
    """This rank's part of a flattened tensor that the saving ranks held in ZeRO-3's slices, one in each `extra`.

    Args:
        slices: [ceil(numel / saving ranks)] each, the last one padded.
    Returns:
        [ceil(numel / ranks)], a copy, padded with zeros.
    """
    length = math.ceil(numel / collectives.world_size())
    own = slices[0].new_zeros(length)
    part = torch.cat(list(slices))[:numel][collectives.rank() * length :][:length]
    own[: len(part)] = part
    return own
