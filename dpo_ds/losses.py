"""Preference losses: one frozen dataclass each, hyper-parameters as fields, the formula as __call__."""

from __future__ import annotations

from dataclasses import dataclass, fields

from torch import Tensor
from torch.nn.functional import logsigmoid

from dpo_ds.batch import PairLogps


@dataclass(frozen=True)
class DPO:
    """Direct Preference Optimization, eq. 7 of arXiv 2305.18290; label_smoothing > 0 is cDPO (Mitchell 2023).

    Its gradient is -beta σ(r̂_l - r̂_w) (∇ log π(y_w|x) - ∇ log π(y_l|x)) with r̂ = beta log π/π_ref.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:  # [pairs]
        margin = self.beta * (policy.logratio - reference.logratio)
        return -(1 - self.label_smoothing) * logsigmoid(margin) - self.label_smoothing * logsigmoid(-margin)


LOSSES = {"dpo": DPO}


def make_loss(settings):
    """The loss named by the config's loss section, given the fields it has."""
    loss = LOSSES[settings.name]
    return loss(**{field.name: getattr(settings, field.name) for field in fields(loss)})
