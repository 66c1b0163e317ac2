"""What a run minimises, as the trainer sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

from dpo_ds.batch import Batch
from dpo_ds.losses import Labelled, Loss, WeightedSum
from dpo_ds.models.engine import LoadedModel, Policy
from dpo_ds.reference import Reference


class Objective(Protocol):
    """Gives what is minimised: sums over a micro-batch, to be divided by the global batch's weight."""

    names: tuple[str, ...]  # of the sums, "loss" first

    def counts(self, data) -> np.ndarray | None:
        """Returns what each row of `data` counts of train.global_batch_size; None: 1."""

    def weight(self, batch: Batch) -> int: ...

    @property
    def needs_mismatches(self) -> bool:
        """Tells whether `begin` is to get completions behind prompts that are not theirs."""
        return False

    def begin(self, policy: Policy, micro_batches: Sequence[Batch], mismatched: Sequence[Batch] = ()) -> None:
        """Sees this rank's share of a global batch before its micro-batches come one by one. All ranks enter."""

    def __call__(self, policy: Policy, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns what to differentiate, and float64 sums of `names`."""

    def shown(self, means: dict[str, float]) -> dict[str, float]:
        """Returns what is told of means over a global batch, or over the evaluation data."""
        return means

    def after_step(self, step: int, means: dict[str, float]) -> None:
        """Update `step` is made; means of `names` over its global batch. All ranks enter."""

    def state(self) -> dict:
        """Returns what this rank's part of a checkpoint keeps of it."""
        return {}

    def load_state(self, states: Sequence[dict]) -> None:
        """Takes back what every rank that saved gave, in their order."""

    def frozen_models(self) -> list[LoadedModel]:
        """Returns the models beside the policy that batches go through."""
        return []

    def forwards(self) -> list[LoadedModel]:
        """Returns the models that a batch goes through without gradients."""
        return self.frozen_models()

    def for_evaluation(self) -> Objective:
        """Returns what an evaluation measures."""
        return self


class AgainstReference(Objective):
    """Compares the policy with a frozen reference, by a loss with a state of its own; reference: None for none."""

    loss: Loss | WeightedSum | Labelled
    reference: Reference | None

    def frozen_models(self) -> list[LoadedModel]:
        return [] if self.reference is None else self.reference.models()

    def forwards(self) -> list[LoadedModel]:
        return [] if self.reference is None else self.reference.forwards()

    def state(self) -> dict:
        return {"loss": self.loss.state(), "reference": {} if self.reference is None else self.reference.state()}

    def load_state(self, states: Sequence[dict]) -> None:
        self.loss = self.loss.with_state(states[0]["loss"])
        if self.reference is not None:
            self.reference.load_state([state["reference"] for state in states])
