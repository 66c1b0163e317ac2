"""The critic's loss, and how much it explains.

    N tokens of a micro-batch's completions, end to end
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpo_ds.training.rl.advantages import moments, variance


def value_losses(values_N: Tensor, old_N: Tensor, returns_N: Tensor, clip: float) -> Tensor:  # [N]
    """½ max((V - R)², (clip(V, V_old - ε, V_old + ε) - R)²): the clipped loss of PPO's own code (Huang et al. 2022,
    "The 37 implementation details of PPO", 9); V_old: the values that the returns R were made with.
    """
    held_N = old_N + (values_N - old_N).clamp(-clip, clip)
    return 0.5 * torch.maximum((values_N - returns_N).square(), (held_N - returns_N).square())


def explanation_moments(values_N: Tensor, returns_N: Tensor) -> Tensor:  # [2, 3] float64
    """Returns what `explained_variance` needs; it adds up over micro-batches and ranks."""
    return torch.stack([moments(returns_N), moments(returns_N.double() - values_N.double())])


def explained_variance(moments: Tensor) -> float:
    """1 - Var(R - V) / Var(R): 1 for values that foretell all returns, 0 for a constant; 0 where returns are equal."""
    of_returns, of_rest = (variance(part).item() for part in moments)
    return 1 - of_rest / of_returns if of_returns > 0 else 0.0
