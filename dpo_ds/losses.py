"""Preference losses: one frozen dataclass each, hyper-parameters as fields, the formula as __call__.

A loss takes the policy's and the reference's summed log-probs and gives one value a pair. Below, c and r are the
log-ratios log π - log π_ref of chosen and rejected, Δ = c - r, |y| the trained tokens of a completion, ε
label_smoothing, σ the logistic function. What composes with every loss (an SFT term, LD, WPO, f-divergences) is in
shaping.py.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import ClassVar, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dpo_ds.batch import PairLogps
from dpo_ds.config import Default, LossName, LossSection, ReferenceSection, RlConfig, TrainConfig
from dpo_ds.errors import ConfigError


@dataclass(frozen=True)
class Loss:
    """Gives what all losses share.

    needs_reference: false for losses of log π alone, whose `reference` is None. across_pairs: a pair's value depends on
    the other pairs, so it is to be called with the whole global batch. of_differences: it depends on c and r through
    their difference alone, so that an f-divergence's scores may stand for them (arXiv 2309.16240). per_group: its mean
    is over groups and not over comparisons. takes_margins: chosen is to be better by a margin where one is given.
    of_labels: of single completions, `Labelled`; needs_kl: for its baseline.
    """

    beta: float = Default.beta
    needs_reference: ClassVar[bool] = True
    across_pairs: ClassVar[bool] = False
    of_differences: ClassVar[bool] = False
    per_group: ClassVar[bool] = False
    takes_margins: ClassVar[bool] = False
    of_labels: ClassVar[bool] = False
    needs_kl: ClassVar[bool] = False

    def after_step(self, mean_reward: float) -> Loss:
        """The loss of the next step, given β times the mean of all c and r of this step's global batch."""
        return self

    def state(self) -> dict[str, float]:
        """Returns what `after_step` has changed, for checkpoints; `with_state` takes it back."""
        return {}

    def with_state(self, state: dict[str, float]) -> Loss:
        return replace(self, **state)


@dataclass(frozen=True)
class DPO(Loss):
    """Direct Preference Optimization, eq. 7 of arXiv 2305.18290; label_smoothing > 0 is cDPO (Mitchell 2023).

    Its gradient is -beta σ(r̂_l - r̂_w) (∇ log π(y_w|x) - ∇ log π(y_l|x)) with r̂ = beta log π/π_ref. Where margins are
    given, margin_scale times the margin is taken from βΔ first: ODPO, eq. 8 of arXiv 2402.10571.
    """

    label_smoothing: float = Default.label_smoothing
    margin_scale: float = Default.margin_scale
    of_differences: ClassVar[bool] = True
    takes_margins: ClassVar[bool] = True

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:  # [pairs]
        margin = self.beta * (policy.logratio - reference.logratio)
        if policy.margins is not None:
            margin = margin - self.margin_scale * policy.margins
        return -(1 - self.label_smoothing) * logsigmoid(margin) - self.label_smoothing * logsigmoid(-margin)


@dataclass(frozen=True)
class DPOP(Loss):
    """DPO-Positive, eq. 3 of arXiv 2402.13228: -log σ(β(Δ - penalty max(0, -c))), so that chosen does not fall."""

    penalty: float = Default.penalty

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        chosen, rejected = rewards(1.0, policy, reference)
        return -logsigmoid(self.beta * (chosen - rejected - self.penalty * torch.relu(-chosen)))


@dataclass(frozen=True)
class PlackettLuce(Loss):
    """DPO of rankings, eq. 20 of arXiv 2305.18290 (appendix A.3): each completion, best first, against itself and all
    that are worse: Σ_i -log(e^βs_i / (e^βs_i + Σ_{j worse than i} e^βs_j)), s = log π - log π_ref.

    Of one better than several others it is eq. 9 of arXiv 2406.09215 (S-DPO), of a pair DPO. Equally good completions
    are never weighed against each other. Gives one value for each completion that is better than another.
    """

    of_differences: ClassVar[bool] = True
    per_group: ClassVar[bool] = True

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:  # [completions better than another]
        return plackett_luce(self.beta * (policy.logratio - reference.logratio), policy.rivals)


def plackett_luce(margins: Tensor, rivals: Tensor | None) -> Tensor:  # [completions better than another]
    """Returns -log(e^r_i / (e^r_i + Σ_{j worse than i} e^r_j)) for each i.

    margins [comparisons]: r_i - r_j, those of an i one after another; rivals: how many each i has, None for one.
    """
    behind = -margins
    rivals = torch.ones(len(margins), dtype=torch.int64, device=margins.device) if rivals is None else rivals
    if not len(rivals):
        return behind
    highest = torch.segment_reduce(behind.detach(), "max", lengths=rivals, unsafe=True)
    above = torch.exp(behind - highest.repeat_interleave(rivals))
    log_sum = highest + torch.segment_reduce(above, "sum", lengths=rivals, unsafe=True).log()
    return -logsigmoid(-log_sum)


@dataclass(frozen=True)
class Robust(Loss):
    """Robust DPO, eq. 12 of arXiv 2403.00409: unbiased where a share label_smoothing of the labels is flipped."""

    label_smoothing: float = Default.label_smoothing
    of_differences: ClassVar[bool] = True

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        margin = self.beta * (policy.logratio - reference.logratio)
        kept, flipped = 1 - self.label_smoothing, self.label_smoothing
        return (-kept * logsigmoid(margin) + flipped * logsigmoid(-margin)) / (1 - 2 * flipped)


@dataclass(frozen=True)
class Hinge(Loss):
    """SLiC's hinge on DPO's margin, arXiv 2305.10425 and 2309.06657: max(0, 1 - βΔ)."""

    of_differences: ClassVar[bool] = True

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        return torch.relu(1 - self.beta * (policy.logratio - reference.logratio))


@dataclass(frozen=True)
class IPO(Loss):
    """Identity preference optimisation, eq. 17 of arXiv 2310.12036, on token means: (c/|y_c| - r/|y_r| - 1/(2β))²."""

    of_differences: ClassVar[bool] = True

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        return (_mean_logratio(policy, reference) - 1 / (2 * self.beta)).square()


@dataclass(frozen=True)
class SigmoidNorm(Loss):
    """DPO on token means: -log σ(β(c/|y_c| - r/|y_r|)) (Tulu 3, arXiv 2411.15124)."""

    of_differences: ClassVar[bool] = True

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        return -logsigmoid(self.beta * _mean_logratio(policy, reference))


@dataclass(frozen=True)
class EXOPair(Loss):
    """Exact optimisation on pairs, eq. 16 of arXiv 2402.00856: the reverse KL from σ(βΔ) to the smoothed label.

    label_smoothing 0, whose logarithm has no value, stands for 0.001.
    """

    label_smoothing: float = Default.label_smoothing
    of_differences: ClassVar[bool] = True

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        margin = self.beta * (policy.logratio - reference.logratio)
        smoothing = self.label_smoothing or 1e-3
        kept, flipped = math.log1p(-smoothing), math.log(smoothing)
        preferred = torch.sigmoid(margin) * (logsigmoid(margin) - kept)
        return preferred + torch.sigmoid(-margin) * (logsigmoid(-margin) - flipped)


@dataclass(frozen=True)
class NCAPair(Loss):
    """Noise contrastive alignment on pairs, arXiv 2402.05369: -log σ(βc) - ½ log σ(-βc) - ½ log σ(-βr)."""

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        chosen, rejected = rewards(self.beta, policy, reference)
        return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


@dataclass(frozen=True)
class BCOPair(Loss):
    """Binary classifier optimisation on pairs, eq. 10 of arXiv 2404.04656: -log σ(βc - δ) - log σ(-(βr - δ)).

    delta is the moving average of the global batches' mean rewards before this step: the older ones count
    delta_decay times what they did a step before.
    """

    delta_decay: float = Default.delta_decay
    delta: float = 0.0

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        chosen, rejected = rewards(self.beta, policy, reference)
        return -logsigmoid(chosen - self.delta) - logsigmoid(self.delta - rejected)

    def after_step(self, mean_reward: float) -> BCOPair:
        return replace(self, delta=self.delta_decay * self.delta + (1 - self.delta_decay) * mean_reward)

    def state(self) -> dict[str, float]:
        return {"delta": self.delta}


@dataclass(frozen=True)
class Labelled(Loss, ABC):
    """A loss of single completions, each said to be desirable or not; c is log π - log π_ref of one."""

    desirable_weight: float = Default.desirable_weight
    undesirable_weight: float = Default.desirable_weight
    of_labels: ClassVar[bool] = True

    @abstractmethod
    def baseline(self, kl: float) -> float:
        """Returns what βc is held against. kl: of the policy from the reference, where `needs_kl`."""

    @abstractmethod
    def values(self, rewards: Tensor) -> Tensor:
        """Returns the loss of a completion whose reward is so far above the baseline where that is good."""

    def __call__(self, logratios: Tensor, labels: Tensor, baseline: float) -> Tensor:  # [completions]
        sign = torch.where(labels, 1.0, -1.0)
        weights = torch.where(labels, self.desirable_weight, self.undesirable_weight)
        return weights * self.values(sign * (self.beta * logratios - baseline))


@dataclass(frozen=True)
class KTO(Labelled):
    """Kahneman-Tversky optimisation, eq. 7 of arXiv 2402.01306: λ (1 - σ(±β(c - z))), z the KL from policy to reference
    as completions of other prompts in the same global batch estimate it, 0 at the least; no gradient flows through it.
    """

    needs_kl: ClassVar[bool] = True

    def baseline(self, kl: float) -> float:
        return self.beta * max(0.0, kl)

    def values(self, rewards: Tensor) -> Tensor:
        return torch.sigmoid(-rewards)


@dataclass(frozen=True)
class BCO(Labelled):
    """Binary classifier optimisation, eq. 10 of arXiv 2404.04656: -log σ(±(βc - δ)).

    delta is the moving average of the global batches' mean rewards before this step, of desirable and of undesirable
    completions alike; the older ones count delta_decay times what they did a step before.
    """

    delta_decay: float = Default.delta_decay
    delta: float = 0.0

    def baseline(self, kl: float) -> float:
        return self.delta

    def values(self, rewards: Tensor) -> Tensor:
        return -logsigmoid(rewards)

    def after_step(self, mean_reward: float) -> BCO:
        return replace(self, delta=self.delta_decay * self.delta + (1 - self.delta_decay) * mean_reward)

    def state(self) -> dict[str, float]:
        return {"delta": self.delta}


@dataclass(frozen=True)
class SPPOHard(Loss):
    """Self-play preference optimisation with hard labels, arXiv 2405.00675: (c - 1/(2β))² + (r + 1/(2β))²."""

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        chosen, rejected = rewards(1.0, policy, reference)
        return (chosen - 0.5 / self.beta).square() + (rejected + 0.5 / self.beta).square()


@dataclass(frozen=True)
class APOZero(Loss):
    """Anchored preference optimisation for chosen answers better than the policy's, eq. 7 of arXiv 2408.06266:
    1 - σ(βc) + σ(βr).
    """

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        chosen, rejected = rewards(self.beta, policy, reference)
        return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


@dataclass(frozen=True)
class APODown(Loss):
    """Anchored preference optimisation for a policy better than the chosen answers, eq. 8 of arXiv 2408.06266:
    σ(βc) + 1 - σ(βΔ).
    """

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        chosen, rejected = rewards(self.beta, policy, reference)
        return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)


@dataclass(frozen=True)
class DiscoPOP(Loss):
    """Log-ratio modulated loss, arXiv 2406.08414: -(1 - m) log σ(z) + m e^(-z), z = βΔ, m = σ(z/τ)."""

    tau: float = Default.tau
    of_differences: ClassVar[bool] = True

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        margin = self.beta * (policy.logratio - reference.logratio)
        ratio = margin / self.tau
        exponential = torch.exp(logsigmoid(ratio) - margin)  # as a product it would be 0 times inf
        return -torch.sigmoid(-ratio) * logsigmoid(margin) + exponential


@dataclass(frozen=True)
class AOT(Loss):
    """Alignment by optimal transport, paired, arXiv 2406.05882: DPO between the sorted log-ratios of both models.

    δ = sort(log π(y_c) - log π(y_r)) - sort(the same of π_ref), over the global batch.
    """

    label_smoothing: float = Default.label_smoothing
    across_pairs: ClassVar[bool] = True

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        return _smoothed(self, policy.logratio.sort().values - reference.logratio.sort().values)


@dataclass(frozen=True)
class AOTUnpaired(Loss):
    """Alignment by optimal transport, unpaired, arXiv 2406.05882: δ = sort(c) - sort(r), over the global batch."""

    label_smoothing: float = Default.label_smoothing
    across_pairs: ClassVar[bool] = True

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        chosen, rejected = rewards(1.0, policy, reference)
        return _smoothed(self, chosen.sort().values - rejected.sort().values)


@dataclass(frozen=True)
class SimPO(Loss):
    """Simple preference optimisation, eq. 6 of arXiv 2405.14734: -log σ(β(mean log π_c - mean log π_r) - γ)."""

    gamma: float = Default.gamma
    needs_reference: ClassVar[bool] = False

    def __call__(self, policy: PairLogps, reference: None = None) -> Tensor:
        chosen, rejected = _means(policy)
        return -logsigmoid(self.beta * (chosen - rejected) - self.gamma)


@dataclass(frozen=True)
class ORPO(Loss):
    """Odds ratio preference optimisation, eq. 6 and 7 of arXiv 2403.07691: the mean token's negative log-likelihood of
    chosen, plus beta (the paper's λ) times -log σ(log odds_c - log odds_r), odds p / (1 - p) of the length-mean
    probability.
    """

    needs_reference: ClassVar[bool] = False

    def __call__(self, policy: PairLogps, reference: None = None) -> Tensor:
        chosen, rejected = _means(policy)
        log_odds_ratio = (chosen - _log1mexp(chosen)) - (rejected - _log1mexp(rejected))
        return -chosen - self.beta * logsigmoid(log_odds_ratio)


@dataclass(frozen=True)
class CPO(Loss):
    """Contrastive preference optimisation, eq. 7 of arXiv 2401.08417: -log σ(β(log π_c - log π_r)) + the mean token's
    negative log-likelihood of chosen, times alpha.
    """

    alpha: float = Default.alpha
    needs_reference: ClassVar[bool] = False

    def __call__(self, policy: PairLogps, reference: None = None) -> Tensor:
        return -logsigmoid(self.beta * policy.logratio) - self.alpha * _means(policy)[0]


class WeightedSum:
    """Several losses on the same pairs, each times its weight: as mixed preference optimisation (arXiv 2411.10442)."""

    def __init__(self, losses: Sequence[Loss], weights: Sequence[float]):
        self.losses, self.weights = tuple(losses), tuple(weights)
        self.beta = losses[0].beta
        self.needs_reference = any(loss.needs_reference for loss in losses)
        self.across_pairs = any(loss.across_pairs for loss in losses)
        self.per_group, self.of_labels, self.needs_kl = losses[0].per_group, False, False  # all alike

    def __call__(self, policy: PairLogps, reference: PairLogps | None) -> Tensor:
        return sum(w * loss(policy, reference) for w, loss in zip(self.weights, self.losses, strict=True))

    def after_step(self, mean_reward: float) -> WeightedSum:
        return WeightedSum([loss.after_step(mean_reward) for loss in self.losses], self.weights)

    def state(self) -> dict[int, dict]:
        return {index: loss.state() for index, loss in enumerate(self.losses)}

    def with_state(self, state: dict[int, dict]) -> WeightedSum:
        return WeightedSum([loss.with_state(state[i]) for i, loss in enumerate(self.losses)], self.weights)


LOSSES: dict[str, type[Loss]] = {
    "dpo": DPO,
    "dpop": DPOP,
    "plackett_luce": PlackettLuce,
    "kto": KTO,
    "bco": BCO,
    "robust": Robust,
    "hinge": Hinge,
    "ipo": IPO,
    "sigmoid_norm": SigmoidNorm,
    "exo_pair": EXOPair,
    "nca_pair": NCAPair,
    "bco_pair": BCOPair,
    "sppo_hard": SPPOHard,
    "aot": AOT,
    "aot_unpaired": AOTUnpaired,
    "apo_zero": APOZero,
    "apo_down": APODown,
    "discopop": DiscoPOP,
    "simpo": SimPO,
    "orpo": ORPO,
    "cpo": CPO,
}


if LOSSES.keys() != set(get_args(LossName)):
    raise ImportError(f"LOSSES and config.LossName differ in {sorted(LOSSES.keys() ^ set(get_args(LossName)))}")


def make_loss(section: LossSection) -> Loss | WeightedSum:
    """Returns the loss, or sum of losses, that the section names; a key left at null keeps the loss's own default.

    Raises:
        ConfigError: a key that the loss would ignore, or that has no meaning for it.
    """
    chosen = [LOSSES[name] for name in section.names]
    _check(section, chosen)
    losses = [_make(loss, section) for loss in chosen]
    return losses[0] if isinstance(section.name, str) else WeightedSum(losses, section.weights or [1.0] * len(losses))


def _make(loss: type[Loss], section: LossSection) -> Loss:
    given = {field.name: getattr(section, field.name, None) for field in fields(loss)}
    return loss(**{name: value for name, value in given.items() if value is not None})


def _check(section: LossSection, chosen: list[type[Loss]]) -> None:
    listed = ", ".join(section.names)
    for key in LossSection.model_fields:
        owners = [name for name, loss in LOSSES.items() if key in {field.name for field in fields(loss)}]
        differs = getattr(section, key) != LossSection.model_fields[key].default
        if owners and differs and not set(owners) & set(section.names):
            raise ConfigError(f"loss.{key} {getattr(section, key)}: {listed} has none; it is of {', '.join(owners)}")
    if section.divergence != "reverse_kl" and not all(loss.of_differences for loss in chosen):
        fitting = ", ".join(name for name, loss in LOSSES.items() if loss.of_differences)
        raise ConfigError(f"loss.divergence {section.divergence}: not for {listed}; for {fitting}")
    if len(chosen) > 1 and any(loss.of_labels for loss in chosen):
        of_labels = ", ".join(name for name in section.names if LOSSES[name].of_labels)
        raise ConfigError(f"loss.name {listed}: {of_labels} is of single completions, and does not add up with others")
    for key, is_set in (("sft_weight", section.sft_weight), ("wpo", section.wpo), ("ld_alpha", section.ld_alpha != 1)):
        if is_set and chosen[0].of_labels:
            raise ConfigError(f"loss.{key} is for comparisons, and {listed} has none; leave it out")
    if len({loss.per_group for loss in chosen}) > 1:
        listwise = ", ".join(name for name, loss in zip(section.names, chosen, strict=True) if loss.per_group)
        raise ConfigError(f"loss.name {listed}: the mean of {listwise} is over groups, of the others over comparisons")
    for key in ("sft_weight", "wpo"):
        if getattr(section, key) and any(loss.per_group for loss in chosen):
            raise ConfigError(f"loss.{key} weighs pairs, and {listed} looks at whole groups; use one of them")
    if section.margin_column is not None and not all(loss.takes_margins for loss in chosen):
        fitting = ", ".join(name for name, loss in LOSSES.items() if loss.takes_margins)
        raise ConfigError(f"loss.margin_column {section.margin_column}: not for {listed}; for {fitting}")
    if section.wpo and any(loss.across_pairs for loss in chosen):
        raise ConfigError(f"loss.wpo weights pairs, and {listed} matches completions across pairs; use one of them")
    if section.ld_alpha != 1 and not all(loss.needs_reference for loss in chosen):
        raise ConfigError(f"loss.ld_alpha {section.ld_alpha}: for losses against a reference; {listed} has none")


def with_reference_of_loss(run: TrainConfig) -> TrainConfig:
    """Returns the run with no reference where its loss needs none and the section is not given.

    Raises:
        ConfigError: a reference that the loss does not need, none where it needs one, or as `make_loss` does.
    """
    loss, wanted = make_loss(run.loss), run.reference
    needed = loss.needs_reference
    if loss.needs_kl and wanted.kind == "cached":
        problem = f"loss.name {run.loss.name} needs the reference on completions of other prompts, which no cache has"
        raise ConfigError(f"reference.kind cached: {problem}; set reference.kind live, or train adapters")
    if loss.needs_kl and run.train.global_batch_size < 2:
        raise ConfigError(f"train.global_batch_size 1: loss.name {run.loss.name} compares with another prompt; give 2")
    if needed and wanted.kind == "none":
        raise ConfigError(f"reference.kind none: loss.name {run.loss.name} needs one: live, cached or adapter")
    if needed or wanted.kind == "none" and not (wanted.path or wanted.cache):
        return run
    if wanted.model_fields_set:
        raise ConfigError(
            f"reference.kind {wanted.kind}: loss.name {run.loss.name} needs no reference; leave out the section "
            "reference, or set reference.kind none alone"
        )
    return run.model_copy(update={"reference": ReferenceSection(kind="none")})


def check_online(run: RlConfig) -> None:
    """Raises ConfigError for a loss that cannot be of a prompt's best and worst completion, or as `make_loss` does."""
    loss, named = make_loss(run.loss), f"loss.name {', '.join(run.loss.names)}"
    if loss.of_labels:
        raise ConfigError(f"{named}: is of single completions; rl.algorithm online_dpo has pairs, dpo is for them")
    if run.loss.margin_column is not None:
        raise ConfigError(f"loss.margin_column {run.loss.margin_column}: completions that are drawn have no columns")
    if loss.needs_reference and run.reference.kind == "none":
        raise ConfigError(f"reference.kind none: {named} needs one: live or adapter")


def rewards(beta: float, policy: PairLogps, reference: PairLogps | None) -> tuple[Tensor, Tensor]:
    """β(log π - log π_ref) of chosen and rejected, [pairs] each; β log π without a reference."""
    if reference is None:
        return beta * policy.chosen, beta * policy.rejected
    return beta * (policy.chosen - reference.chosen), beta * (policy.rejected - reference.rejected)


def _means(policy: PairLogps) -> tuple[Tensor, Tensor]:
    """Log-probs a trained token of chosen and rejected, [pairs] each."""
    return policy.chosen / policy.chosen_tokens, policy.rejected / policy.rejected_tokens


def _mean_logratio(policy: PairLogps, reference: PairLogps) -> Tensor:  # [pairs]
    """c/|y_c| - r/|y_r|."""
    chosen, rejected = rewards(1.0, policy, reference)
    return chosen / policy.chosen_tokens - rejected / policy.rejected_tokens


def _smoothed(loss: AOT | AOTUnpaired, difference: Tensor) -> Tensor:  # [pairs]
    margin = loss.beta * difference
    return -(1 - loss.label_smoothing) * logsigmoid(margin) - loss.label_smoothing * logsigmoid(-margin)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x <= 0, accurate at both ends (Mächler 2012); 0, whose value is none, counts as the nearest."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    return torch.where(x > -math.log(2), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))
