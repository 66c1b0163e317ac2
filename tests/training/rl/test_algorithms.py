"""Reinforcement learning's mathematics by hand, on numbers that a reader can redo."""

import math

import numpy as np
import pytest
import torch

from dpo_ds.data.prompts import Prompt
from dpo_ds.models.generation import Completion
from dpo_ds.training.rl import advantages
from dpo_ds.training.rl.algorithms import ALGORITHMS, GRPO, PPO, RLOO, Drawn, Reinforce, clipped
from dpo_ds.training.rl.kl import AdaptiveKL, FixedKL
from dpo_ds.training.rl.rollouts import Rollout, penalised
from dpo_ds.training.rl.values import explained_variance, explanation_moments, value_losses

CLIP = 0.2


def tensor(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def drawn(logps=(-1.0, -2.0, -0.5, -1.5), counts=(1, 3), scores=(1.0, 3.0), reference=(-1.5, -1.0, -0.5, -2.5), **more):
    """Two completions of one prompt, of one and of three tokens; log π - log π_ref is ½, then -1, 0, 1."""
    reference = None if reference is None else tensor(*reference)
    return Drawn(torch.tensor(counts), 2, tensor(*scores), tensor(*logps), reference, **more)


def test_rewards_of_tokens_and_of_completions():
    """β = 0.1: -0.05 + 1; 0.1, 0, -0.1 + 3. Without a reference nothing but the score."""
    known = drawn()
    args = (known.scores_C, known.logratios_N, 0.1, known.counts_C)
    assert advantages.token_rewards(*args).tolist() == pytest.approx([0.95, 0.1, 0.0, 2.9])
    assert advantages.total_rewards(*args).tolist() == pytest.approx([0.95, 3.0])
    alone = drawn(reference=None)
    assert advantages.token_rewards(alone.scores_C, alone.logratios_N, 9.0, alone.counts_C).tolist() == [1, 0, 0, 3]


def gae_by_a_loop(rewards, values, counts, decay):
    found, start = [], 0
    for count in counts:
        own = range(start, start + count)
        for t in own:
            total = 0.0
            for k in range(t, own.stop):
                following = values[k + 1] if k + 1 < own.stop else 0.0
                total += decay ** (k - t) * (rewards[k] + following - values[k])
            found.append(total)
        start += count
    return found


@pytest.mark.parametrize("decay", [0.0, 0.95, 1.0])
def test_gae_is_the_sum_that_the_paper_writes(decay):
    generator = torch.Generator().manual_seed(0)
    counts = [3, 1, 7, 2]
    rewards, values = torch.randn(2, sum(counts), dtype=torch.float64, generator=generator)
    found = advantages.gae(rewards, values, torch.tensor(counts), decay)
    assert found.tolist() == pytest.approx(gae_by_a_loop(rewards.tolist(), values.tolist(), counts, decay))
    empty = torch.zeros(0)
    assert advantages.gae(empty, empty, torch.zeros(0, dtype=torch.int64), decay).shape == (0,)


def test_gae_by_hand():
    """Values 1, 2 and rewards 0, 4, λ ½: δ = 0 + 2 - 1, 4 + 0 - 2 = 1, 2; A = 1 + ½·2, 2."""
    found = advantages.gae(tensor(0, 4), tensor(1, 2), torch.tensor([2]), 0.5)
    assert found.tolist() == [2.0, 2.0]


def test_within_a_group():
    """Of 1, 2, 6: others' means 4, 3½, 1½. Of 0, 2: mean 1, deviation 1. Equal scores teach nothing."""
    assert advantages.leave_one_out(tensor(1, 2, 6), 3).tolist() == pytest.approx([-3, -1.5, 4.5])
    one = 1 / (1 + advantages.LEAST_DEVIATION)
    assert advantages.group_normalised(tensor(0, 2, 5, 5), 2).tolist() == pytest.approx([-one, one, 0, 0])


def test_scores_are_centred_for_every_prompt():
    """Of 1, 2, 6 the mean is 3; a completion without an end pays ½ after that, so that it pays even where all do. A
    group's own comparisons are the same with and without.
    """
    easy, hard = rollout(11, 12, 16, unfinished=()), rollout(1, 2, 6, unfinished=(0, 1, 2))
    [of_easy, of_hard] = penalised([easy, hard], 0.5, center=True)
    assert of_easy.tolist() == [-2, -1, 3] and of_hard.tolist() == [-2.5, -1.5, 2.5]
    as_given = penalised([easy, hard], 0.5)
    assert np.concatenate(as_given).tolist() == [11, 12, 16, 0.5, 1.5, 5.5]
    assert hard.scores.tolist() == [1, 2, 6], "what is told of scores is told of these"
    for compare in (advantages.leave_one_out, advantages.group_normalised):
        found = [compare(torch.tensor(np.concatenate(own)), 3).tolist() for own in ([of_easy, of_hard], as_given)]
        assert found[0] == pytest.approx(found[1])


def rollout(*scores: float, unfinished) -> Rollout:
    ends = [Completion(np.array([7]), "", finished=place not in unfinished) for place in range(len(scores))]
    return Rollout(0, Prompt("", np.array([1]), ""), ends, np.array(scores, dtype=float))


def test_whitening_over_parts_is_whitening_of_the_whole():
    """1, 3 on one rank and 5, 7, 9 on another: mean 5, variance 8."""
    parts = [tensor(1, 3), tensor(5, 7, 9)]
    together = sum(map(advantages.moments, parts))
    white = torch.cat([advantages.whitened(part, together) for part in parts])
    assert white.tolist() == pytest.approx([x / math.sqrt(8) for x in (-4, -2, 0, 2, 4)])
    assert advantages.whitened(tensor(2, 2), advantages.moments(tensor(2, 2))).tolist() == [0, 0]


def test_clipping_by_hand():
    """ε = 0.2. A = 1: ρ 1.5 counts 1.2; A = -1: ρ 0.5 counts 0.8, ρ 1.5 is not held: it is to come down."""
    ratios, given = tensor(1.5, 0.5, 0.5, 1.5).requires_grad_(), tensor(1, 1, -1, -1)
    losses, held = clipped(ratios, given, 0.2)
    assert losses.tolist() == pytest.approx([-1.2, -0.5, 0.8, 1.5])
    assert held.tolist() == [True, False, True, False]
    losses.sum().backward()
    assert ratios.grad.tolist() == [0, -1, 0, 1], "what is held has no gradient"


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_first_gradient_is_the_advantage_times_that_of_the_log_prob(name):
    """ρ = 1: the loss is -A, its derivative by every token's log-prob -A (GRPO: over the completion's length)."""
    algorithm, beta = PPO(CLIP, 0.95) if name == "ppo" else ALGORITHMS[name](CLIP), 0.1
    known = drawn(values_N=tensor(0.5, 0.2, 0.1, 0.3))
    if name == "grpo":
        known = drawn(reference=None)
    logps = known.logps_N.clone().requires_grad_()
    weights = algorithm.advantages(known, beta)
    losses, held = algorithm.losses(logps, known, weights, beta)
    assert losses.tolist() == pytest.approx((-weights).tolist()) and not held.any()
    losses.sum().backward()
    spread = weights if algorithm.of_tokens else weights.repeat_interleave(known.counts_C)
    length = known.counts_C.repeat_interleave(known.counts_C) if name == "grpo" else 1
    assert logps.grad.tolist() == pytest.approx((-spread / length).tolist())


def test_advantages_by_hand():
    """Totals at β 0.1 are 0.95 and 3 (above); PPO at λ 1 without a value: what is still to come, 0.95; 3, 2.9, 2.9."""
    known = drawn(values_N=torch.zeros(4, dtype=torch.float64))
    assert Reinforce(CLIP).advantages(known, 0.1).tolist() == pytest.approx([0.95, 3.0])
    assert RLOO(CLIP).advantages(known, 0.1).tolist() == pytest.approx([-2.05, 2.05])
    assert PPO(CLIP, gae_lambda=1.0).advantages(known, 0.1).tolist() == pytest.approx([0.95, 3.0, 2.9, 2.9])
    one = 1 / (1 + advantages.LEAST_DEVIATION)
    assert GRPO(CLIP).advantages(known, 0.1).tolist() == pytest.approx([-one, one])


def test_completions_are_clipped_as_a_whole():
    """Ratios e^0.1 and e^(0.1 + 0.1 + 0.1) = 1.35: the second, of advantage 3, counts 1.2."""
    known = drawn()
    losses, held = Reinforce(CLIP).losses(known.logps_N + 0.1, known, tensor(1, 3), 0.1)
    assert losses.tolist() == pytest.approx([-math.exp(0.1), -3.6]) and held.tolist() == [False, True]


def test_grpo_by_hand():
    """A = -1, 1, β = ½. First token: log π_ref - log π = -½, KL e^-½ + ½ - 1. Second: the mean of the tokens'
    (e^1 - 1 - 1), 0 and (e^-1 + 1 - 1)."""
    known = drawn()
    losses, held = GRPO(CLIP).losses(known.logps_N, known, tensor(-1, 1), 0.5)
    kl = math.exp(-0.5) - 0.5, (math.e - 2 + math.exp(-1)) / 3
    assert losses.tolist() == pytest.approx([1 + kl[0] / 2, -1 + kl[1] / 2])
    assert held.tolist() == [0, 0]
    held = GRPO(CLIP).losses(known.logps_N + tensor(0, 1, 0, 0), known, tensor(-1, 1), 0.5)[1]
    assert held.tolist() == pytest.approx([0, 1 / 3]), "one token of three"


def test_the_value_loss_by_hand():
    """ε = 0.2, V_old = 1, R = 2. V = 1.5 counts as 1.2: ½ 0.8² is more than ½ 0.5². V = 0: ½ 2², 0.8 would be less."""
    values = tensor(1.5, 0.0, 1.1).requires_grad_()
    losses = value_losses(values, tensor(1, 1, 1), tensor(2, 2, 2), 0.2)
    assert losses.tolist() == pytest.approx([0.32, 2.0, 0.405])
    losses.sum().backward()
    assert values.grad.tolist() == pytest.approx([0, -2, -0.9])


def test_explained_variance_by_hand():
    """Returns 0, 2, 4 (variance 8/3); of values 0, 2, 1 is left 0, 0, 3 (variance 2): 1 - 3/4. In two parts."""
    values, returns = [tensor(0), tensor(2, 1)], [tensor(0), tensor(2, 4)]
    found = sum(explanation_moments(v, r) for v, r in zip(values, returns, strict=True))
    assert explained_variance(found) == pytest.approx(0.25)
    assert explained_variance(explanation_moments(tensor(1, 2), tensor(3, 3))) == 0.0


def test_beta_is_steered():
    """Twice the target is more than 20 % too much: β rises by 2 %; 10 % below it falls by 1 %."""
    steered = AdaptiveKL(0.5, target=4.0)
    assert steered.after(8.0).beta == pytest.approx(0.51)
    assert steered.after(3.6).beta == pytest.approx(0.495)
    assert steered.after(0.0).beta == pytest.approx(0.49)
    assert FixedKL(0.5).after(8.0).beta == 0.5
