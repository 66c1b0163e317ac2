"""Loss values against arithmetic by hand, and DPO's gradient against the paper's closed form."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from dpo_ds import config, losses
from dpo_ds.batch import Group, PairLogps, packed_batch
from dpo_ds.commands import cli
from dpo_ds.errors import ConfigError
from dpo_ds.logprobs import TokenStatistics
from dpo_ds.losses import (
    AOT,
    BCO,
    CPO,
    DPO,
    DPOP,
    IPO,
    KTO,
    LOSSES,
    ORPO,
    AOTUnpaired,
    APODown,
    APOZero,
    BCOPair,
    DiscoPOP,
    EXOPair,
    Hinge,
    NCAPair,
    PlackettLuce,
    Robust,
    SigmoidNorm,
    SimPO,
    SPPOHard,
    WeightedSum,
    make_loss,
)
from dpo_ds.training.objectives.shaping import Shaping, wpo_weights


def logps(chosen, rejected, dtype=torch.float32) -> PairLogps:
    counts = torch.ones(len(chosen), dtype=torch.int64)
    return PairLogps(torch.tensor(chosen, dtype=dtype), torch.tensor(rejected, dtype=dtype), counts, counts)


def test_dpo_by_hand():
    # log-ratios: policy -10 - -14 = 4, reference -11 - -12 = 1; margin 0.1 * (4 - 1) = 0.3; -log σ(0.3) = log(1 +
    # e^-0.3)
    loss = DPO(beta=0.1)(logps([-10.0], [-14.0]), logps([-11.0], [-12.0]))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.3)), rel=1e-6)
    assert loss.item() == pytest.approx(0.554355, abs=1e-6)


def test_conservative_dpo_by_hand():
    # 0.8 * 0.554355 + 0.2 * log(1 + e^0.3) = 0.8 * 0.554355 + 0.2 * 0.854355
    loss = DPO(beta=0.1, label_smoothing=0.2)(logps([-10.0], [-14.0]), logps([-11.0], [-12.0]))
    assert loss.item() == pytest.approx(0.8 * 0.554355 + 0.2 * 0.854355, abs=1e-6)


def test_a_margin_is_taken_from_the_logit_by_hand():
    # 0.3 as above, less 2 * 0.4
    policy = dataclasses.replace(logps([-10.0], [-14.0]), margins=torch.tensor([0.4]))
    loss = DPO(beta=0.1, margin_scale=2.0)(policy, logps([-11.0], [-12.0]))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(0.5)), rel=1e-6)


def test_dpo_positive_by_hand():
    # c = -1, r = -4: 0.1 * (3 - 5 * 1) = -0.2; where c = 2 nothing is added: 0.1 * 6 = 0.6
    loss = DPOP(beta=0.1, penalty=5.0)(logps([-11.0, -8.0], [-14.0, -14.0]), logps([-10.0, -10.0], [-10.0, -10.0]))
    expected = [math.log(1 + math.exp(0.2)), math.log(1 + math.exp(-0.6))]
    assert loss.tolist() == pytest.approx(expected, rel=1e-6)


def test_a_ranking_by_hand():
    """Three of log-ratios 2, 1, 0 and then a pair of 1, 0: -log e²/(e² + e + 1), -log e/(e + 1) twice."""
    zeros = logps([0.0] * 4, [0.0] * 4)
    policy = dataclasses.replace(logps([2.0, 2.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]), rivals=torch.tensor([2, 1, 1]))
    first, second = math.log(1 + math.exp(-1) + math.exp(-2)), math.log(1 + math.exp(-1))
    assert PlackettLuce(beta=1.0)(policy, zeros).tolist() == pytest.approx([first, second, second], rel=1e-6)
    far = dataclasses.replace(logps([-4e4, -4e4], [4e4, 0.0]), rivals=torch.tensor([2]))
    assert PlackettLuce(beta=1.0)(far, logps([0.0] * 2, [0.0] * 2)).tolist() == [8e4], "no overflow"


def test_a_ranking_of_two_is_dpo():
    policy, reference = logps([-10.0, -3.0], [-14.0, -1.0]), logps([-11.0, -2.0], [-12.0, -2.5])
    torch.testing.assert_close(PlackettLuce(beta=0.3)(policy, reference), DPO(beta=0.3)(policy, reference))


def test_kto_and_bco_by_hand():
    """βc = 1 and -0.5, the first desirable; KTO's baseline β max(0, KL), BCO's its moving average."""
    logratios, labels = torch.tensor([2.0, -1.0]), torch.tensor([True, False])
    kto = KTO(0.5, desirable_weight=2.0, undesirable_weight=3.0)
    assert (kto.baseline(0.4), kto.baseline(-0.4)) == (0.2, 0.0)
    expected = [2 * (1 - sigmoid(0.8)), 3 * (1 - sigmoid(0.7))]
    assert kto(logratios, labels, 0.2).tolist() == pytest.approx(expected, rel=1e-6)
    bco = BCO(0.5, delta=0.2)
    assert bco(logratios, labels, bco.baseline(9.0)).tolist() == pytest.approx([nls(0.8), nls(0.7)], rel=1e-6)
    assert bco.after_step(1.0).delta == pytest.approx(0.9 * 0.2 + 0.1)


def test_equal_models_give_log_2():
    same = logps([-10.0, -700.0], [-14.0, -3.0])
    assert DPO(beta=0.3)(same, same).tolist() == pytest.approx([math.log(2)] * 2, rel=1e-7)


@pytest.mark.parametrize("margin", [-1e4, 1e4])
def test_extreme_margins_stay_finite(margin):
    loss = DPO(beta=1.0)(logps([margin], [0.0]), logps([0.0], [0.0]))
    assert loss.item() == pytest.approx(max(0.0, -margin), abs=1e-6)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_gradient_is_the_papers_closed_form(label_smoothing):
    """d loss / d log π(y_w) = -β σ(r̂_l - r̂_w) (1 - ε) + β σ(r̂_w - r̂_l) ε, and the negative for y_l; β and r̂ as
    in section 4.
    """
    beta = 0.3
    policy = logps([-10.0, -3.0, -8.0], [-12.0, -1.0, -8.5], torch.float64)
    reference = logps([-11.0, -3.5, -2.0], [-10.0, -2.0, -9.0], torch.float64)
    for tensor in (policy.chosen, policy.rejected):
        tensor.requires_grad_()
    DPO(beta, label_smoothing)(policy, reference).sum().backward()
    margin = beta * ((policy.chosen - reference.chosen) - (policy.rejected - reference.rejected)).detach()
    expected = -beta * ((1 - label_smoothing) * torch.sigmoid(-margin) - label_smoothing * torch.sigmoid(margin))
    torch.testing.assert_close(policy.chosen.grad, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(policy.rejected.grad, -expected, rtol=1e-12, atol=0)


def test_a_section_that_says_nothing_more_makes_the_loss_as_it_is_and_nothing_composes():
    for name, loss in LOSSES.items():
        assert make_loss(config.LossSection(name=name)) == loss(), name
    assert make_loss(config.LossSection(beta=0.2, label_smoothing=0.05)) == DPO(beta=0.2, label_smoothing=0.05)
    assert Shaping.of(config.LossSection()) == Shaping()


def test_every_key_of_the_section_is_somebodys():
    """A hyper-parameter that the section lacks could not be set, one that nobody takes would be ignored."""
    own = {field.name for loss in (*LOSSES.values(), Shaping) for field in dataclasses.fields(loss)}
    own -= {"delta"}  # which bco_pair moves itself
    assert own == config.LossSection.model_fields.keys() - {"name", "weights", "margin_column"}


# One pair: c = -10 - -12 = 2, r = -9 - -8 = -1, so Δ = 3; |y_c| = 4, |y_r| = 2; beta 0.5: βc = 1, βr = -0.5, βΔ = 1.5.
POLICY = PairLogps(*(torch.tensor([x]) for x in (-10.0, -9.0, 4, 2)))
REFERENCE = PairLogps(*(torch.tensor([x]) for x in (-12.0, -8.0, 4, 2)))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def nls(x: float) -> float:
    """-log σ(x)."""
    return math.log(1 + math.exp(-x))


def odds(p: float) -> float:
    return p / (1 - p)


BY_HAND = {
    "dpo": (DPO(0.5), nls(1.5)),
    "robust": (Robust(0.5, label_smoothing=0.2), (0.8 * nls(1.5) - 0.2 * nls(-1.5)) / 0.6),
    "hinge": (Hinge(0.1), 1 - 0.3),
    "ipo": (IPO(0.25), (2 / 4 + 1 / 2 - 2) ** 2),
    "sigmoid_norm": (SigmoidNorm(0.5), nls(0.5 * (2 / 4 + 1 / 2))),
    "exo_pair": (
        EXOPair(0.5, label_smoothing=0.1),
        sigmoid(1.5) * math.log(sigmoid(1.5) / 0.9) + sigmoid(-1.5) * math.log(sigmoid(-1.5) / 0.1),
    ),
    "nca_pair": (NCAPair(0.5), nls(1) + 0.5 * nls(-1) + 0.5 * nls(0.5)),
    "bco_pair": (BCOPair(0.5, delta=0.2), nls(1 - 0.2) + nls(0.5 + 0.2)),
    "dpop": (DPOP(0.5, penalty=2.0), nls(1.5)),  # chosen has not fallen
    "plackett_luce": (PlackettLuce(0.5), nls(1.5)),
    "sppo_hard": (SPPOHard(0.5), (2 - 1) ** 2 + (-1 + 1) ** 2),
    "apo_zero": (APOZero(0.5), 1 - sigmoid(1) + sigmoid(-0.5)),
    "apo_down": (APODown(0.5), sigmoid(1) + 1 - sigmoid(1.5)),
    "discopop": (
        DiscoPOP(0.01, tau=0.05),
        (1 - sigmoid(0.03 / 0.05)) * nls(0.03) + sigmoid(0.03 / 0.05) * math.exp(-0.03),
    ),
    "aot": (AOT(0.5, label_smoothing=0.1), 0.9 * nls(1.5) + 0.1 * nls(-1.5)),
    "aot_unpaired": (AOTUnpaired(0.5), nls(1.5)),
    "simpo": (SimPO(0.5, gamma=0.3), nls(0.5 * (-10 / 4 + 9 / 2) - 0.3)),
    "orpo": (ORPO(0.5), 10 / 4 + 0.5 * nls(math.log(odds(math.exp(-10 / 4)) / odds(math.exp(-9 / 2))))),
    "cpo": (CPO(0.5, alpha=2.0), nls(0.5 * (-10 + 9)) + 2.0 * 10 / 4),
}


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if not loss.of_labels])
def test_values_by_hand(name):
    loss, expected = BY_HAND[name]
    assert type(loss) is LOSSES[name]
    assert loss(POLICY, REFERENCE if loss.needs_reference else None).item() == pytest.approx(expected, rel=1e-6)


def test_aot_matches_by_rank_and_not_by_pair():
    # log-ratios: policy 1, 4 and reference 3, -2; sorted 1, 4 and -2, 3: δ = 3, 1 (pair by pair it would be -2, 6)
    policy, reference = logps([1.0, 4.0], [0.0, 0.0]), logps([3.0, -2.0], [0.0, 0.0])
    assert AOT(1.0)(policy, reference).tolist() == pytest.approx([nls(3), nls(1)], rel=1e-6)
    # c = -2, 6 and r = 0, 0: sorted differences -2, 6
    assert AOTUnpaired(1.0)(policy, reference).tolist() == pytest.approx([nls(-2), nls(6)], rel=1e-6)


@pytest.mark.parametrize("mean", [-1e-6, -50.0])
def test_odds_are_stable_at_both_ends(mean):
    chosen = torch.tensor([mean], dtype=torch.float64)
    exact = math.log(-math.expm1(mean))
    assert losses._log1mexp(chosen).item() == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize(("chosen", "rejected"), [(0.0, 0.0), (0.0, -5.0), (-5.0, 0.0), (-1e-8, -5.0)])
def test_odds_of_certain_completions_give_numbers(chosen, rejected):
    sums = [torch.tensor([value], requires_grad=True) for value in (chosen, rejected)]
    loss = ORPO()(PairLogps(*sums, *torch.ones(2, 1)))
    assert torch.isfinite(torch.stack([loss, *torch.autograd.grad(loss, sums)])).all()


def test_discopop_far_on_the_wrong_side_is_linear():
    margin = torch.tensor([-200.0], requires_grad=True)  # m = σ(-4000) = 0, e^200 is beyond float32
    loss = DiscoPOP(1.0)(PairLogps(margin, *torch.zeros(3, 1)), logps([0.0], [0.0]))
    assert loss.item() == 200 and torch.autograd.grad(loss, margin)[0].item() == -1


def test_bcos_shift_is_the_moving_average_of_rewards_before():
    # 0.75 * 0 + 0.25 * 2 = 0.5; 0.75 * 0.5 + 0.25 * 4 = 1.375
    loss = BCOPair(0.5, delta_decay=0.75).after_step(2.0).after_step(4.0)
    assert loss.delta == 1.375
    assert BCOPair(0.5, delta_decay=0.75).with_state(loss.state()) == loss
    both = WeightedSum([DPO(0.5), BCOPair(0.5, delta_decay=0.75)], [1.0, 2.0])
    moved = both.after_step(2.0).after_step(4.0)
    assert moved.losses[1] == loss and both.with_state(moved.state()).losses[1] == loss


def test_a_sum_counts_each_loss_by_its_weight():
    both = WeightedSum([DPO(0.5), Hinge(0.1)], [2.0, 0.5])
    assert both(POLICY, REFERENCE).item() == pytest.approx(2 * nls(1.5) + 0.5 * 0.7, rel=1e-6)


SHORT = Group.pair(
    np.array([7]), *(np.array(ids) for ids in ([1, 2], [3, 4, 5])), *(np.ones(n, bool) for n in (2, 3))
)


def test_length_desensitised_sums_by_hand():
    # chosen has 2 tokens, rejected 3: the third counts a quarter. -1 - 2 = -3; -4 - 8 - 0.25 * 16 = -16
    sums = Shaping(ld_alpha=0.25).pair_logps(torch.tensor([-1.0, -2.0, -4.0, -8.0, -16.0]), packed_batch([SHORT]))
    assert (sums.chosen.item(), sums.rejected.item(), sums.rejected_tokens.item()) == (-3.0, -16.0, 3)


@pytest.mark.parametrize(
    "shaping, score",
    [
        (Shaping(divergence="forward_kl"), lambda x: 1 - math.exp(-x)),
        (Shaping(divergence="js"), lambda x: math.log(2 * sigmoid(x))),
        (Shaping(divergence="alpha", divergence_alpha=0.25), lambda x: (math.exp(-0.75 * x) - 1) / -0.75),
        (Shaping(divergence="alpha", divergence_alpha=2.0), lambda x: math.exp(x) - 1),
        (Shaping(divergence="alpha", divergence_alpha=1 - 1e-4), lambda x: x * (1 - 1e-4 * x / 2)),
    ],
)
def test_divergences_by_hand(shaping, score):
    # c = 2, r = -1
    policy, reference = shaping.scores(POLICY, REFERENCE)
    assert policy.chosen.item() == pytest.approx(score(2.0), rel=1e-5)
    assert policy.rejected.item() == pytest.approx(score(-1.0), rel=1e-5)
    assert reference.logratio.item() == 0 and policy.chosen_tokens is POLICY.chosen_tokens


def test_a_far_away_policy_keeps_its_divergence_finite():
    policy = logps([-500.0], [-1.0])
    scores, _ = Shaping(divergence="forward_kl").scores(policy, logps([-1.0], [-500.0]))
    assert scores.chosen.isfinite() and scores.rejected.item() == 1.0


def test_wpo_weights_by_hand():
    # chosen: log p - log Σp² = -1 + 1.5 and -2 + 2.5: mean 0.5; rejected: -3 + 2 three times: mean -1; e^(0.5 - 1)
    logps_N = torch.tensor([-1.0, -2.0, -3.0, -3.0, -3.0])
    log_sum_p2 = torch.tensor([-1.5, -2.5, -2.0, -2.0, -2.0])
    weights = wpo_weights(TokenStatistics(logps_N, logps_N, logps_N, log_sum_p2), packed_batch([SHORT]))
    assert weights.tolist() == pytest.approx([math.exp(-0.5)], rel=1e-6)


def test_the_sft_term_is_the_mean_token_of_chosen():
    assert Shaping(sft_weight=0.4).sft(POLICY).item() == pytest.approx(0.4 * 10 / 4, rel=1e-6)


MISTAKES = {
    "loss.name: unknown loss 'simp'; did you mean 'simpo'?": {"loss.name": "simp"},
    "loss.name: unknown loss 'sigmoid'; TRL's sigmoid is 'dpo' here": {"loss.name": "sigmoid"},
    "loss.name: unknown loss 'aott'; did you mean 'aot'?": {"loss.name": "[dpo, aott]"},
    "loss.name: unknown loss ['dpo']": {"loss.name": "[[dpo]]"},
    "one weight for each loss": {"loss.name": "[dpo, ipo]", "loss.weights": "[1]"},
    "loss.gamma 0.3: dpo has none; it is of simpo": {"loss.gamma": "0.3"},
    "loss.alpha 0.0: dpo has none; it is of cpo": {"loss.alpha": "0"},
    "loss.label_smoothing 0.1: ipo has none": {"loss.name": "ipo", "loss.label_smoothing": "0.1"},
    "loss.divergence js: not for nca_pair": {"loss.name": "nca_pair", "loss.divergence": "js"},
    "loss.divergence_alpha 0.3: loss.divergence js has none; it is of loss.divergence alpha": {
        "loss.divergence": "js", "loss.divergence_alpha": "0.3",
    },
    "that is loss.divergence reverse_kl": {"loss.divergence": "alpha", "loss.divergence_alpha": "1"},
    "loss.wpo weights pairs": {"loss.name": "aot", "loss.wpo": "true"},
    "the mean of plackett_luce is over groups, of the others over comparisons": {"loss.name": "[dpo, plackett_luce]"},
    "loss.sft_weight weighs pairs, and plackett_luce": {"loss.name": "plackett_luce", "loss.sft_weight": "0.1"},
    "loss.margin_column by: not for ipo; for dpo": {"loss.name": "ipo", "loss.margin_column": "by"},
    "loss.margin_scale 2.0: there are no margins; name loss.margin_column": {"loss.margin_scale": "2"},
    "loss.sft_weight is for comparisons, and kto has none": {"loss.name": "kto", "loss.sft_weight": "0.1"},
    "kto is of single completions, and does not add up with others": {"loss.name": "[dpo, kto]"},
    "reference.kind cached: loss.name kto needs the reference on completions of other": {
        "loss.name": "kto", "reference.kind": "cached", "reference.cache": "there",
    },
    "train.global_batch_size 1: loss.name kto compares with another prompt": {
        "loss.name": "kto", "train.global_batch_size": "1",
    },
    "loss.penalty 5.0: dpo has none; it is of dpop": {"loss.penalty": "5"},
    "loss.ld_alpha 0.5: for losses against a reference": {"loss.name": "simpo", "loss.ld_alpha": "0.5"},
    "loss.name orpo needs no reference": {"loss.name": "orpo", "reference.kind": "live"},
    "loss.name dpo needs one": {"reference.kind": "none"},
    "only a whole, live reference can follow the policy": {
        "reference.update_every": "5", "reference.kind": "cached", "reference.cache": "there",
    },
    "policy and reference must be one model": {"reference.update_every": "5", "reference.path": "other"},
}  # fmt: skip
NEEDED = {"model.path": "m", "data.train": "d", "deepspeed.config": "c", "output_dir": "o"}


def run_with(keys: dict[str, str]) -> config.TrainConfig:
    return cli.parse(["train", *(f"--{key}={value}" for key, value in (NEEDED | keys).items())])[1]


@pytest.mark.parametrize("message", MISTAKES)
def test_what_does_not_go_together_is_refused(message):
    with pytest.raises(ConfigError) as refused:
        run_with(MISTAKES[message])
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_reference_free_losses_have_no_reference_unasked():
    for name in ("simpo", "orpo", "cpo", "[simpo, orpo]"):
        run = run_with({"loss.name": name})
        assert run.reference.kind == "none"
        assert run_with({"loss.name": name, "reference.kind": "none"}) == run
    assert run_with({"loss.name": "[dpo, orpo]"}).reference.kind == "live"


def test_exo_without_smoothing_has_its_own_and_leaves_the_others_theirs():
    both = make_loss(config.LossSection(name=["dpo", "exo_pair"]))
    assert both.losses[0] == DPO(0.1, label_smoothing=0.0)
    own = EXOPair(0.1, label_smoothing=1e-3)(POLICY, REFERENCE)
    assert both.losses[1](POLICY, REFERENCE).item() == own.item()
