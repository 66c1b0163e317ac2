"""Loss values against arithmetic by hand, and DPO's gradient against the paper's closed form."""

import math

import pytest
import torch

from dpo_ds import config
from dpo_ds.batch import PairLogps
from dpo_ds.losses import DPO, LOSSES, make_loss


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


def test_config_knows_every_loss_and_its_fields():
    assert set(config.LOSSES) == set(LOSSES)
    section = config.LossSection(name="dpo", beta=0.2, label_smoothing=0.05)
    assert make_loss(section) == DPO(beta=0.2, label_smoothing=0.05)
    assert make_loss(config.LossSection()) == DPO(), "a default is written twice and differs"
