"""The reference as a second model in memory: inference-only ZeRO-3, one forward a micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpo_ds.batch import Batch
from dpo_ds.config import ModelSection, ReferenceSection
from dpo_ds.models.causal_lm import LogProbModel
from dpo_ds.models.engine import FrozenModel, Policy, own_slice
from dpo_ds.models.loading import load_causal_lm
from dpo_ds.reference import Reference


def frozen_model(section: ModelSection, ds_config: dict, device: torch.device) -> FrozenModel:
    """All ranks enter. The same kernels as the policy's, so that at equal weights the log-probs are bit-equal."""
    return FrozenModel(LogProbModel(load_causal_lm(section, ds_config)), ds_config, device)


@dataclass(frozen=True)
class LiveReference(Reference):
    """A frozen model; with settings.update_every it follows the policy: TR-DPO's soft update (arXiv 2404.09656)."""

    model: FrozenModel
    policy: Policy
    settings: ReferenceSection

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
