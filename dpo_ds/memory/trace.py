"""Traces what a forward and backward hold at most, from shapes alone: the model's own code runs without data.

The passes are those of one rank without DeepSpeed, weights not counted: activations, gradients until they are reduced,
and what operators need in between. Attention kernels and the head are stand-ins that allocate as the real ones do.
"""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from dpo_ds.batch import Segment
from dpo_ds.cluster.foreign import SHOWN_BY, refusing
from dpo_ds.config import LoraSection
from dpo_ds.errors import ModelError
from dpo_ds.logprobs.chunked import PADDING, TILES
from dpo_ds.logprobs.head import install_head
from dpo_ds.memory.mixtures import EvenRouting
from dpo_ds.models import lora
from dpo_ds.models.attention import PACKED_ATTENTION
from dpo_ds.models.causal_lm import decoder_of
from dpo_ds.models.layers.activations import Parked, save_activation_memory
from dpo_ds.models.layers.quantized import layers_to_quantize
from dpo_ds.models.layers.units import decoder_layers, with_gradients_at_the_input
from dpo_ds.models.loading import switch_dropout_off
from dpo_ds.models.packed.segments import forget_tables, is_merged, segment_table

FLASH = "dpo_ds_shapes_only"  # transformers looks for a kernel where a name says flash


@dataclass(frozen=True)
class Pass:
    """How a model is run: on `device` "cuda" or "cpu" in `dtype`, on one packed row of `segments` of which `targets`
    rows are scored by the head, or, with is_reward, one row a completion by a classifier's.

    activations: what layers keep for backward, none (all), selective, checkpoint or offload. bucket: elements of
    DeepSpeed's reduce bucket, communication its dtype; ranks that a gradient is cut for. units: whether decoder layers
    are ZeRO-3's leaves, whose gradients are all there before the first is taken. quantized: layers' weights lie in 4
    bits each.
    """

    segments: tuple[Segment, ...]
    targets: int
    dtype: torch.dtype
    device: str = "cuda"
    training: bool = True
    activations: str = "none"
    is_reward: bool = False
    lora: LoraSection = LoraSection()
    quantized: bool = False
    bucket: int = 1
    communication: torch.dtype = torch.float32
    ranks: int = 1
    units: bool = True

    @property
    def tokens(self) -> int:
        return self.segments[-1].end


@dataclass(frozen=True)
class Parameter:
    """One of the model's. layer: the number of its decoder layer, where it is in one and they are units; packed: the
    weights of 4 bits that its `numel` numbers hold, 0 where each is a number.
    """

    numel: int
    is_trained: bool
    is_matrix: bool
    layer: int | None = None
    packed: int = 0


def parameters(config, run: Pass) -> list[Parameter]:
    return parameters_of(build(config, run), run)


def parameters_of(model: PreTrainedModel, run: Pass) -> list[Parameter]:
    """The model's parameters in the order of `named_parameters`, each tied one once."""
    layers = {p: number for number, layer in enumerate(_units(model, run)) for p in layer.parameters()}
    packed = {layer.weight for layer in layers_to_quantize(model).values()} if run.quantized else set()
    found = []
    for p in model.parameters():
        weights = p.numel() if p in packed else 0
        numel = math.ceil(weights / (2 * p.itemsize)) if weights else p.numel()
        found.append(Parameter(numel, p.requires_grad, p.dim() > 1, layers.get(p), weights))
    return found


def peaks(config, run: Pass) -> dict[str, int]:
    """Bytes at most, by phase; "saved" is what backward begins with.

    From the second layer on, each adds the same bytes to a phase, so two and three layers tell all.

    Raises:
        ModelError: code of the model's that needs values, or layers that cannot be computed again.
    """
    layers = config.get_text_config().num_hidden_layers
    with refusing(lambda what: untraceable(config, what)):
        two, three = (_traced(_cut(config, depth), run) for depth in (2, 3))
    return {phase: two[phase] + (layers - 2) * (three[phase] - two[phase]) for phase in two}


def untraceable(config, what: str) -> ModelError:
    """what: stopped it, in a line."""
    problem = "what it takes cannot be told beforehand, since its code does not run on shapes alone"
    return ModelError(f"{config.name_or_path or config.model_type}: {problem}: {what}{SHOWN_BY}")


def _traced(config, run: Pass) -> dict[str, int]:
    model = build(config, run)
    fake = FakeTensorMode(allow_non_fake_inputs=True)  # the parameters come as meta tensors
    with _shapes_only(), fake, EvenRouting(config.get_text_config(), run.tokens):
        model.to_empty(device="cpu")
        meter = PeakMemory([*model.parameters(), *model.buffers()])
        if run.training:
            reducer = _Reducer(run)
            delayed = {p for layer in _units(model, run) for p in layer.parameters()}
            for parameter in model.parameters():
                if parameter.requires_grad and parameter not in delayed:
                    parameter.register_post_accumulate_grad_hook(reducer)
            for layer in _units(model, run):
                layer.register_forward_pre_hook(with_gradients_at_the_input, with_kwargs=True)
                layer.register_full_backward_hook(reducer.take_layer)
        ids = torch.zeros(1, run.tokens, dtype=torch.int64)
        rows = torch.zeros(run.targets, dtype=torch.int64)
        with meter, torch.set_grad_enabled(run.training):
            table = segment_table(run.segments)
            hidden = decoder_of(model)(
                input_ids=ids, position_ids=ids, attention_mask=None, use_cache=False, segments=table
            ).last_hidden_state
            if run.training:
                hidden.register_hook(lambda _: meter.begin("layers"))
            picked = hidden.flatten(0, 1)[rows]
            saved = meter.live
            if run.is_reward:
                scores = model.score(picked.float())
            else:
                head = install_head(model)
                scores = _Head.apply(picked, head.weight, head.bias, head.softcap, run)
            del picked
            if not run.training:
                return {"forward": meter.peaks["forward"]}
            meter.begin("head")
            loss = scores.sum()
            del scores, hidden
            loss.backward()
        return {"saved": saved, **meter.peaks}


class PeakMemory(TorchDispatchMode):
    """Bytes of the storages that operators made and that are alive; `peaks` has the most in each phase."""

    def __init__(self, uncounted: Sequence[Tensor]):
        super().__init__()
        self.live = 0
        self.peaks = {"forward": 0}
        self._phase = "forward"
        self._alive: dict[int, weakref.ref] = {}
        for tensor in uncounted:
            self._enter(tensor.untyped_storage(), 0)

    def begin(self, phase: str) -> None:
        self._phase = phase
        self.peaks[phase] = max(self.live, self.peaks.get(phase, 0))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._enter(storage, storage.nbytes())
        self.peaks[self._phase] = max(self.live, self.peaks[self._phase])
        return result

    def _enter(self, storage, size: int) -> None:
        key = storage._cdata
        if key in self._alive:
            return

        def leave(_) -> None:
            del self._alive[key]
            self.live -= size

        self._alive[key] = weakref.ref(storage, leave)
        self.live += size


class _Elsewhere(Parked):
    """A layer's input that waits where it is not counted."""

    def _stay(self, hidden: Tensor) -> tuple[torch.Size, torch.dtype]:
        return hidden.shape, hidden.dtype

    def fetch(self) -> None:
        if self._back is None:
            shape, dtype = self._host
            self._back = torch.empty(shape, dtype=dtype)


class _Reducer:
    """Gradients as DeepSpeed's stage 3 takes them: copied into its bucket and freed, those larger than it kept until
    the next flush, which lays all of them out once more."""

    def __init__(self, run: Pass):
        self._run = run
        self._elements, self._count = 0, 0
        self._larger: list[Tensor] = []

    def __call__(self, parameter: torch.nn.Parameter) -> None:
        size, bucket = parameter.numel(), self._run.bucket
        if self._elements and self._elements + size > bucket:
            self._flush()
        if self._elements + size > bucket:
            self._larger.append(parameter.grad)
        self._elements += size
        self._count += 1
        parameter.grad = None

    def take_layer(self, layer: torch.nn.Module, *_) -> None:
        for parameter in layer.parameters():
            if parameter.grad is not None:
                self(parameter)

    def _flush(self) -> None:
        run = self._run
        converted = [gradient.to(run.communication) for gradient in self._larger]
        if self._count > 1 or self._elements % run.ranks:
            torch.empty(self._elements, dtype=run.communication)
        del converted
        self._larger, self._elements, self._count = [], 0, 0


class _Head(torch.autograd.Function):
    """The memory of logprobs.chunked.RecomputedLogps with ChunkedKernel on a CPU, with triton's on CUDA."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, softcap, run):
        N, V = len(hidden_ND), len(weight_VD)
        tiles = TILES["cpu" if run.device == "cpu" else "triton"]
        keeps = any(ctx.needs_input_grad) and softcap is None
        kept = []
        if run.device == "cpu":
            rows = math.ceil(N / tiles.fold_rows) * tiles.fold_rows
            keeps = keeps and N * V * 4 <= tiles.kept_bytes
            logits = torch.empty(rows if keeps else tiles.fold_rows, V if keeps else tiles.columns(4))
            kept = [logits] * keeps
        elif keeps and hidden_ND.dtype == torch.bfloat16 and (C := tiles.kept_columns(N, V)):
            kept = [_padded_tile(N, C, torch.bfloat16), torch.empty(N, math.ceil(C / PADDING))]
        logps_N, lse_N = torch.empty(N), torch.empty(N)
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, lse_N, *kept)
        ctx.tiles, ctx.run = tiles, run
        return logps_N

    @staticmethod
    def backward(ctx, grad_N):
        hidden_ND, weight_VD, bias_V, _, *kept = ctx.saved_tensors
        (N, D), V, dtype = hidden_ND.shape, len(weight_VD), hidden_ND.dtype
        B = min(ctx.tiles.gradient_rows, N)
        d_hidden = torch.empty(N, D)
        d_weight = torch.empty_like(weight_VD) if ctx.needs_input_grad[1] else None
        # One tile: its logits' gradient, where nothing kept turns into it, and float32 sums of a 16-bit weight's
        # gradient, where the matmul does not hold them all.
        if ctx.run.device == "cpu":
            C = min(ctx.tiles.columns(4), V)
            tile = [torch.empty(B, C)]
            if d_weight is not None and dtype != torch.float32:
                tile += [torch.empty(C, D)]
            if dtype != torch.float32:  # and the factors as the matmul takes them
                tile += [torch.empty(C, D), torch.empty(B, D)]
        else:
            C = min(ctx.tiles.kernel_columns(N, dtype.itemsize), V)
            tile = kept or [_padded_tile(B, C, dtype)]
            if d_weight is not None and dtype != torch.float32 and B < N:
                tile += [torch.empty(C, D)]
        del tile
        d_bias = torch.empty_like(bias_V) if ctx.needs_input_grad[2] else None
        return d_hidden.to(dtype), d_weight, d_bias, None, None


def _padded_tile(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(rows, math.ceil(columns / PADDING) * PADDING, dtype=dtype)


def _results(query: Tensor) -> tuple[Tensor, Tensor]:
    """Returns attention's result [T, H, D] and log-sums [H, T], without numbers."""
    return torch.empty_like(query), query.new_empty(query.shape[1], len(query), dtype=torch.float32)


_attention = torch.library.custom_op("dpo_ds::attention_of_shapes", _results, mutates_args=())
_attention.register_fake(_results)  # one operator, which layers/selective knows by its name


class _FlashAttention(torch.autograd.Function):
    """The memory of models/packed/varlen.py: query [T, H, D], key and value [T, G, D] -> [T, H, D]."""

    @staticmethod
    def forward(ctx, query, key, value, segments):
        copies = [_rows(x, _copied_keys(segments)) for x in (key, value)]
        output, log_sums = _attention(query)
        del copies
        merged = [segment for segment in segments if is_merged(segment)]
        if merged:
            others = sum(sum(segment.completions[1:]) for segment in merged)
            part = [_rows(query, others) for _ in range(2)]  # queries, results
            part += [_rows(x, sum(segment.prompt for segment in merged)) for x in (key, value)]
            whole = [part[0].new_empty(part[0].shape, dtype=torch.float32) for _ in range(2)]
            del part, whole
        ctx.save_for_backward(query, key, value, output, log_sums)
        ctx.segments = segments
        return output

    @staticmethod
    def backward(ctx, grad):
        query, key, value, *_ = ctx.saved_tensors
        keys = _copied_keys(ctx.segments)
        copies = [_rows(x, keys) for x in (key, value)]
        by_query = [_rows(query, len(query)), torch.empty(query.shape)]  # and its float32 sums
        repeated = [_rows(query, keys or len(key)) for _ in range(2)]  # by key and value, one a query head
        by_key, by_value = (_rows(x, keys or len(x)) for x in (key, value))
        del repeated, copies, by_query[1]
        if keys:  # of the pack's rows, from those of copied keys
            by_key, by_value = (_rows(x, len(x)) for x in (key, value))
        return by_query[0], by_key, by_value, None


def _rows(x: Tensor, rows: int) -> Tensor:
    return x.new_empty(rows, *x.shape[1:])


def _copied_keys(segments: tuple[Segment, ...]) -> int:
    """Keys of the pack where some prompts are copied, else 0: then none is moved."""
    copied = sum(s.prompt * len(s.completions[1:]) for s in segments if not is_merged(s))
    return segments[-1].end + copied if copied else 0


def _flash_forward(module, query, key, value, attention_mask, segments=None, **kwargs) -> tuple[Tensor, None]:
    """As packed.varlen.varlen_attention. Windows and soft-caps, which always copy, are taken as if they did not."""
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    known = (Segment(0, len(query), ()),) if segments is None else segments.segments  # some families pass none on
    return _FlashAttention.apply(query, key, value, known)[None], None


AttentionInterface.register(FLASH, _flash_forward)
AttentionMaskInterface.register(FLASH, lambda *args, **kwargs: None)


@contextmanager
def _shapes_only() -> Iterator[None]:
    """Attention's masks are kept for the next layers; none without data may be left for others."""
    forget_tables()
    try:
        yield
    finally:
        forget_tables()


def _units(model: PreTrainedModel, run: Pass) -> list[torch.nn.Module]:
    return decoder_layers(model) if run.units else []


def build(config, run: Pass) -> PreTrainedModel:
    """Returns the model that `run` goes through, on the meta device: no weights are read or made.

    Raises:
        ModelError: none can be made of such a config.
    """
    with refusing(lambda what: untraceable(config, what)), torch.device("meta"):
        return _on_this_device(config, run)


def _on_this_device(config, run: Pass) -> PreTrainedModel:
    config = copy.deepcopy(config)
    switch_dropout_off(config)
    if run.is_reward:
        config.num_labels = 1
    auto_class = AutoModelForSequenceClassification if run.is_reward else AutoModelForCausalLM
    model = auto_class.from_config(config, dtype=run.dtype)
    model.set_attn_implementation(PACKED_ATTENTION if run.device == "cpu" else FLASH)
    if not run.training:
        return model.requires_grad_(False)
    if run.lora.r:
        lora.add_adapters(model, run.lora, 0, "SEQ_CLS" if run.is_reward else "CAUSAL_LM")
    save_activation_memory(model, run.activations, _Elsewhere if run.device == "cuda" else None)
    return model.train()


def _cut(config, layers: int):
    """The config with so many layers; lists of one entry a layer follow."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    whole = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == whole:
            setattr(text, name, (value * layers)[:layers])
    text.num_hidden_layers = layers
    return config
