"""The same batch through TRL's loss: parity to 1e-5, where TRL is installed (`make bench` does)."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from dpo_ds.batch import packed_batch
from dpo_ds.config import LossSection
from dpo_ds.logprobs import TokenStatistics
from dpo_ds.losses import LOSSES, make_loss
from dpo_ds.training.objectives.shaping import Shaping, wpo_weights
from tests.tiny import random_pairs

trl = pytest.importorskip("trl")

PAIRS = random_pairs(6)
BETA = 0.3
TRL_NAME = {"dpo": "sigmoid"}
NOT_IN_TRL = ("simpo", "orpo", "cpo", "bco_pair", "dpop", "plackett_luce", "kto", "bco")  # or in trainers of their own
IN_TRL = [name for name in LOSSES if name not in NOT_IN_TRL]
KEYS = {
    "reverse_kl": {}, "js": {"f_divergence_type": "js_divergence"}, "forward_kl": {"f_divergence_type": "forward_kl"},
    "alpha": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5},
}  # fmt: skip


@pytest.fixture(scope="module")
def tokens():
    """Log-probs of policy and reference, and log Σ p², of the trained tokens of PAIRS in a batch's order."""
    generator = torch.Generator().manual_seed(0)
    count = len(packed_batch(PAIRS).targets)
    return [-3 * torch.rand(count, generator=generator) for _ in range(3)]


def ours(section: LossSection, tokens) -> float:
    batch, shaping = packed_batch(PAIRS), Shaping.of(section)
    policy, reference, log_sum_p2 = tokens
    logps = [shaping.pair_logps(values, batch) for values in (policy, reference)]
    losses = make_loss(section)(*shaping.scores(*logps))
    if section.wpo:
        losses = losses * wpo_weights(TokenStatistics(policy, policy, policy, log_sum_p2), batch)
    return losses.mean().item()


def theirs(
    names: list[str], weights: list[float], tokens, label_smoothing=0.0, ld_alpha=None, wpo=False, **keys
) -> float:
    """DPOTrainer._compute_loss, given per-token log-probs in place of a model."""
    batch = packed_batch(PAIRS)
    counts = batch.target_counts.tolist()
    order = [*range(0, len(counts), 2), *range(1, len(counts), 2)]  # TRL's batch is all chosen, then all rejected
    rows = [[part for part in values.split(counts)] for values in tokens]
    longest = max(counts)
    mask = torch.zeros(len(counts), 1 + longest, dtype=torch.long)
    padded = torch.zeros(3, len(counts), longest)
    for row, sequence in enumerate(order):
        mask[row, 1 : 1 + counts[sequence]] = 1
        for kind in range(3):
            padded[kind, row, : counts[sequence]] = rows[kind][sequence]
    policy, reference, log_sum_p2 = padded
    zeros = torch.zeros_like(policy)
    outputs = SimpleNamespace(
        log_probs=policy, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), log_sum_sq_probs=log_sum_p2
    )
    settings = dict(f_divergence_type="reverse_kl", f_alpha_divergence_coef=0.5) | keys
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
        args=SimpleNamespace(discopop_tau=0.05, gradient_checkpointing_kwargs=None), model=None, ref_model=None,
        aux_loss_enabled=False, ld_alpha=ld_alpha, precompute_ref_logps=ld_alpha is None, beta=BETA,
        label_smoothing=label_smoothing, use_weighting=wpo, loss_types=names, loss_weights=weights,
        _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0, _tp_size=1, **settings,
    )  # fmt: skip
    inputs = {"completion_mask": mask, "input_ids": mask, "attention_mask": mask}
    sums = reference.sum(dim=1).chunk(2)
    inputs |= {"ref_chosen_logps": sums[0], "ref_rejected_logps": sums[1]}

    def model(**_):
        return outputs

    model.training = False
    trainer.model = torch.nn.Identity().eval()
    trainer.model.is_gradient_checkpointing = False
    trainer.ref_model = lambda **_: SimpleNamespace(log_probs=reference)
    return trl.DPOTrainer._compute_loss(trainer, model, inputs, False).item()


@pytest.mark.parametrize("name", IN_TRL)
def test_a_loss_is_trls(name, tokens):
    # TRL's sigmoid knows no label smoothing
    smoothing = 0.1 if hasattr(LOSSES[name], "label_smoothing") and name != "dpo" else 0.0
    section = LossSection(name=name, beta=BETA, label_smoothing=smoothing)
    assert ours(section, tokens) == pytest.approx(
        theirs([TRL_NAME.get(name, name)], [1.0], tokens, smoothing), rel=1e-5
    )


def test_bco_is_trls_at_the_first_step(tokens):
    """TRL has no δ; ours begins at 0."""
    assert ours(LossSection(name="bco_pair", beta=BETA), tokens) == pytest.approx(
        theirs(["bco_pair"], [1.0], tokens), rel=1e-5
    )


@pytest.mark.parametrize("divergence", KEYS)
@pytest.mark.parametrize("name", [name for name in IN_TRL if LOSSES[name].of_differences])
def test_divergences_are_trls(name, divergence, tokens):
    smoothing = 0.1 if name == "exo_pair" else 0.0
    section = LossSection(name=name, beta=BETA, divergence=divergence, label_smoothing=smoothing)
    expected = theirs([TRL_NAME.get(name, name)], [1.0], tokens, smoothing, **KEYS[divergence])
    assert ours(section, tokens) == pytest.approx(expected, rel=1e-5)


def test_ld_wpo_and_sums_are_trls(tokens):
    assert ours(LossSection(beta=BETA, ld_alpha=0.4), tokens) == pytest.approx(
        theirs(["sigmoid"], [1.0], tokens, ld_alpha=0.4), rel=1e-5
    )
    assert ours(LossSection(beta=BETA, wpo=True), tokens) == pytest.approx(
        theirs(["sigmoid"], [1.0], tokens, wpo=True), rel=1e-5
    )
    section = LossSection(name=["dpo", "nca_pair", "aot"], weights=[0.8, 0.2, 1.5], beta=BETA)
    assert ours(section, tokens) == pytest.approx(
        theirs(["sigmoid", "nca_pair", "aot"], [0.8, 0.2, 1.5], tokens), rel=1e-5
    )


def test_simpo_and_orpos_odds_are_trls(tokens):
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    batch = packed_batch(PAIRS)
    logps = batch.pair_logps(tokens[0])
    means = (logps.chosen / logps.chosen_tokens, logps.rejected / logps.rejected_tokens)
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu"), beta=BETA, simpo_gamma=0.7, label_smoothing=0.0, alpha=0.0,
        loss_type="simpo",
    )  # fmt: skip
    simpo = make_loss(LossSection(name="simpo", beta=BETA, gamma=0.7))(logps, None)
    torch.testing.assert_close(simpo, CPOTrainer.cpo_loss(trainer, *means)[0], rtol=1e-5, atol=0)
    trainer.loss_type = "sigmoid"
    cpo = make_loss(LossSection(name="cpo", beta=BETA, alpha=0))(logps, None)
    torch.testing.assert_close(cpo, CPOTrainer.cpo_loss(trainer, logps.chosen, logps.rejected)[0], rtol=1e-5, atol=0)
    orpo = make_loss(LossSection(name="orpo", beta=BETA))(logps, None)
    torch.testing.assert_close(orpo + means[0], -ORPOTrainer.odds_ratio_loss(trainer, *means)[0], rtol=1e-5, atol=1e-6)


def test_kto_is_trls():
    """KTOTrainer._compute_loss, given log-probs and those of mismatched completions in place of a model."""
    generator = torch.Generator().manual_seed(0)
    policy, reference = (-3 * torch.rand(6, 4, generator=generator) for _ in range(2))
    mismatched, of_reference = (-9 * torch.rand(6, generator=generator) for _ in range(2))
    mismatched = mismatched.maximum(of_reference)  # a KL above 0
    labels = torch.tensor([True, False, False, True, True, False])
    zeros, mask = torch.zeros_like(policy), torch.ones(6, 5, dtype=torch.long)
    outputs = SimpleNamespace(log_probs=policy, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
        model=SimpleNamespace(training=False), aux_loss_enabled=False, precompute_ref_logps=True, calculate_KL=True,
        loss_type="kto", beta=BETA, desirable_weight=1.5, undesirable_weight=0.5, _total_train_tokens=0, _tp_size=1,
        _metrics=defaultdict(lambda: defaultdict(list)), _compute_kl_logps=lambda model, batch: mismatched,
    )  # fmt: skip
    inputs = {"completion_mask": mask, "input_ids": mask, "attention_mask": mask, "label": labels}
    inputs |= {"ref_logps": reference.sum(1), "ref_KL_logps": of_reference}
    theirs = trl.KTOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    loss = make_loss(LossSection(name="kto", beta=BETA, desirable_weight=1.5, undesirable_weight=0.5))
    baseline = loss.baseline((mismatched - of_reference).mean().item())
    ours = loss(policy.sum(1) - reference.sum(1), labels, baseline).mean()
    assert baseline > 0 and ours.item() == pytest.approx(theirs.item(), rel=1e-5)
