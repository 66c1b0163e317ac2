"""The reference as a second model in memory: inference-only ZeRO-3, one forward a micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dpo_ds.batch import Batch
from dpo_ds.config import ReferenceSection
from dpo_ds.models.engine import FrozenModel, LoadedModel, Policy, own_slice
from dpo_ds.reference import Reference


@dataclass(frozen=True)
class LiveReference(Reference):
    """A frozen model; with settings.update_every it follows the policy: TR-DPO's soft update (arXiv 2404.09656)."""

    model: FrozenModel
    policy: Policy
    settings: ReferenceSection

    def models(self) -> list[LoadedModel]:
        return [self.model]

    def token_logps(self, batch: Batch) -> Tensor:
        return self.model.token_logps(batch)

    def after_step(self, step: int) -> None:
        if self.settings.update_every and step % self.settings.update_every == 0:
            self.model.move_towards(self.policy, self.settings.update_alpha)

    def state(self) -> dict:
        return self.model.slices() if self.settings.update_every else {}

    def load_state(self, states: Sequence[dict]) -> None:
        if self.settings.update_every:
            numels = {name: parameter.ds_numel for name, parameter in self.model.engine.module.named_parameters()}
            self.model.set_slices(
                {name: own_slice([state[name] for state in states], numel) for name, numel in numels.items()}
            )
