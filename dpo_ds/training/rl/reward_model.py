"""A reward model that scores while a policy trains: live under ZeRO-3, its weights spread over the ranks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from dpo_ds.batch import Group, padded_batch
from dpo_ds.cluster import collectives
from dpo_ds.models.engine import FrozenModel
from dpo_ds.models.reward_model import RewardModel, load_classifier
from dpo_ds.models.scoring import ScoringModel, by_length, forwards_for

NOTHING = np.zeros(0, np.int64)


class LiveRewardModel:
    """Scores as `scoring` does, which would hold the whole model on every rank. All ranks enter each call, with as many
    completions as each of them has.
    """

    def __init__(self, scoring: ScoringModel, ds_config: dict, device: torch.device):
        self._scoring = scoring
        self._model = FrozenModel(RewardModel(load_classifier(scoring.section, ds_config, 0)), ds_config, device)

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray:  # [n] float64
        """UserError, one line, for a score that is not finite."""
        ids = self._scoring.tokens(prompts, completions)
        forwards = int(collectives.reduce_max(forwards_for(len(ids)), self._model.device))
        return self._scoring.scores(by_length(ids, self._forward, forwards), completions)

    def identity(self) -> str:
        return self._scoring.identity()

    @torch.no_grad()
    def _forward(self, ids: list[np.ndarray]) -> np.ndarray:
        batch = padded_batch([Group(tokens, (NOTHING,), (NOTHING.astype(bool),)) for tokens in ids])
        return self._model.engine(batch.to(self._model.device)).double().cpu().numpy()
