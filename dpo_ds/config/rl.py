"""The keys of `dpo-ds rl`, and what must fit between them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from dpo_ds.config.completions import LEAST_TEMPERATURE
from dpo_ds.config.loss import Default, LossSection
from dpo_ds.config.section import FilePath, Section, checked_source

COMPARING = ("rloo", "grpo", "online_dpo")  # the completions of a prompt with each other


class RlSection(Section):
    prompts: str | list[str | dict[str, Any]] = Field(
        description="rl: file, folder or Hub id of prompts or preference data, or list of them with weights"
    )
    score: str = Field(description="rl: module:function, regex:PATTERN or a reward model: what is to be raised")
    algorithm: Literal["ppo", "rloo", "grpo", "reinforce", "online_dpo"] = Field(
        "ppo", description="online_dpo: loss.name on the best and the worst of a prompt's completions"
    )
    eval_prompts: str | list[str | dict[str, Any]] | None = Field(
        None, description="prompts to evaluate on, given as rl.prompts, one completion each"
    )
    n: int = Field(4, gt=0, le=65536, description="rl: completions a prompt in an iteration")
    max_new_tokens: int = Field(256, gt=0, le=2**20, description="tokens of a completion at most")
    temperature: float = Field(
        1.0, ge=LEAST_TEMPERATURE, le=1000, description="divides the logits, of draws and of log-probs alike"
    )
    batch_size: int = Field(
        64, gt=0, le=65536, description="completions that a rank draws together; whole prompts, one at the least"
    )
    replica: bool = Field(
        False, description="draw from a whole copy of the weights on every rank, renewed in every iteration"
    )
    score_timeout: float = Field(
        600, gt=0, le=10**6, description="seconds a call of the score's function or pattern may take"
    )
    center_scores: bool = Field(
        False, description="take the mean of its prompt's completions from every score: E[r] = 0 for every prompt"
    )
    unfinished_penalty: float = Field(
        0.0, ge=0, description="taken from the score of a completion that ran into max_new_tokens"
    )
    epochs: int = Field(1, gt=0, le=10**4, description="rl: passes over an iteration's completions")
    minibatches: int = Field(1, gt=0, le=10**6, description="updates a pass, each on its share of the prompts")
    beta: float = Field(0.05, ge=0, le=1000, description="weight of the KL divergence from the reference")
    target_kl: float | None = Field(
        None, gt=0, description="nats a completion that rl.beta is steered to; null: it stays as it is"
    )
    clip: float = Field(0.2, gt=0, lt=1, description="how far from 1 the ratio to the drawing policy may pull")
    gae_lambda: float = Field(0.95, ge=0, le=1, description="ppo: λ of its advantages")
    critic: FilePath | None = Field(
        None, description="ppo: what the critic begins as, a reward or language model; "
        "null: rl.score's reward model, else model.path"
    )  # fmt: skip
    critic_learning_rate: float | None = Field(
        None, ge=0, description="ppo: peak learning rate of the critic; null: train.learning_rate"
    )
    value_clip: float = Field(0.2, gt=0, description="ppo: how far from its old value the critic's may be pulled")
    samples_every: int = Field(0, ge=0, description="iterations between those whose completions are kept; 0: none")

    @field_validator("prompts", "eval_prompts")
    @classmethod
    def _weights(cls, source):
        return source if source is None else checked_source(source)

    @model_validator(mode="after")
    def _parts_fit(self):
        if self.algorithm in COMPARING and self.n < 2:
            raise ValueError(f"rl.n {self.n}: rl.algorithm {self.algorithm} compares completions of a prompt; give 2")
        if self.center_scores and self.n < 2:
            raise ValueError(f"rl.center_scores true: of rl.n {self.n} completions all scores would be 0; give 2")
        for key in ("critic", "critic_learning_rate"):
            if getattr(self, key) is not None and self.algorithm != "ppo":
                raise ValueError(f"rl.{key} {getattr(self, key)}: rl.algorithm {self.algorithm} has no critic; ppo has")
        if self.target_kl is not None and self.algorithm == "online_dpo":
            raise ValueError(f"rl.target_kl {self.target_kl}: a loss of pairs has a fixed β; leave it out")
        if self.target_kl is not None and self.beta == 0:
            raise ValueError(f"rl.target_kl {self.target_kl}: rl.beta 0 stays 0, whatever it is multiplied with")
        if self.beta == 0 and self.algorithm == "online_dpo":
            raise ValueError("rl.beta 0: online_dpo's loss needs one above 0")
        return self


def check_parts(run) -> None:
    """Raises ValueError where sections of an RlConfig do not fit each other."""
    rl, reference, train = run.rl, run.reference, run.train
    if reference.kind == "cached":
        raise ValueError("reference.kind cached: completions are new in every iteration; use live, or adapter")
    if reference.update_every:
        raise ValueError(f"reference.update_every {reference.update_every}: dpo-ds rl holds to a frozen reference")
    if reference.kind == "none" and rl.algorithm != "online_dpo" and (rl.beta or rl.target_kl):
        raise ValueError(f"reference.kind none: rl.beta {rl.beta} weighs the KL from a reference; set rl.beta 0")
    if run.loss != LossSection() and rl.algorithm != "online_dpo":
        raise ValueError(f"the section loss is of rl.algorithm online_dpo, this is {rl.algorithm}; leave it out")
    if run.loss.beta != Default.beta:
        raise ValueError(f"loss.beta {run.loss.beta}: the β of a run by dpo-ds rl is rl.beta; leave this one out")
    if rl.minibatches > train.global_batch_size:
        raise ValueError(
            f"rl.minibatches {rl.minibatches}: an iteration has train.global_batch_size {train.global_batch_size} "
            "prompts to share; give fewer"
        )
    if train.sample_every:
        given = f"train.sample_every {train.sample_every}"
        raise ValueError(f"{given}: of dpo-ds rl, rl.samples_every keeps what it draws; leave this one out")
    if rl.replica and run.model.lora.r:
        raise ValueError("rl.replica true: adapters are not merged into a copy; leave it out, or model.lora")
    if run.model.router_aux_loss:
        given = f"model.router_aux_loss {run.model.router_aux_loss}"
        raise ValueError(f"{given}: dpo-ds rl does not balance routers; leave it out")
    if train.sequence_parallel > 1:
        raise ValueError(f"train.sequence_parallel {train.sequence_parallel}: dpo-ds rl has none; leave it out")
