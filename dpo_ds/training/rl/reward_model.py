"""A reward model that scores while a policy trains: live under ZeRO-3, its weights spread over the ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from dpo_ds.batch import Group, padded_batch
from dpo_ds.cluster import collectives
from dpo_ds.models.engine import FrozenModel
from dpo_ds.models.reward_model import RewardModel, load_classifier
from dpo_ds.models.scoring import REWARD_BATCH, ScoringModel

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
        order = sorted(range(len(ids)), key=lambda row: -len(ids[row]))  # like lengths share a forward
        outputs = np.zeros(len(ids))
        for turn in range(int(collectives.reduce_max(math.ceil(len(ids) / REWARD_BATCH), self._model.device))):
            rows = order[turn * REWARD_BATCH :][:REWARD_BATCH]  # none: the others still need this rank's part
            batch = padded_batch([Group(ids[row], (NOTHING,), (NOTHING.astype(bool),)) for row in rows])
            with torch.no_grad():
                outputs[rows] = self._model.engine(batch.to(self._model.device)).double().cpu().numpy()
        return self._scoring.scores(outputs, completions)

    def identity(self) -> str:
        return self._scoring.identity()
