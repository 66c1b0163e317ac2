"""How much better a drawn completion, or each of its tokens, was than expected: what reinforcement learning weighs
log-probs by. Nothing here knows of ranks: what spans the global batch is summed up by the caller (`moments`).

    N tokens of a micro-batch's completions, end to end; C completions, those of a prompt adjacent, n each
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dpo_ds.batch import sum_per_sequence

LEAST_DEVIATION = 1e-4  # what scores of a group must differ by, for noise in them not to be blown up


def token_rewards(scores_C: Tensor, logratios_N: Tensor, beta: float, counts_C: Tensor) -> Tensor:  # [N]
    """-β (log π - log π_ref) on each token, and the score on the last: eq. 2 of arXiv 2203.02155, token by token."""
    rewards_N = -beta * logratios_N
    rewards_N[counts_C.cumsum(0) - 1] += scores_C.to(rewards_N.dtype)
    return rewards_N


def total_rewards(scores_C: Tensor, logratios_N: Tensor, beta: float, counts_C: Tensor) -> Tensor:  # [C]
    """The score minus β (log π - log π_ref) of the whole completion."""
    return scores_C.to(logratios_N.dtype) - beta * sum_per_sequence(logratios_N, counts_C)


def gae(rewards_N: Tensor, values_N: Tensor, counts_C: Tensor, decay: float) -> Tensor:  # [N]
    """Generalised advantage estimation, eq. 16 of arXiv 1506.02438 without a discount (γ = 1): A_t = Σ_k λ^k δ_(t+k),
    δ_t = r_t + V_(t+1) - V_t; the value behind the last token is 0. decay: λ.

    values_N are of the state before each token: of prompt and the tokens so far.
    """
    if not len(counts_C):
        return torch.zeros_like(values_N)
    counts = counts_C.tolist()
    following = [torch.cat([own[1:], own.new_zeros(1)]) for own in values_N.split(counts)]
    errors_N = rewards_N + torch.cat(following) - values_N
    errors_TC = pad_sequence([own.flip(0) for own in errors_N.split(counts)])  # the last token first
    advantage, found = torch.zeros_like(errors_TC[0]), []
    for errors in errors_TC:
        advantage = errors + decay * advantage
        found.append(advantage)
    columns = torch.stack(found).unbind(1)
    return torch.cat([column[:count].flip(0) for column, count in zip(columns, counts, strict=True)])


def leave_one_out(rewards_C: Tensor, n: int) -> Tensor:  # [C]
    """A completion's reward over the mean of the prompt's others (RLOO, arXiv 2402.14740)."""
    of_prompt = rewards_C.view(-1, n)
    others = (of_prompt.sum(1, keepdim=True) - of_prompt) / (n - 1)
    return (of_prompt - others).flatten()


def group_normalised(rewards_C: Tensor, n: int) -> Tensor:  # [C]
    """(r - mean) / (standard deviation + 1e-4) over the prompt's completions: arXiv 2402.03300, section 4.1.2."""
    of_prompt = rewards_C.view(-1, n)
    centred = of_prompt - of_prompt.mean(1, keepdim=True)
    return (centred / (of_prompt.std(1, correction=0, keepdim=True) + LEAST_DEVIATION)).flatten()


def moments(values: Tensor) -> Tensor:  # [3] float64
    """Count, sum and sum of squares: they add up over micro-batches and ranks."""
    values = values.double()
    return torch.stack([values.new_tensor(values.numel()), values.sum(), values.square().sum()])


def variance(moments: Tensor) -> Tensor:
    """Of all values that were summed up."""
    count, total, squares = moments
    return (squares / count - (total / count).square()).clamp(min=0)


def whitened(values: Tensor, moments: Tensor) -> Tensor:
    """Values of mean 0 and deviation 1 over all that `moments` were summed over; equal ones all become 0."""
    mean, deviation = moments[1] / moments[0], variance(moments).sqrt()
    return ((values.double() - mean) / (deviation + 1e-8)).to(values.dtype)
