"""Lists the keys of a training run itself, of `reward` and of `precompute`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from dpo_ds.config.section import Section
from dpo_ds.errors import shorten

LEAST_RATIO = 0.1


def check_spread(section, name: str):
    """Returns the section; ValueError where rows that are not packed would be spread over ranks."""
    if section.sequence_parallel > 1 and section.layout != "packed":
        given = f"{name}.sequence_parallel {section.sequence_parallel}"
        raise ValueError(f"{given} spreads packed rows; it needs {name}.layout packed")
    return section


class TrainSection(Section):
    layout: Literal["packed", "padded"] = Field("packed", description="packed: no padding, each prompt computed once")
    global_batch_size: int = Field(
        64,
        gt=0,
        description="comparisons an update, a pair is one "
        "(plackett_luce: groups; kto, bco: completions; sft: rows; rl: prompts)",
    )
    micro_batch_tokens: int = Field(8192, gt=0, description="tokens a rank holds in one forward, padding included")
    epochs: float = Field(1, gt=0, le=10**6, description="passes over the data")
    max_steps: int | None = Field(
        None, gt=0, description="given: it alone decides, epochs repeat as needed; rl: iterations"
    )
    learning_rate: float = Field(5e-7, ge=0, description="peak learning rate of AdamW")
    schedule: Literal["constant", "linear", "cosine", "cosine_with_min_lr", "wsd", "inverse_sqrt"] = Field(
        "linear", description="after the warm-up; wsd: constant, then down at the end"
    )
    warmup_steps: int = Field(0, ge=0, description="linear warm-up from 0")
    warmup_ratio: float = Field(0.0, ge=0, lt=1, description="the same as a share of all steps, rounded up")
    min_lr_ratio: float | None = Field(
        None, ge=0, le=1, description=f"cosine_with_min_lr and wsd: the last rate over the peak; {LEAST_RATIO} if null"
    )
    decay_ratio: float = Field(0.1, gt=0, le=1, description="wsd: share of all steps in which the rate goes down")
    weight_decay: float = Field(0.0, ge=0, le=100, description="on matrices, not on biases and norms")
    max_grad_norm: float = Field(1.0, ge=0, description="clip the global gradient norm; 0: off")
    adam_betas: tuple[float, float] = Field((0.9, 0.999), description="of AdamW")
    adam_eps: float = Field(1e-8, gt=0, le=1, description="of AdamW")
    seed: int = Field(0, ge=0, description="of the order of the data")
    eval_every: int = Field(0, ge=0, description="steps between evaluations; 0: at the end only")
    stop_after_worse: int = Field(
        0, ge=0, description="end after so many evaluations in a row without a better checkpoint.best (or eval_loss); "
        "0: off"
    )
    sequence_parallel: int = Field(
        1, gt=0, description="neighbouring ranks that compute each micro-batch together, its tokens spread over them"
    )
    activation_memory: Literal["none", "selective", "checkpoint", "offload"] = Field(
        "none",
        description="checkpoint: a layer keeps its input and is computed again in backward; selective: all of it but "
        "attention and the products around it; offload: the input waits in host memory, and long rows go through the "
        "MLP in tiles",
    )
    activation_checkpointing: bool = Field(False, description="true is activation_memory checkpoint")
    profile_steps: tuple[int, int] | None = Field(
        None, description="first and last step that torch's profiler records into output_dir/profile; null: none"
    )
    sample_every: int = Field(0, ge=0, description="steps between completions of sample.prompts to look at; 0: never")
    sample_prompts: int = Field(8, gt=0, le=65536, description="how many prompts are completed, the first of them")

    @property
    def activations(self) -> str:
        """What layers keep for backward: none (all), selective, checkpoint or offload, whichever key says so."""
        is_alias = self.activation_checkpointing and self.activation_memory == "none"
        return "checkpoint" if is_alias else self.activation_memory

    @property
    def least_ratio(self) -> float:
        """The last rate over the peak, of the schedules that have one."""
        return LEAST_RATIO if self.min_lr_ratio is None else self.min_lr_ratio

    @model_validator(mode="after")
    def _schedule_has_what_is_given(self):
        if self.warmup_ratio and self.warmup_steps:
            raise ValueError(
                f"train.warmup_ratio {self.warmup_ratio} and train.warmup_steps {self.warmup_steps} both say how long "
                "the warm-up is; leave one out"
            )
        for key, schedules in (("min_lr_ratio", ("cosine_with_min_lr", "wsd")), ("decay_ratio", ("wsd",))):
            value = getattr(self, key)
            if value != type(self).model_fields[key].default and self.schedule not in schedules:
                raise ValueError(
                    f"train.{key} {value} is of train.schedule {' and '.join(schedules)}, not of {self.schedule}"
                )
        return self

    @model_validator(mode="after")
    def _says_once_what_layers_keep(self):
        if self.activations != self.activation_memory and "activation_memory" in self.model_fields_set:
            raise ValueError("activation_memory none contradicts activation_checkpointing true; leave one out")
        return self

    @model_validator(mode="after")
    def _spreads_packed_rows(self):
        return check_spread(self, "train")

    @field_validator("profile_steps")
    @classmethod
    def _in_order(cls, steps):
        if steps is not None and not 1 <= steps[0] <= steps[1]:
            raise ValueError(f"{list(steps)}: the first is step 1 or a later one, the last is not before it")
        return steps

    @field_validator("adam_betas")
    @classmethod
    def _betas(cls, betas):
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"{list(betas)}: both must be in [0, 1)")
        return betas


class TrackingSection(Section):
    to: list[
        Literal["tensorboard", "wandb", "mlflow", "trackio", "comet", "aim", "clearml", "dvclive", "swanlab"]
    ] = Field(["tensorboard"], description="who gets the metrics beside metrics.jsonl; []: nobody")
    project: str = Field("dpo-ds", min_length=1, description="of the trackers (mlflow's experiment)")
    name: str | None = Field(None, min_length=1, description="of the run in trackers; null: that of output_dir")

    @field_validator("to", mode="before")
    @classmethod
    def _one_is_a_list(cls, given):
        return [given] if isinstance(given, str) else given

    @field_validator("to")
    @classmethod
    def _each_once(cls, names):
        if len(set(names)) < len(names):
            raise ValueError(f"{names} names one twice")
        return names


def repository(given: str | None) -> str | None:
    """Returns the name of a model on the Hub; raises ValueError for what cannot be one."""
    if given is None:
        return None
    from huggingface_hub.utils import HFValidationError, validate_repo_id  # half a second, for those who push alone

    rule = "write it as OWNER/NAME, of letters, digits, -, _ and ., at most 96"
    try:
        validate_repo_id(given)
    except HFValidationError:
        raise ValueError(f"{shorten(given)} is no name on the Hub; {rule}") from None
    if "/" not in given:
        raise ValueError(f"{shorten(given)} has no owner, a user or an organisation; {rule}")
    return given


class HubSection(Section):
    push: str | None = Field(None, description="OWNER/NAME on the Hub to push final/ to at the end; null: nowhere")
    private: bool = Field(True, description="a repository that the push makes is seen by its owner alone")
    timeout: float = Field(3600, gt=0, le=10**6, description="seconds that the end of the run waits for the upload")

    @field_validator("push")
    @classmethod
    def _is_a_name(cls, given):
        return repository(given)


class PrecomputeSection(Section):
    layout: Literal["packed", "padded"] = Field("packed", description="packed: no padding, each prompt computed once")
    micro_batch_tokens: int = Field(16384, gt=0, description="tokens a rank holds in one forward, padding included")
    sequence_parallel: int = Field(
        1, gt=0, description="neighbouring ranks that compute each micro-batch together and hold its tokens together"
    )
    shard_rows: int = Field(512, gt=0, le=2**20, description="pairs a file: the most that a killed rank computes again")
    threads: int = Field(1, gt=0, le=1024, description="CPU threads a rank; decides last bits, so not by the ranks")

    @model_validator(mode="after")
    def _spreads_packed_rows(self):
        return check_spread(self, "precompute")


class RewardSection(Section):
    loss: Literal["bradley_terry", "plackett_luce"] = Field(
        "bradley_terry", description="of every comparison, or of each prompt's whole ranking"
    )
    margin_column: str | None = Field(
        None, description="raw column of how much better chosen is (0 or more): the margin that rewards must differ by"
    )
    centering: float = Field(0.0, ge=0, description="weight of (r_w + r_l)² in the loss, which keeps rewards near 0")
    calibration: str | None = Field(
        None, description="pairs on which the mean reward, stored as reward_mean, is taken; those of data.train if null"
    )
    calibration_rows: int | None = Field(
        1024, gt=0, description="so many of these pairs, spread evenly over them; null: all"
    )

    @model_validator(mode="after")
    def _margins_are_of_comparisons(self):
        if self.margin_column is not None and self.loss != "bradley_terry":
            raise ValueError(
                f"reward.margin_column {self.margin_column}: reward.loss {self.loss} takes no margins; leave one out"
            )
        return self
