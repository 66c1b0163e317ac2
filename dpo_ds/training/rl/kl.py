"""β, the weight of the KL divergence from the reference: fixed, or steered to a target."""

from __future__ import annotations

from dataclasses import dataclass, replace

GAIN = 0.1
FURTHEST = 0.2


@dataclass(frozen=True)
class FixedKL:
    beta: float

    def after(self, kl: float) -> FixedKL:
        """Returns the next iteration's, given the nats a completion that were measured in this one."""
        return self


@dataclass(frozen=True)
class AdaptiveKL:
    """Moves β so that the KL comes to `target` nats a completion: section 2.2 of arXiv 1909.08593 (Ziegler 2019).

    e = clip((KL - target) / target, -0.2, 0.2); β <- β (1 + 0.1 e): 2 % an iteration at the most.
    """

    beta: float
    target: float

    def after(self, kl: float) -> AdaptiveKL:
        error = min(max(kl / self.target - 1, -FURTHEST), FURTHEST)
        return replace(self, beta=self.beta * (1 + GAIN * error))
