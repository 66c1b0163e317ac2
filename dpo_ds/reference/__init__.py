"""The frozen model that the policy is compared with: live, cached, or the policy without its adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from dpo_ds.models.engine import LoadedModel

from dpo_ds.batch import Batch


class Reference(Protocol):
    """Gives `PreferenceObjective` the reference's log-probs; all ranks enter."""

    def token_logps(self, batch: Batch) -> Tensor: ...  # [N] float32 on the policy's device, without gradient

    def models(self) -> list[LoadedModel]:
        """Returns the models of its own that it runs batches through."""
        return []

    def forwards(self) -> list[LoadedModel]:
        """Returns the models that a batch goes through for it, the policy too where that is one."""
        return self.models()

    def after_step(self, step: int) -> None:
        """Update `step` is made."""

    def state(self) -> dict:
        """Returns what this rank's part of a checkpoint keeps of it."""
        return {}

    def load_state(self, states: Sequence[dict]) -> None:
        """Takes back what every rank that saved gave, in their order."""
