"""The reference as a second model in memory: inference-only ZeRO-3, one forward a micro-batch."""

from __future__ import annotations

import torch

from dpo_ds.config import ModelSection
from dpo_ds.engine import FrozenModel
from dpo_ds.model import LogProbModel, load_causal_lm


def live_reference(section: ModelSection, ds_config: dict, device: torch.device) -> FrozenModel:
    """All ranks enter. The same kernels as the policy's, so that at equal weights the log-probs are bit-equal."""
    return FrozenModel(LogProbModel(load_causal_lm(section, ds_config)), ds_config, device)
