"""What a step of a training run computes and sends: from shapes and the config alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from dpo_ds.batch import Segment
from dpo_ds.commands.plan.counting import Groups
from dpo_ds.config import RlConfig, SftConfig, TrainConfig
from dpo_ds.config.deepspeed import is_bf16
from dpo_ds.data.batching import Lengths
from dpo_ds.losses import make_loss
from dpo_ds.memory.cards import Card
from dpo_ds.memory.trace import Pass, build, parameters_of
from dpo_ds.training.mfu import ModelFlops


@dataclass(frozen=True)
class Phase:
    """A part of a step. flops: of all GPUs, what is computed again not counted; busiest: of the GPU that has most.
    received: bytes that a GPU gets from others at most. read: bytes that it reads from its own memory one token after
    the other, where that is what takes the time.
    """

    flops: float
    busiest: float
    received: float
    read: float = 0

    def seconds(self, card: Card, efficiency: float) -> float:
        """Returns what it takes where products reach that share of the card's peak, and reads all of its bandwidth."""
        computing = self.busiest / (card.peak * efficiency)
        return max(computing, self.read / card.bandwidth) if self.read else computing


@dataclass(frozen=True)
class Step:
    """One update, or iteration of rl. tokens: of all GPUs, a prompt counted once. micro_batches: that a GPU goes
    backward through, one after the other.
    """

    phases: dict[str, Phase]
    tokens: int
    micro_batches: int

    @property
    def flops(self) -> float:
        return sum(phase.flops for phase in self.phases.values())

    @property
    def received(self) -> int:
        return int(sum(phase.received for phase in self.phases.values()))

    def seconds(self, card: Card, efficiency: float) -> float:
        return sum(phase.seconds(card, efficiency) for phase in self.phases.values())


def step_of(
    run: SftConfig, filled: dict, gpus: int, model_config, reference_config, lengths: tuple[int, int] | None,
    groups: Groups | None = None,
) -> Step:  # fmt: skip
    """Counts a step on prompts and completions of these lengths (in tokens); where none are given, the longest that the
    data section allows. filled: the policy's DeepSpeed config. groups: what the rows make together; a step then has as
    many of the mean size as make train.global_batch_size.
    """
    found, counted = _lengths(run, lengths, groups)
    number, targets, tokens = len(found.prompt), int(found.completions.sum()), int(found.tokens.sum())
    spread = run.train.sequence_parallel
    ranks = max(1, gpus // spread)
    of_a_step = max(1.0, run.train.global_batch_size * number / counted)  # groups, which are never cut
    in_one = max(1, spread * run.train.micro_batch_tokens * number // tokens)
    micro_batches = math.ceil(of_a_step / in_one / ranks)

    how = pass_of(run, training=True)
    policy = build(model_config, how)
    flops = ModelFlops.of(policy).with_backward(found, targets)
    weights = numel(policy, how)
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    passes, gathered = 2, 2 * weights  # forward and backward
    kind = run.reference.kind if isinstance(run, TrainConfig) else "none"
    if kind in ("live", "adapter"):
        how = how if kind == "adapter" else pass_of(run, training=False)
        reference = policy if kind == "adapter" else build(reference_config, how)
        flops += ModelFlops.of(reference).forward(found, targets)
        passes, gathered = passes + 1, gathered + numel(reference, how)
    width = 2 if is_bf16(filled) else 4
    received = width * (gathered + trained) * micro_batches * (gpus - 1) / gpus
    tokens *= of_a_step / number
    if spread > 1:
        passes += run.train.activations != "none"  # the forward that is computed again trades again
        received += width * passes * _traded(model_config.get_text_config(), spread) * tokens / gpus
    flops /= number
    update = Phase(flops * of_a_step, flops * math.ceil(of_a_step / ranks) / spread, received)
    return Step({"update": update}, round(tokens), micro_batches)


def _lengths(run: SftConfig, lengths: tuple[int, int] | None, groups: Groups | None) -> tuple[Lengths, int]:
    """Returns groups as a step's are, and what they count of train.global_batch_size together."""
    prompt, completion = lengths or (run.data.max_prompt_length, run.data.max_length - run.data.max_prompt_length)
    if groups is None:
        sides = 1 if _is_of_labels(run) else len(run.sides)
        return Lengths(np.array([prompt]), np.array([[completion] * sides])), 1
    is_there = np.arange(groups.completions.max()) < groups.completions[:, None]
    return Lengths(np.full(len(is_there), prompt), completion * is_there), int(groups.counts.sum())


def pass_of(run: SftConfig | RlConfig, training: bool, is_classifier: bool = False) -> Pass:
    """Describes the policy, its adapters included, or a model that is not trained."""
    one = (Segment(0, 1, (1,)),)
    how = {"lora": run.model.lora, "quantized": run.model.quantize is not None} if training else {}
    return Pass(one, 1, torch.bfloat16, training=training, is_reward=run.is_classifier or is_classifier, **how)


def numel(model, how: Pass) -> int:
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
