"""What an iteration of `dpo-ds rl` computes, reads and sends in each phase: from shapes and the config alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dpo_ds.commands.plan.forecast import Phase, Step, numel, pass_of
from dpo_ds.config import RlConfig, critic_section
from dpo_ds.config.deepspeed import is_bf16
from dpo_ds.data.batching import Lengths
from dpo_ds.losses import make_loss
from dpo_ds.memory.drawing import cached_numbers, critic_shape, judge_shape
from dpo_ds.memory.trace import build
from dpo_ds.models.scoring import REWARD_BATCH
from dpo_ds.training.mfu import ModelFlops


def iteration_of(
    run: RlConfig, filled: dict, gpus: int, model_config, reference_config, lengths: tuple[int, int] | None
) -> Step:
    """Counts an iteration on prompts and completions of these lengths (in tokens), the longest if none are given.
    filled: the policy's DeepSpeed config.
    """
    width = 2 if is_bf16(filled) else 4
    policy, critic, judge, reference = _Model.of(run, model_config, width, True), None, None, None
    if (config := critic_shape(run, model_config)) is not None:
        whole = run.model_copy(update={"model": critic_section(run)})
        critic = _Model.of(whole, config, width, True, is_classifier=True)
    if (config := judge_shape(run)) is not None:
        judge = _Model.of(run, config, width, False, is_classifier=True)
    if run.reference.kind != "none":
        is_policy = run.reference.kind == "adapter"
        reference = policy if is_policy else _Model.of(run, reference_config, width, False)
    prompt, completion = lengths or (run.data.max_prompt_length, run.rl.max_new_tokens)
    cached = width * cached_numbers(model_config)
    return _Iteration(run, gpus, prompt, completion, policy, reference, critic, judge, cached).step()


@dataclass(frozen=True)
class _Model:
    """flops: of its passes. weights: bytes of all; trained: of those whose gradients are exchanged."""

    flops: ModelFlops
    weights: int
    trained: int

    @classmethod
    def of(cls, run: RlConfig, config, width: int, is_trained: bool, is_classifier: bool = False) -> _Model:
        how = pass_of(run, is_trained, is_classifier)
        model = build(config, how)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return cls(ModelFlops.of(model), width * numel(model, how), width * trained)


@dataclass(frozen=True)
class _Iteration:
    """prompt, completion: tokens. cached: bytes that the cache of keys and values keeps of a token."""

    run: RlConfig
    gpus: int
    prompt: int
    completion: int
    policy: _Model
    reference: _Model | None
    critic: _Model | None
    judge: _Model | None
    cached: int

    def step(self) -> Step:
        phases = {"generation": self._generation()}
        if self.judge is not None:
            phases["scoring"] = self._scoring(self.judge)
        phases |= {"measuring": self._measuring(), "update": self._update()}
        tokens = self._prompts * (self.prompt + self.run.rl.n * self.completion)
        return Step(phases, tokens, self.run.rl.epochs * self._micro_batches)

    @property
    def _prompts(self) -> int:
        return self.run.train.global_batch_size

    @property
    def _elsewhere(self) -> float:
        """Returns the share of all weights that other GPUs have."""
        return (self.gpus - 1) / self.gpus

    @property
    def _share(self) -> int:
        """Returns the prompts of a minibatch."""
        return math.ceil(self._prompts / self.run.rl.minibatches)

    @property
    def _micro_batches(self) -> int:
        """Returns those of a pass of one GPU over its part of what was drawn."""
        in_one = max(1, self.run.train.micro_batch_tokens // (self.prompt + self.run.rl.n * self.completion))
        return self.run.rl.minibatches * math.ceil(self._share / in_one / self.gpus)

    def _group(self, completions: int, length: int) -> tuple[Lengths, int]:
        """Returns a prompt with completions of that many tokens, and how many tokens those are together."""
        return Lengths(np.array([self.prompt]), np.array([[length] * completions])), completions * length

    def _generation(self) -> Phase:
        """Counts what training/rl/rollouts.py deals out. The prompts of a batch go through the model together, then its
        completions, a token of each at a time; every time all weights are read, and all keys and values until then.
        """
        n, size, length = self.run.rl.n, self.run.rl.batch_size, self.completion
        together = min(max(1, size // n), self._prompts)  # prompts of a shard
        rounds = math.ceil(math.ceil(self._prompts / together) / self.gpus)  # shards of the GPU that has most
        forwards = rounds * math.ceil(together * n / size) * length
        kept = rounds * together * n * (length * self.prompt + length * (length - 1) // 2)  # tokens, of all forwards
        group, tokens = self._group(n, length - 1)  # the last token that is drawn goes nowhere
        flops = self.policy.flops.forward(group, 1 + tokens)
        fetched = 1 if self.run.rl.replica else forwards  # times that the weights come from other GPUs
        return Phase(
            flops * self._prompts,
            flops * min(self._prompts, rounds * together),
            fetched * self.policy.weights * self._elsewhere,
            forwards * self.policy.weights + kept * self.cached,
        )

    def _scoring(self, judge: _Model) -> Phase:
        """Counts the reward model's forwards: prompt and completion are one text to it."""
        text = Lengths(np.array([self.prompt + self.completion]), np.array([[0]]))
        most = math.ceil(self._prompts / self.gpus) * self.run.rl.n
        flops = judge.flops.forward(text, 0)
        received = math.ceil(most / REWARD_BATCH) * judge.weights * self._elsewhere
        return Phase(flops * self._prompts * self.run.rl.n, flops * most, received)

    def _measuring(self) -> Phase:
        group, targets = self._group(self.run.rl.n, self.completion)
        models = [model for model in (self.policy, self.reference, self.critic) if model is not None]
        flops = sum(model.flops.forward(group, targets) for model in models)
        return self._phase(flops, sum(model.weights for model in models), 1)

    def _update(self) -> Phase:
        is_of_pairs = self.run.rl.algorithm == "online_dpo"  # a prompt's best and worst completion
        group, targets = self._group(2 if is_of_pairs else self.run.rl.n, self.completion)
        models: Sequence[_Model] = [model for model in (self.policy, self.critic) if model is not None]
        flops = sum(model.flops.with_backward(group, targets) for model in models)
        sent = sum(2 * model.weights + model.trained for model in models)
        if is_of_pairs and self.reference is not None and make_loss(self.run.loss).needs_reference:
            flops, sent = flops + self.reference.flops.forward(group, targets), sent + self.reference.weights
        return self._phase(flops, sent, self.run.rl.epochs)

    def _phase(self, flops: float, sent: int, passes: int) -> Phase:
        """flops: of a prompt's group; sent: bytes that the GPUs gather and reduce for a micro-batch."""
        most = self.run.rl.minibatches * math.ceil(self._share / self.gpus)  # groups of a GPU
        received = passes * self._micro_batches * sent * self._elsewhere
        return Phase(passes * flops * self._prompts, passes * flops * most, received)
