"""The loss section: which preference loss, and what composes with it."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field, field_validator, model_validator

from dpo_ds.config.section import Section, did_you_mean
from dpo_ds.errors import shorten

LossName = Literal[
    "dpo", "dpop", "plackett_luce", "kto", "bco", "robust", "hinge", "ipo", "sigmoid_norm", "exo_pair", "nca_pair",
    "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "simpo", "orpo", "cpo",
]  # fmt: skip


LEAST = 1e-6  # of what losses divide by, whose square float32 must hold


class Default:
    """Says what the losses begin with: written here, where `--help` reads it without torch, and taken by losses.py."""

    beta = 0.1
    label_smoothing = 0.0
    gamma = 0.5
    alpha = 1.0
    tau = 0.05
    delta_decay = 0.9
    penalty = 50.0
    desirable_weight = 1.0
    margin_scale = 1.0
    divergence_alpha = 0.5


class LossSection(Section):
    """Holds the keys of all losses; which of them the chosen one has, losses.py knows and checks (`make_loss`)."""

    name: LossName | list[LossName] = Field("dpo", description="the loss, or a list of them to add up")
    weights: list[float] | None = Field(None, description="of the losses that name lists; 1 each if not given")
    beta: float = Field(
        Default.beta,
        ge=LEAST,
        le=1000,
        description="strength of the pull to the reference; orpo: weight of its odds ratio",
    )
    label_smoothing: float = Field(
        Default.label_smoothing,
        ge=0,
        lt=0.5,
        description="probability that a label is flipped (cDPO); exo_pair: 0 stands for 0.001",
    )
    gamma: float | None = Field(None, ge=0, description=f"simpo: the margin to reach; {Default.gamma} if not given")
    alpha: float | None = Field(None, ge=0, description=f"cpo: weight of its SFT part; {Default.alpha} if not given")
    tau: float | None = Field(
        None, ge=LEAST, description=f"discopop: temperature of its modulation; {Default.tau} if not given"
    )
    delta_decay: float | None = Field(
        None, ge=0, lt=1, description=f"bco, bco_pair: of the average of rewards; {Default.delta_decay} if not given"
    )
    desirable_weight: float | None = Field(
        None, ge=0, description=f"kto, bco: of desirable completions; {Default.desirable_weight} if not given"
    )
    undesirable_weight: float | None = Field(
        None, ge=0, description=f"kto, bco: of undesirable completions; {Default.desirable_weight} if not given"
    )
    penalty: float | None = Field(
        None, ge=0, description=f"dpop: cost of chosen falling below the reference; {Default.penalty} if not given"
    )
    margin_column: str | None = Field(
        None, description="dpo: raw column of how much better chosen is (0 or more), to be taken from its margin (ODPO)"
    )
    margin_scale: float | None = Field(
        None, ge=0, description=f"dpo: what the margins are multiplied with; {Default.margin_scale} if not given"
    )
    sft_weight: float = Field(0.0, ge=0, description="adds so much of chosen's mean negative log-likelihood (RPO)")
    ld_alpha: float = Field(1.0, ge=0, le=1, description="what tokens beyond the shorter completion count (LD-DPO)")
    wpo: bool = Field(False, description="weights pairs by how likely the policy finds them (WPO)")
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = Field(
        "reverse_kl", description="the f-divergence to the reference (f-DPO)"
    )
    divergence_alpha: float = Field(
        Default.divergence_alpha, ge=0, description="of loss.divergence alpha; 1 is reverse_kl"
    )

    @field_validator("name", mode="before")
    @classmethod
    def _known(cls, name):
        if not name:
            raise ValueError("an empty list; name at least one loss")
        for given in name if isinstance(name, list) else [name]:
            if given not in get_args(LossName):
                nearest = did_you_mean(str(given), get_args(LossName))
                nearest = "TRL's sigmoid is 'dpo' here" if given == "sigmoid" else nearest
                raise ValueError(f"unknown loss {shorten(given)}; {nearest}")
        return name

    @field_validator("weights")
    @classmethod
    def _none_below_zero(cls, weights):
        if weights is not None and (min(weights, default=0) < 0 or not any(weights)):
            raise ValueError(f"{shorten(weights)}: a weight is 0 or more, and one of them above 0")
        return weights

    @model_validator(mode="after")
    def _parts_fit(self):
        if self.weights is not None and (isinstance(self.name, str) or len(self.weights) != len(self.names)):
            raise ValueError(
                f"loss.weights {self.weights}: one weight for each loss that loss.name lists ({', '.join(self.names)})"
            )
        if self.divergence != "alpha" and self.divergence_alpha != Default.divergence_alpha:
            problem = f"loss.divergence {self.divergence} has none; it is of loss.divergence alpha"
            raise ValueError(f"loss.divergence_alpha {self.divergence_alpha}: {problem}")
        if self.divergence == "alpha" and self.divergence_alpha == 1:
            raise ValueError("loss.divergence_alpha 1: that is loss.divergence reverse_kl")
        return self

    @model_validator(mode="after")
    def _scale_has_a_column(self):
        if self.margin_scale is not None and self.margin_column is None:
            raise ValueError(f"loss.margin_scale {self.margin_scale}: there are no margins; name loss.margin_column")
        return self

    @property
    def names(self) -> list[str]:
        return [self.name] if isinstance(self.name, str) else self.name


class ImplicitRewardSection(Section):
    beta: float = Field(Default.beta, ge=LEAST, le=1000, description="of the implicit rewards")
