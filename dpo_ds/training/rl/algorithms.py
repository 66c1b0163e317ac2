"""Policy-gradient algorithms: one frozen dataclass each, hyper-parameters as fields, its equations as methods.

Below, ρ is the ratio of the policy's probability to that with which it drew, A the advantage, r the score minus
β (log π - log π_ref), ε clip. At the first update after drawing ρ is 1, so that all of their gradients are A ∇log π.

    N tokens of a micro-batch's completions, end to end; C completions, those of a prompt adjacent, n each
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dpo_ds.batch import sum_per_sequence
from dpo_ds.training.rl.advantages import gae, group_normalised, leave_one_out, token_rewards, total_rewards


@dataclass(frozen=True)
class Drawn:
    """Knows of a micro-batch's completions what does not change while the policy is updated with them.

    counts_C: tokens of each; n: completions of a prompt; scores_C: penalties taken off. logps_N: by the policy that
    drew them; reference_N: None for no reference; values_N: the critic's, None for no critic.
    """

    counts_C: Tensor
    n: int
    scores_C: Tensor
    logps_N: Tensor
    reference_N: Tensor | None = None
    values_N: Tensor | None = None

    @property
    def logratios_N(self) -> Tensor:
        """log π - log π_ref; 0 without a reference."""
        return torch.zeros_like(self.logps_N) if self.reference_N is None else self.logps_N - self.reference_N


@dataclass(frozen=True)
class Algorithm(ABC):
    """Gives what all algorithms share.

    of_tokens: advantages and ratios are of tokens, and the loss's mean is over the global batch's; else of completions.
    whitens: advantages are to have mean 0 and deviation 1 over the global batch.
    """

    clip: float
    of_tokens: ClassVar[bool] = False
    whitens: ClassVar[bool] = False

    @abstractmethod
    def advantages(self, drawn: Drawn, beta: float) -> Tensor:
        """Returns one a token, [N], or one a completion, [C]."""

    def losses(self, logps_N: Tensor, drawn: Drawn, advantages: Tensor, beta: float) -> tuple[Tensor, Tensor]:
        """Returns what adds up to the micro-batch's loss, shaped as the advantages, and where the clip holds the policy
        back.
        """
        differences = logps_N - drawn.logps_N
        if not self.of_tokens:
            differences = sum_per_sequence(differences, drawn.counts_C)
        return clipped(differences.exp(), advantages, self.clip)


def clipped(ratios: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """-min(ρA, clip(ρ, 1-ε, 1+ε) A), eq. 7 of arXiv 1707.06347, and where the second is less."""
    free, held = ratios * advantages, ratios.clamp(1 - clip, 1 + clip) * advantages
    return -torch.minimum(free, held), held < free


@dataclass(frozen=True)
class PPO(Algorithm):
    """Proximal policy optimisation, arXiv 1707.06347, of tokens: advantages by a critic and GAE of r on each token."""

    gae_lambda: float
    of_tokens: ClassVar[bool] = True
    whitens: ClassVar[bool] = True

    def advantages(self, drawn: Drawn, beta: float) -> Tensor:  # [N]
        rewards_N = token_rewards(drawn.scores_C, drawn.logratios_N, beta, drawn.counts_C)
        return gae(rewards_N, drawn.values_N, drawn.counts_C, self.gae_lambda)


@dataclass(frozen=True)
class Reinforce(Algorithm):
    """REINFORCE (Williams 1992): r ∇log π, the mean over completions, which is the gradient of E[score] - β KL."""

    def advantages(self, drawn: Drawn, beta: float) -> Tensor:  # [C]
        return total_rewards(drawn.scores_C, drawn.logratios_N, beta, drawn.counts_C)


@dataclass(frozen=True)
class RLOO(Algorithm):
    """REINFORCE leave-one-out, arXiv 2402.14740: a completion's r over the mean r of the prompt's others."""

    def advantages(self, drawn: Drawn, beta: float) -> Tensor:  # [C]
        total = total_rewards(drawn.scores_C, drawn.logratios_N, beta, drawn.counts_C)
        return leave_one_out(total, drawn.n)


@dataclass(frozen=True)
class GRPO(Algorithm):
    """Group-relative policy optimisation, eq. 3 of arXiv 2402.03300: scores normalised within a prompt's completions,
    the mean over a completion's tokens first, and β KL in the loss, estimated by π_ref/π - log π_ref/π - 1 (its eq. 4).
    """

    def advantages(self, drawn: Drawn, beta: float) -> Tensor:  # [C]
        return group_normalised(drawn.scores_C.to(drawn.logps_N.dtype), drawn.n)

    def losses(self, logps_N: Tensor, drawn: Drawn, advantages: Tensor, beta: float) -> tuple[Tensor, Tensor]:
        of_token = [values.repeat_interleave(drawn.counts_C) for values in (advantages, drawn.counts_C)]
        losses_N, held_N = clipped((logps_N - drawn.logps_N).exp(), of_token[0], self.clip)
        if drawn.reference_N is not None and beta:
            behind = drawn.reference_N - logps_N
            losses_N = losses_N + beta * (behind.exp() - behind - 1)
        held_C = sum_per_sequence(held_N.float(), drawn.counts_C) / drawn.counts_C
        return sum_per_sequence(losses_N / of_token[1], drawn.counts_C), held_C


ALGORITHMS: dict[str, type[Algorithm]] = {"ppo": PPO, "reinforce": Reinforce, "rloo": RLOO, "grpo": GRPO}
