"""`dpo-ds reward`: its loss, how well its probabilities are calibrated, the constant that makes its mean zero."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, one_hot

from dpo_ds.batch import Batch, PairLogps
from dpo_ds.config import RewardSection
from dpo_ds.losses import plackett_luce
from dpo_ds.models.engine import Policy
from dpo_ds.models.reward_model import REWARD_MEAN, settle_padding
from dpo_ds.training.objectives.objective import Objective
from dpo_ds.training.trainer import Trainer

REWARDS = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
BINS = 10  # of the calibration error


@dataclass(frozen=True)
class BradleyTerry:
    """-log σ(r_w - r_l - margin) + centering (r_w + r_l)²: eq. 2 of arXiv 2305.18290; margin: eq. 2 of arXiv 2307.09288
    (Llama 2); centering, which keeps rewards near 0: arXiv 2312.09244. The mean over comparisons is minimised.
    """

    centering: float = 0.0
    per_group: ClassVar[bool] = False

    def __call__(self, chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0) -> Tensor:  # [pairs]
        return -logsigmoid(chosen - rejected - margin) + self.centering * (chosen + rejected) ** 2

    def parts(self, pair: PairLogps, shares: Tensor) -> Tensor:
        """Returns what sums up to a batch's loss: one value a comparison, whose chosen and rejected are scores."""
        return self(pair.chosen, pair.rejected, 0.0 if pair.margins is None else pair.margins)


@dataclass(frozen=True)
class Ranking:
    """A group's whole order, best first, under Plackett-Luce: Σ_i -log(e^r_i / (e^r_i + Σ_{j worse than i} e^r_j)),
    eq. 18 of arXiv 2305.18290 (appendix A.3); equally good completions are not weighed against each other. centering:
    as Bradley-Terry's, its mean over the group's comparisons. The mean over groups is minimised.
    """

    centering: float = 0.0
    per_group: ClassVar[bool] = True

    def parts(self, pair: PairLogps, shares: Tensor) -> Tensor:
        """Returns what sums up to a batch's loss, of scores chosen and rejected; shares [comparisons]: 1 over those of
        the same group.
        """
        centred = self.centering * shares * (pair.chosen + pair.rejected) ** 2
        return torch.cat([plackett_luce(pair.logratio, pair.rivals), centred])


@dataclass(frozen=True)
class RewardObjective(Objective):
    """Its mean is over the global batch's comparisons, or its groups where the loss takes whole orders: then those of
    the same group count 1 together in what is told of rewards.

    with_calibration adds what is worth knowing over a whole evaluation: the Brier score (1 - p)², p = σ(r_w - r_l), and
    the expected calibration error in bins of confidence.
    """

    loss: BradleyTerry | Ranking
    with_calibration: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        extra = ("rewards/brier", *["rewards/calibration_error"] * BINS) if self.with_calibration else ()
        return REWARDS + extra

    def for_evaluation(self) -> RewardObjective:
        return replace(self, with_calibration=True)

    def counts(self, data) -> np.ndarray | None:
        return None if self.loss.per_group or not data.census["groups"] else data.comparisons

    def weight(self, batch: Batch) -> int:
        return len(batch.group_sizes) if self.loss.per_group else batch.num_comparisons

    def __call__(self, policy: Policy, batch: Batch) -> tuple[Tensor, Tensor]:
        batch = batch.to(policy.device)
        pair = batch.compared(policy.scores(batch))
        losses = self.loss.parts(pair, batch.shares)
        shares = batch.shares if self.loss.per_group else torch.ones_like(batch.shares)
        return losses.sum(), self._sums(losses, pair.chosen, pair.rejected, shares)

    @torch.no_grad()
    def _sums(self, losses: Tensor, chosen: Tensor, rejected: Tensor, shares: Tensor) -> Tensor:  # [names] float64
        columns = [chosen, rejected, chosen - rejected, chosen > rejected]
        columns = torch.stack([column.double() for column in columns], dim=1)
        if self.with_calibration:
            margins = chosen.double() - rejected.double()
            columns = torch.cat([columns, margins.sigmoid().sub(1).square()[:, None], calibration_gaps(margins)], dim=1)
        return torch.cat([losses.double().sum()[None], (columns * shares[:, None]).sum(0)])


def calibration_gaps(margins: Tensor) -> Tensor:  # [pairs] -> [pairs, BINS]
    """Right (1, a tie ½) minus confidence σ(|margin|), in the confidence's bin of [½, 1], 0 in the others.

    The expected calibration error is the sum over bins of |mean over pairs|.
    """
    confidence = margins.abs().sigmoid()
    right = (margins.sign() + 1) / 2
    bin_of = ((confidence - 0.5) * 2 * BINS).long().clamp(max=BINS - 1)
    return (right - confidence)[:, None] * one_hot(bin_of, BINS)


class MeanReward(Objective):
    """Measured, not trained: the mean score of all completions."""

    names = (REWARD_MEAN,)

    def weight(self, batch: Batch) -> int:
        return sum(batch.group_sizes)

    def __call__(self, policy: Policy, batch: Batch) -> tuple[Tensor, Tensor]:
        total = policy.scores(batch).double().sum()
        return total, total[None]


def finish(trainer: Trainer, section: RewardSection, data, tokenizer) -> list[str]:
    """Puts into model and tokenizer what scoring needs of them: the mean reward over `data`, and padding.

    Returns lines for the user. All ranks enter, after the last update.
    """
    rows = evenly(len(data), section.calibration_rows)
    mean = trainer.means(MeanReward(), data, rows, trainer.total_steps)
    trainer.last_metrics |= mean
    classifier = trainer.policy.causal_lm
    classifier.config.update(mean)
    note = settle_padding(classifier, tokenizer)
    line = f"{REWARD_MEAN} {mean[REWARD_MEAN]:.6g}, over {len(rows)} of {len(data)} pairs"
    return [line] if note is None else [line, note]


def evenly(count: int, limit: int | None) -> np.ndarray:
    """At most `limit` of the rows 0 to count - 1, evenly."""
    return np.linspace(0, count - 1, count if limit is None else min(limit, count)).astype(int)
