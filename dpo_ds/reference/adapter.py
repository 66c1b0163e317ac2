"""The reference as the policy with its adapters switched off: no second model, but a second forward a micro-batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dpo_ds.batch import Batch, PairLogps
from dpo_ds.engine import Policy
from dpo_ds.lora import adapters_off


@dataclass(frozen=True)
class AdapterReference:
    """The reference of `PreferenceObjective`; all ranks enter `logps`, before the policy's own forward."""

    policy: Policy

    @torch.no_grad()
    def logps(self, batch: Batch) -> PairLogps:
        with adapters_off(self.policy.causal_lm):
            return self.policy.logps(batch)
