"""Composes with any preference loss: LD's discount, f-divergence scores, WPO's weights, an SFT term.

None is on by default, and then none costs anything.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dpo_ds.batch import Batch, PairLogps, sum_per_sequence
from dpo_ds.logprobs import TokenStatistics

MAX_EXPONENT = 80.0  # e^80 still fits float32; beyond it the score stays where it is and gives no gradient


@dataclass(frozen=True)
class Shaping:
    """The loss section's keys that apply whatever the loss; the defaults change nothing.

    ld_alpha: what a token beyond the shorter completion's length counts (LD-DPO, arXiv 2409.06411). divergence:
    reverse_kl, forward_kl, js or alpha (then with divergence_alpha). wpo: pairs weighted by how likely the policy finds
    them. sft_weight: of the SFT term.
    """

    ld_alpha: float = 1.0
    divergence: str = "reverse_kl"
    divergence_alpha: float = 0.5
    wpo: bool = False
    sft_weight: float = 0.0

    @classmethod
    def of(cls, settings) -> Shaping:
        """From the config's loss section."""
        return cls(**{field.name: getattr(settings, field.name) for field in fields(cls)})

    def pair_logps(self, logps_N: Tensor, batch: Batch) -> PairLogps:
        """Sums per side with LD's discount, for policy and reference alike, so that equal models stay equal."""
        if self.ld_alpha == 1.0:
            return batch.pair_logps(logps_N)
        sides = batch.comparisons.flatten()  # [2 comparisons], and below each token once for each side that it is in
        counts = batch.target_counts[sides]
        shorter = counts.view(-1, 2).min(dim=1).values.repeat_interleave(2)
        starts = (batch.target_counts.cumsum(0) - batch.target_counts)[sides]
        token = torch.arange(int(counts.sum()), device=logps_N.device) - _repeated(counts.cumsum(0) - counts, counts)
        logps = logps_N[_repeated(starts, counts) + token]
        logps = torch.where(token >= _repeated(shorter, counts), self.ld_alpha * logps, logps)
        sums = sum_per_sequence(logps, counts).view(-1, 2)
        return PairLogps(*sums.unbind(1), *counts.view(-1, 2).unbind(1), batch.margins, batch.rivals)

    def scores(self, policy: PairLogps, reference: PairLogps | None) -> tuple[PairLogps, PairLogps | None]:
        """Returns what a loss of differences takes in place of log-probs: f'(π/π_ref) of the divergence against zeros.

        With x = log π - log π_ref (arXiv 2309.16240, table 1): forward KL 1 - e^-x, Jensen-Shannon log 2 + log σ(x), α
        (e^((α-1) x) - 1) / (α - 1).
        """
        if self.divergence == "reverse_kl":
            return policy, reference
        chosen = self._score(policy.chosen - reference.chosen)
        rejected = self._score(policy.rejected - reference.rejected)
        zeros = torch.zeros_like(chosen)
        return replace(policy, chosen=chosen, rejected=rejected), replace(policy, chosen=zeros, rejected=zeros)

    def _score(self, logratio: Tensor) -> Tensor:
        if self.divergence == "js":
            return math.log(2) + logsigmoid(logratio)
        alpha = 0.0 if self.divergence == "forward_kl" else self.divergence_alpha
        return torch.expm1(((alpha - 1) * logratio).clamp(max=MAX_EXPONENT)) / (alpha - 1)

    def sft(self, policy: PairLogps) -> Tensor:
        """sft_weight times the negative log-likelihood of chosen's mean token, [pairs] (RPO, arXiv 2404.19733)."""
        return -self.sft_weight * policy.chosen / policy.chosen_tokens


@torch.no_grad()
def wpo_weights(statistics: TokenStatistics, batch: Batch) -> Tensor:
    """[pairs] w_c w_r with w = exp(mean over tokens of log p - log Σ_v p_v²), eq. 2 of arXiv 2406.11827: 1 for a
    completion as likely as the policy's own draws.
    """
    pair = batch.pair_logps(statistics.logps - statistics.log_sum_p2)
    return (pair.chosen / pair.chosen_tokens + pair.rejected / pair.rejected_tokens).exp()


def _repeated(values: Tensor, counts: Tensor) -> Tensor:
    return values.repeat_interleave(counts)
