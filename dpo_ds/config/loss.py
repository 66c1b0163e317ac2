"""The loss section: which preference loss, and what composes with it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from dpo_ds.config.section import Section, did_you_mean

# dpo_ds.losses.LOSSES with each one's own keys besides beta; kept equal by a test, because that module imports torch.
LOSSES: dict[str, tuple[str, ...]] = {
    "dpo": ("label_smoothing",),
    "robust": ("label_smoothing",),
    "hinge": (),
    "ipo": (),
    "sigmoid_norm": (),
    "exo_pair": ("label_smoothing",),
    "nca_pair": (),
    "bco_pair": ("delta_decay",),
    "sppo_hard": (),
    "aot": ("label_smoothing",),
    "aot_unpaired": ("label_smoothing",),
    "apo_zero": (),
    "apo_down": (),
    "discopop": ("tau",),
    "simpo": ("gamma",),
    "orpo": (),
    "cpo": ("alpha",),
}
DIVERGENCE_ALPHA = 0.5  # where none is given
REFERENCE_FREE = ("simpo", "orpo", "cpo")
ACROSS_PAIRS = ("aot", "aot_unpaired")
OF_DIFFERENCES = ("dpo", "robust", "hinge", "ipo", "sigmoid_norm", "exo_pair", "discopop")


class LossSection(Section):
    name: str | list[str] = Field("dpo", description=f"{', '.join(LOSSES)}, or a list of them to add up")
    weights: list[float] | None = Field(None, description="of the losses that name lists; 1 each if not given")
    beta: float = Field(0.1, gt=0, description="strength of the pull to the reference; orpo: weight of its odds ratio")
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="probability that a label is flipped (cDPO); exo_pair: 0 stands for 0.001"
    )
    gamma: float | None = Field(None, ge=0, description="simpo: the margin to reach; 0.5 if not given")
    alpha: float | None = Field(None, ge=0, description="cpo: weight of its SFT part; 1 if not given")
    tau: float | None = Field(None, gt=0, description="discopop: temperature of its modulation; 0.05 if not given")
    delta_decay: float | None = Field(
        None, ge=0, lt=1, description="bco_pair: of the moving average of rewards; 0.9 if not given"
    )
    sft_weight: float = Field(0.0, ge=0, description="adds so much of chosen's mean negative log-likelihood (RPO)")
    ld_alpha: float = Field(1.0, ge=0, le=1, description="what tokens beyond the shorter completion count (LD-DPO)")
    wpo: bool = Field(False, description="weights pairs by how likely the policy finds them (WPO)")
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = Field(
        "reverse_kl", description="the f-divergence to the reference (f-DPO)"
    )
    divergence_alpha: float = Field(DIVERGENCE_ALPHA, ge=0, description="of loss.divergence alpha; 1 is reverse_kl")

    @field_validator("name")
    @classmethod
    def _known(cls, name):
        if not name:
            raise ValueError("an empty list; name at least one loss")
        for given in names_of(name):
            if given not in LOSSES:
                nearest = "TRL's sigmoid is 'dpo' here" if given == "sigmoid" else did_you_mean(given, LOSSES)
                raise ValueError(f"unknown loss {given!r}; {nearest}")
        return name

    @model_validator(mode="after")
    def _parts_fit(self):
        """What a loss would ignore or has no meaning for is refused."""
        names = names_of(self.name)
        listed = ", ".join(names)
        if self.weights is not None and (isinstance(self.name, str) or len(self.weights) != len(names)):
            raise ValueError(f"loss.weights {self.weights}: one weight for each loss that loss.name lists ({listed})")
        for key in ("label_smoothing", "gamma", "alpha", "tau", "delta_decay"):
            owners = [name for name, own in LOSSES.items() if key in own]
            if getattr(self, key) and not set(owners) & set(names):
                raise ValueError(f"loss.{key} {getattr(self, key)}: {listed} has none; it is of {', '.join(owners)}")
        if self.divergence != "reverse_kl" and not set(names) <= set(OF_DIFFERENCES):
            raise ValueError(f"loss.divergence {self.divergence}: not for {listed}; for {', '.join(OF_DIFFERENCES)}")
        if self.divergence != "alpha" and self.divergence_alpha != DIVERGENCE_ALPHA:
            problem = f"loss.divergence {self.divergence} has none; it is of loss.divergence alpha"
            raise ValueError(f"loss.divergence_alpha {self.divergence_alpha}: {problem}")
        if self.divergence == "alpha" and self.divergence_alpha == 1:
            raise ValueError("loss.divergence_alpha 1: that is loss.divergence reverse_kl")
        if self.wpo and set(names) & set(ACROSS_PAIRS):
            raise ValueError(f"loss.wpo weights pairs, and {listed} matches completions across pairs; use one of them")
        if self.ld_alpha != 1 and set(names) & set(REFERENCE_FREE):
            raise ValueError(f"loss.ld_alpha {self.ld_alpha}: for losses against a reference; {listed} has none")
        return self

    @property
    def needs_reference(self) -> bool:
        return not set(names_of(self.name)) <= set(REFERENCE_FREE)


class ImplicitRewardSection(Section):
    beta: float = Field(LossSection.model_fields["beta"].default, gt=0, description="of the implicit rewards")


def names_of(name) -> list[str]:
    return name if isinstance(name, list) else [name]
