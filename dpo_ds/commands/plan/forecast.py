"""What a step of a training run computes and sends, and how many steps there are: from shapes and the config alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from dpo_ds.batch import Segment
from dpo_ds.config import SftConfig, TrainConfig
from dpo_ds.config.deepspeed import is_bf16
from dpo_ds.data.batching import Lengths
from dpo_ds.data.sources import Files, HuggingFace, open_source
from dpo_ds.errors import DataError
from dpo_ds.losses import make_loss
from dpo_ds.memory.trace import Pass, build, parameters_of
from dpo_ds.training.mfu import ModelFlops
from dpo_ds.training.schedule import total_steps


@dataclass(frozen=True)
class Step:
    """One update. flops: of all GPUs, what is computed again not counted; busiest: of the GPU that has most.
    received: bytes a GPU gets from others at most. tokens: of all GPUs, a prompt counted once. micro_batches: that a
    GPU has one after the other.
    """

    flops: float
    busiest: float
    received: int
    tokens: int
    micro_batches: int


def step_of(
    run: SftConfig, filled: dict, gpus: int, model_config, reference_config, lengths: tuple[int, int] | None
) -> Step:
    """Counts a step on comparisons of these lengths (tokens of a prompt and of a completion); where none are given, on
    the longest that the data section allows. filled: the policy's DeepSpeed config.
    """
    prompt, completion = lengths or (run.data.max_prompt_length, run.data.max_length - run.data.max_prompt_length)
    sides = 1 if _is_of_labels(run) else len(run.sides)
    comparison = Lengths(np.array([prompt]), np.array([[completion] * sides]))
    size, spread = run.train.global_batch_size, run.train.sequence_parallel
    each = int(comparison.tokens[0])
    tokens = size * each
    together = spread * run.train.micro_batch_tokens
    micro_batches = math.ceil(size / max(1, together // each) / max(1, gpus // spread))

    how = _pass(run, training=True)
    policy = build(model_config, how)
    flops = ModelFlops.of(policy).with_backward(comparison, completion * sides)
    weights = _numel(policy, how)
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    passes, gathered = 2, 2 * weights  # forward and backward
    kind = run.reference.kind if isinstance(run, TrainConfig) else "none"
    if kind in ("live", "adapter"):
        how = how if kind == "adapter" else _pass(run, training=False)
        reference = policy if kind == "adapter" else build(reference_config, how)
        flops += ModelFlops.of(reference).forward(comparison, completion * sides)
        passes, gathered = passes + 1, gathered + _numel(reference, how)
    width = 2 if is_bf16(filled) else 4
    received = width * (gathered + trained) * micro_batches * (gpus - 1) / gpus
    if spread > 1:
        passes += run.train.activations != "none"  # the forward that is computed again trades again
        received += width * passes * _traded(model_config.get_text_config(), spread) * tokens / gpus
    busiest = flops * math.ceil(size / max(1, gpus // spread)) / spread
    return Step(flops * size, busiest, int(received), tokens, micro_batches)


def steps_of(run: SftConfig) -> tuple[int | None, str]:
    """Returns the updates of the whole run, and what they were counted from; None, and why not, where the rows are not
    on this machine.

    Raises:
        DataError: a file that cannot be read.
    """
    if run.train.max_steps is not None:
        return run.train.max_steps, "train.max_steps"
    items = [run.data.train] if isinstance(run.data.train, str) else run.data.train
    sources, start = [], 0
    for item in items:
        path, weight = (item, 1.0) if isinstance(item, str) else (item["path"], item["weight"])
        if not _is_here(path):
            return None, f"data.train {path} is not on this machine; give --train.max_steps"
        left = math.inf if run.data.limit is None else run.data.limit - start
        rows = min(_rows(open_source(path)), left)
        sources.append((start, start + int(rows), weight))
        start += int(rows)
    steps = total_steps(sources, run.train)
    times = f"{run.train.epochs:g} times" if run.train.epochs != 1 else "once"
    return steps, f"{start:,} rows of data.train {times}, {run.train.global_batch_size} an update"


def _is_here(path: str) -> bool:
    return any(Path(name).expanduser().exists() for name in (path, path.rpartition(":")[0] or path))


def _rows(source: Files | HuggingFace) -> int:
    """Counts rows as they stand in the files, good and bad."""
    if isinstance(source, HuggingFace):
        return len(source.data)
    return sum(_rows_of_file(path) for path in source.paths)


def _rows_of_file(path: Path) -> int:
    if path.suffix != ".parquet":
        return sum(1 for _ in Files((path,)).rows())
    try:
        return pq.read_metadata(path).num_rows
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise DataError(f"{path}: broken Parquet file; copy or download it again") from error


def _pass(run: SftConfig, training: bool) -> Pass:
    """Describes the policy, its adapters included, or a live reference."""
    one, is_reward = (Segment(0, 1, (1,)),), run.is_classifier
    how = {"lora": run.model.lora, "quantized": run.model.quantize is not None} if training else {}
    return Pass(one, 1, torch.bfloat16, training=training, is_reward=is_reward, **how)


def _numel(model, how: Pass) -> int:
    return sum(parameter.numel for parameter in parameters_of(model, how))


def _is_of_labels(run: SftConfig) -> bool:
    return isinstance(run, TrainConfig) and make_loss(run.loss).of_labels


def _traded(text_config, ranks: int) -> float:
    """Numbers that a token of a rank costs in all layers when `ranks` trade heads for tokens and back: its queries and
    output, and keys and values, which are repeated where there are fewer than ranks; 1 / ranks of them stay.
    """
    heads = text_config.num_attention_heads
    width = getattr(text_config, "head_dim", None) or text_config.hidden_size // heads
    key_heads = max(getattr(text_config, "num_key_value_heads", None) or heads, ranks)
    return text_config.num_hidden_layers * 2 * width * (heads + key_heads) * (ranks - 1) / ranks
