"""The reference as the policy with its adapters switched off: no second model, but a second forward a micro-batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dpo_ds.batch import Batch
from dpo_ds.models.engine import LoadedModel, Policy
from dpo_ds.models.lora import adapters_off
from dpo_ds.reference import Reference


@dataclass(frozen=True)
class AdapterReference(Reference):
    """Switches the policy's adapters off for a forward; all ranks enter `token_logps`, before the policy's own."""

    policy: Policy

    @torch.no_grad()
    def token_logps(self, batch: Batch) -> Tensor:
        with adapters_off(self.policy.causal_lm):
            return self.policy.token_logps(batch)

    def forwards(self) -> list[LoadedModel]:
        return [self.policy]
