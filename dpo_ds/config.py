"""The run config: every key a user can set, its default, type and range; YAML and command line become one of these.

It imports no torch, so that `dpo-ds train --help` answers at once. README's table is this file read aloud.
"""

from __future__ import annotations

import difflib
import json
import shlex
import types
import typing
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from dpo_ds import yaml_file
from dpo_ds.errors import ConfigError

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
REFERENCE_FREE = ("simpo", "orpo", "cpo")
ACROSS_PAIRS = ("aot", "aot_unpaired")
OF_DIFFERENCES = ("dpo", "robust", "hinge", "ipo", "sigmoid_norm", "exo_pair", "discopop")
EXO_LABEL_SMOOTHING = 1e-3


def is_bool(field) -> bool:
    return field.annotation is bool


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _as_meant(cls, value, info):
        """`yes` is no number, and ~ is the home folder in every path."""
        if isinstance(value, bool) and not is_bool(cls.model_fields[info.field_name]):
            raise ValueError(f"{str(value).lower()!r} is neither a number nor text")
        return str(Path(value).expanduser()) if isinstance(value, str) and value.startswith("~/") else value


def _above_zero(what: str, given, of: str) -> float:
    try:
        number = float(given)  # YAML reads 1e-1 as text
    except (TypeError, ValueError):
        number = 0.0
    if not 0 < number < float("inf"):
        raise ValueError(f"{what} {given!r} of {of} must be a number above 0")
    return number


def _checked_source(source):
    """A path or Hub id, or a list of them with weights."""
    items = source if isinstance(source, list) else [source]
    if not items:
        raise ValueError("an empty list; name at least one path or Hub id")
    for item in items:
        if not isinstance(item, dict):
            continue
        if set(item) - {"path", "weight"} or not isinstance(item.get("path"), str):
            raise ValueError(f"{item} is not a source; write {{path: ..., weight: 1.0}}")
        item["weight"] = _above_zero("weight", item.get("weight", 1.0), item["path"])
    return source


class LoraSection(Section):
    r: int = Field(0, ge=0, description="rank of the adapters; 0: train all weights")
    alpha: float | None = Field(None, gt=0, description="adapters count alpha / r times; 2 r if not given")
    dropout: float = Field(0.0, ge=0, lt=1, description="on the adapters' input while training")
    target_modules: str | list[str] = Field("all-linear", description="names of linear layers, never the head")


class ModelOptions(Section):
    """How any model is loaded."""

    attn: str = Field("auto", description="transformers' attention implementation of the padded layout")
    trust_remote_code: bool = Field(False, description="run model code that comes with the folder")


class ModelSection(ModelOptions):
    path: str = Field(description="Hugging Face folder or Hub id")
    revision: str | None = Field(None, description="branch, tag or commit on the Hub")
    from_config: bool = Field(False, description="random weights from the folder's config.json, for tests")
    lora: LoraSection = LoraSection()


class PromptDataSection(Section):
    """What of the data section prompts need."""

    format: str = Field("auto", description="auto, explicit, implicit, hh, sharegpt, alpaca; sft: completion, messages")
    columns: dict[str, str] = Field(default_factory=dict, description="renames: {chosen: better, rejected: worse}")
    max_prompt_length: int = Field(1024, gt=0, description="tokens of the prompt")
    on_bad_row: Literal["error", "skip"] = Field("error", description="skip counts them and lists them in the census")


class SampleDataSection(PromptDataSection):
    limit: int | None = Field(None, gt=0, description="use the first n rows read, before dropping")


class EvaluationDataSection(PromptDataSection):
    eval: str | list[str | dict[str, Any]] | None = Field(None, description="pairs to evaluate on, given as data.train")
    max_length: int = Field(2048, gt=1, description="tokens of prompt plus one completion")

    @field_validator("train", "eval", check_fields=False)
    @classmethod
    def _weights(cls, source):
        return _checked_source(source)

    @model_validator(mode="after")
    def _room_for_completions(self):
        if self.max_prompt_length >= self.max_length:
            raise ValueError(
                f"data.max_prompt_length {self.max_prompt_length} must be below data.max_length {self.max_length}, "
                "or no token of a completion is left"
            )
        return self


class DataSection(EvaluationDataSection):
    train: str | list[str | dict[str, Any]] = Field(description="path, Hub id, or list of them with weights")
    limit: int | None = Field(None, gt=0, description="use the first n rows read, before dropping")


class LossSection(Section):
    name: str | list[str] = Field("dpo", description=f"{', '.join(LOSSES)}, or a list of them to add up")
    weights: list[float] | None = Field(None, description="of the losses that name lists; 1 each if not given")
    beta: float = Field(0.1, gt=0, description="strength of the pull to the reference; orpo: weight of its odds ratio")
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="probability that a label is flipped (cDPO); exo_pair: 0.001 if not given"
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
    divergence_alpha: float = Field(0.5, ge=0, description="of loss.divergence alpha; 1 is reverse_kl")

    @model_validator(mode="before")
    @classmethod
    def _exo_needs_smoothing(cls, values):
        if isinstance(values, dict) and "exo_pair" in _names(values.get("name")):
            return {"label_smoothing": EXO_LABEL_SMOOTHING, **values}
        return values

    @field_validator("name")
    @classmethod
    def _known(cls, name):
        if not name:
            raise ValueError("an empty list; name at least one loss")
        for given in _names(name):
            if given not in LOSSES:
                nearest = "TRL's sigmoid is 'dpo' here" if given == "sigmoid" else did_you_mean(given, LOSSES)
                raise ValueError(f"unknown loss {given!r}; {nearest}")
        return name

    @model_validator(mode="after")
    def _parts_fit(self):
        """What a loss would ignore or has no meaning for is refused."""
        names = _names(self.name)
        listed = ", ".join(names)
        if self.weights is not None and (isinstance(self.name, str) or len(self.weights) != len(names)):
            raise ValueError(f"loss.weights {self.weights}: one weight for each loss that loss.name lists ({listed})")
        for key in ("label_smoothing", "gamma", "alpha", "tau", "delta_decay"):
            owners = [name for name, own in LOSSES.items() if key in own]
            if getattr(self, key) and not set(owners) & set(names):
                raise ValueError(f"loss.{key} {getattr(self, key)}: {listed} has none; it is of {', '.join(owners)}")
        if "exo_pair" in names and not self.label_smoothing:
            raise ValueError("loss.label_smoothing 0: exo_pair takes its logarithm; leave it out or use 0.001")
        if self.divergence != "reverse_kl" and not set(names) <= set(OF_DIFFERENCES):
            raise ValueError(f"loss.divergence {self.divergence}: not for {listed}; for {', '.join(OF_DIFFERENCES)}")
        if self.divergence == "alpha" and self.divergence_alpha == 1:
            raise ValueError("loss.divergence_alpha 1: that is loss.divergence reverse_kl")
        if self.wpo and set(names) & set(ACROSS_PAIRS):
            raise ValueError(f"loss.wpo weights pairs, and {listed} matches completions across pairs; use one of them")
        if self.ld_alpha != 1 and set(names) & set(REFERENCE_FREE):
            raise ValueError(f"loss.ld_alpha {self.ld_alpha}: for losses against a reference; {listed} has none")
        return self

    @property
    def needs_reference(self) -> bool:
        return not set(_names(self.name)) <= set(REFERENCE_FREE)


def _names(name) -> list[str]:
    return name if isinstance(name, list) else [name]


class ReferenceSection(Section):
    kind: Literal["live", "cached", "adapter", "none"] = Field(
        "live",
        description="live: a second, inference-only engine; cached: from reference.cache; adapter: LoRA off; "
        "none: only, and by default, for the losses that need no reference",
    )
    path: str | None = Field(None, description="the reference model; model.path if not given")
    cache: str | None = Field(None, description="folder that dpo-ds precompute fills and reference.kind cached reads")
    update_every: int = Field(0, ge=0, description="steps between updates of a live reference (TR-DPO); 0: frozen")
    update_alpha: float = Field(0.6, gt=0, le=1, description="share of the policy in such an update")


class TrainSection(Section):
    layout: Literal["packed", "padded"] = Field("packed", description="packed: no padding, each prompt computed once")
    global_batch_size: int = Field(64, gt=0, description="pairs (sft: rows) an update, over all ranks")
    micro_batch_tokens: int = Field(8192, gt=0, description="tokens a rank holds in one forward, padding included")
    epochs: float = Field(1, gt=0, description="passes over the data")
    max_steps: int | None = Field(None, gt=0, description="given: it alone decides, epochs repeat as needed")
    learning_rate: float = Field(5e-7, ge=0, description="peak learning rate of AdamW")
    schedule: Literal["constant", "linear", "cosine"] = Field("linear", description="after the warm-up")
    warmup_steps: int = Field(0, ge=0, description="linear warm-up from 0")
    weight_decay: float = Field(0.0, ge=0, description="on matrices, not on biases and norms")
    max_grad_norm: float = Field(1.0, ge=0, description="clip the global gradient norm; 0: off")
    adam_betas: tuple[float, float] = Field((0.9, 0.999), description="of AdamW")
    adam_eps: float = Field(1e-8, gt=0, description="of AdamW")
    seed: int = Field(0, ge=0, description="of the order of the data")
    eval_every: int = Field(0, ge=0, description="steps between evaluations; 0: at the end only")
    activation_checkpointing: bool = Field(False, description="recompute each layer in backward")

    @field_validator("adam_betas")
    @classmethod
    def _betas(cls, betas):
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"{list(betas)}: both must be in [0, 1)")
        return betas


class InferenceSection(Section):
    config: str = Field(description="a DeepSpeed JSON file; absent and auto keys are filled from this config")


class DeepSpeedSection(InferenceSection):
    reference_config: str | None = Field(
        None, description="the reference's JSON file; derived from config if not given"
    )


class PrecomputeSection(Section):
    layout: Literal["packed", "padded"] = Field("packed", description="packed: no padding, each prompt computed once")
    micro_batch_tokens: int = Field(16384, gt=0, description="tokens a rank holds in one forward, padding included")
    shard_rows: int = Field(512, gt=0, description="pairs a file: the most that a killed rank computes again")
    threads: int = Field(1, gt=0, description="CPU threads a rank; decides last bits, so it does not follow the ranks")


class GenerationSection(Section):
    """How completions are drawn (dpo_ds/generation.py)."""

    max_new_tokens: int = Field(256, gt=0, description="tokens of a completion; a longer one is left unfinished")
    min_new_tokens: int = Field(0, ge=0, description="no end of text before so many tokens")
    temperature: float = Field(1.0, ge=0, description="divides the logits; 0: always the likeliest token")
    top_k: int = Field(0, ge=0, description="draw among the k likeliest tokens; 0: all")
    top_p: float = Field(1.0, gt=0, le=1, description="draw among the fewest tokens of this total probability")
    seed: int = Field(0, ge=0, description="of the draws")
    batch_size: int = Field(64, gt=0, description="completions a rank draws together")


class SampleSection(GenerationSection):
    prompts: str | list[str | dict[str, Any]] = Field(
        description="sample: file, folder or Hub id of prompts or preference data, or list of them with weights"
    )
    to: str = Field(min_length=1, description="sample: the folder to fill")
    n: int = Field(2, gt=0, description="sample: completions a prompt")
    score: str | None = Field(
        None, description="module:function, regex:PATTERN or a reward model; null: no scores, no pairs"
    )
    pairs: Literal["best_worst", "bradley_terry"] = Field(
        "best_worst", description="one pair a prompt; bradley_terry: every two completions, the better one drawn"
    )
    pair_temperature: float = Field(
        1.0, gt=0, description="bradley_terry: a is chosen over b with probability σ((score_a - score_b) / this)"
    )
    unfinished: Literal["drop", "keep"] = Field(
        "drop", description="completions that ran into max_new_tokens: not in pairs, or as if they had ended there"
    )
    engine: Literal["transformers", "vllm"] = Field("transformers", description="vllm: where it is installed")
    shard_rows: int = Field(256, gt=0, description="prompts a file: the most that a killed rank draws again")
    threads: int = Field(1, gt=0, description="CPU threads a rank; decides last bits, so it does not follow the ranks")

    @field_validator("prompts")
    @classmethod
    def _weights(cls, source):
        return _checked_source(source)

    @model_validator(mode="after")
    def _can_differ(self):
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"sample.min_new_tokens {self.min_new_tokens} is above sample.max_new_tokens {self.max_new_tokens}"
            )
        if self.score is not None and self.n < 2:
            raise ValueError(f"sample.n {self.n}: a pair needs two completions of a prompt; give 2 or more")
        if self.temperature == 0 and self.n > 1:
            raise ValueError(f"sample.temperature 0 draws {self.n} equal completions; give it --sample.n 1")
        return self


class PolicyChoice(NamedTuple):
    """One of evaluate.policy; beta is the one it was trained with, None for loss.beta."""

    path: str
    name: str
    beta: float | None


ROWS = ("reference", "baseline")  # names of their own in an evaluation


class EvaluateSection(GenerationSection):
    policy: str | list[str | dict[str, Any]] = Field(
        description="model to evaluate, or a list of them, each a path or {path: ..., name: ..., beta: ...}"
    )
    against: str | None = Field(None, description="the reference π_ref; null: only what needs none")
    prompts: str | list[str | dict[str, Any]] | None = Field(
        None, description="prompts to complete, given as sample.prompts, each once; null: those of data.eval"
    )
    n: int = Field(1, ge=0, description="evaluate: completions a prompt; 0: none, data.eval alone is looked at")
    score: str | None = Field(None, description="rewards of completions, given as sample.score; null: none")
    baseline: str | None = Field(
        None, description="win rate against this model, or a file of prompt, completion; null: evaluate.against"
    )
    judge: str | None = Field(
        None, description="module:function(prompts, first, second) -> preference for first, 0 to 1; null: higher score"
    )
    bootstrap: int = Field(1000, gt=0, description="resamples behind the win rate's interval")
    layout: Literal["packed", "padded"] = Field("packed", description="of log-probs, as train.layout")
    micro_batch_tokens: int = Field(16384, gt=0, description="tokens a rank holds in one forward, padding included")
    threads: int = Field(1, gt=0, description="CPU threads a rank; decides last bits, so it does not follow the ranks")

    @field_validator("prompts")
    @classmethod
    def _weights(cls, source):
        return _checked_source(source)

    @field_validator("policy")
    @classmethod
    def _policies(cls, given):
        if not given:
            raise ValueError("an empty list; name at least one model")
        for item in given if isinstance(given, list) else []:
            if not isinstance(item, dict):
                continue
            if set(item) - {"path", "name", "beta"} or not isinstance(item.get("path"), str):
                raise ValueError(f"{item} is not a policy; write {{path: ..., name: ..., beta: 0.1}}")
            if not isinstance(item.get("name", ""), str):
                raise ValueError(f"name {item['name']!r} of {item['path']} must be text; put it in quotes")
            if "beta" in item:
                item["beta"] = _above_zero("beta", item["beta"], item["path"])
        return given

    @model_validator(mode="after")
    def _parts_fit(self):
        names = [policy.name for policy in self.policies]
        for place, name in enumerate(names):
            if name in (*names[:place], *ROWS):
                raise ValueError(f"evaluate.policy: {name!r} names two models; give names: {{path: ..., name: ...}}")
        if self.n == 0 and (self.score or self.judge or self.baseline):
            raise ValueError("evaluate.n 0 draws no completions, so there is nothing to score or to compare")
        if self.judge and not (self.baseline or self.against):
            raise ValueError(f"evaluate.judge {self.judge} compares with evaluate.baseline or .against; give one")
        if self.baseline and not (self.judge or self.score):
            raise ValueError(f"evaluate.baseline {self.baseline} is compared by evaluate.score or .judge; give one")
        return self

    @property
    def policies(self) -> list[PolicyChoice]:
        """A name not given is that of the folder, or of the run for its final/; the whole path where two are equal."""
        items = [self.policy] if isinstance(self.policy, str) else self.policy
        items = [{"path": item} if isinstance(item, str) else item for item in items]
        short = [item.get("name") or _short_name(item["path"]) for item in items]
        names = [
            item["path"] if "name" not in item and short.count(name) > 1 else name
            for item, name in zip(items, short, strict=True)
        ]
        return [PolicyChoice(i["path"], name, i.get("beta")) for i, name in zip(items, names, strict=True)]


def _short_name(path: str) -> str:
    *folders, name = Path(path).parts or (path,)
    return folders[-1] if name == "final" and folders else name


class RewardSection(Section):
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


class CheckpointSection(Section):
    every: int = Field(0, ge=0, description="steps between checkpoints; 0: at the end only")
    keep: int = Field(2, gt=0, description="newest complete checkpoints kept")
    asynchronous: bool = Field(True, description="write from a copy in host memory while training goes on")
    resume: str = Field("auto", description="auto: the newest complete one, else start; never; or a checkpoint folder")
    save_before_end_seconds: int = Field(0, ge=0, description="save and exit 75 so long before the time limit; 0: off")
    time_limit_seconds: int = Field(0, ge=0, description="of this process; 0: Slurm's SLURM_JOB_END_TIME alone")


class SftConfig(Section):
    """Supervised fine-tuning on chosen completions: from a pre-trained model to the reference policy."""

    model: ModelSection
    data: DataSection
    train: TrainSection = TrainSection()
    deepspeed: DeepSpeedSection
    checkpoint: CheckpointSection = CheckpointSection()
    output_dir: str = Field(min_length=1, description="everything the run writes goes there")


class RewardConfig(SftConfig):
    """A Bradley-Terry reward model on pairs: a score for every completion, normalised to mean zero."""

    reward: RewardSection = RewardSection()


class TrainConfig(SftConfig):
    """Preference optimisation of a policy on pairs, against a frozen reference."""

    loss: LossSection = LossSection()
    reference: ReferenceSection = ReferenceSection()

    @model_validator(mode="before")
    @classmethod
    def _none_by_default(cls, values):
        """A loss that needs no reference loads none, unasked."""
        loss = values.get("loss")
        names = _names(loss.get("name")) if isinstance(loss, dict) else []
        if names and set(names) <= set(REFERENCE_FREE) and not values.get("reference"):
            return {**values, "reference": {"kind": "none"}}
        return values

    @model_validator(mode="after")
    def _reference_fits(self):
        wanted = self.reference
        if not self.loss.needs_reference and (wanted.kind != "none" or wanted.path or wanted.cache):
            raise ValueError(
                f"reference.kind {wanted.kind}: loss.name {self.loss.name} needs no reference; leave out the section "
                "reference, or set reference.kind none alone"
            )
        if self.loss.needs_reference and wanted.kind == "none":
            raise ValueError(f"reference.kind none: loss.name {self.loss.name} needs one: live, cached or adapter")
        if wanted.update_every and (wanted.kind != "live" or self.model.lora.r):
            why = f"reference.kind {wanted.kind}" if wanted.kind != "live" else "LoRA"
            raise ValueError(
                f"reference.update_every {wanted.update_every}: only a whole, live reference can follow the policy; "
                f"this run has {why}"
            )
        if wanted.update_every and wanted.path not in (None, self.model.path):
            raise ValueError(
                f"reference.update_every {wanted.update_every}: policy and reference must be one model; leave out "
                f"reference.path {wanted.path}"
            )
        if self.reference.kind == "cached" and self.reference.cache is None:
            raise ValueError("reference.kind cached needs --reference.cache, a folder filled by dpo-ds precompute")
        if self.reference.kind == "adapter" and not self.model.lora.r:
            raise ValueError("reference.kind adapter is the policy without adapters; it needs --model.lora.r above 0")
        if self.reference.kind == "adapter" and self.reference.path not in (None, self.model.path):
            raise ValueError(
                f"reference.kind adapter is model.path {self.model.path} itself; leave out reference.path "
                f"{self.reference.path}, or use reference.kind live"
            )
        return self


class PrecomputeConfig(Section):
    """Log-probs of the frozen reference on all pairs, stored once for every later run with reference.kind cached."""

    model: ModelSection
    data: DataSection
    reference: ReferenceSection
    precompute: PrecomputeSection = PrecomputeSection()
    deepspeed: DeepSpeedSection

    @model_validator(mode="after")
    def _needs_a_folder(self):
        if self.reference.cache is None:
            raise ValueError("reference.cache is required; give it as --reference.cache or in --config")
        return self


def reference_section(run: TrainConfig | PrecomputeConfig) -> ModelSection:
    """Where the reference is loaded from; model.revision is of model.path alone."""
    if run.reference.path in (None, run.model.path):
        return run.model
    return run.model.model_copy(update={"path": run.reference.path, "revision": None})


class SampleConfig(Section):
    """Completions of prompts, scored, and the pairs that the scores make: what train takes."""

    model: ModelSection
    data: SampleDataSection = SampleDataSection()
    sample: SampleSection
    deepspeed: InferenceSection


class ImplicitRewardSection(Section):
    beta: float = Field(LossSection.model_fields["beta"].default, gt=0, description="of the implicit rewards")


class EvaluateConfig(Section):
    """Accuracy and margins on pairs, KL to the reference, reward and win rate of samples; with a report to look at."""

    evaluate: EvaluateSection
    model: ModelOptions = ModelOptions()
    data: EvaluationDataSection = EvaluationDataSection()
    loss: ImplicitRewardSection = ImplicitRewardSection()
    deepspeed: InferenceSection
    output_dir: str = Field(min_length=1, description="everything the run writes goes there")

    @model_validator(mode="after")
    def _has_something_to_measure(self):
        if self.data.eval is None and (self.evaluate.prompts is None or self.evaluate.n == 0):
            raise ValueError("nothing to evaluate on: give preference pairs as data.eval, or evaluate.prompts")
        return self


class ExportConfig(Section):
    """From a sharded checkpoint to a Hugging Face folder, on one process without a GPU."""

    source: str = Field(description="export: a checkpoint folder, or an output_dir for its newest one")
    to: str = Field(description="export: the folder to make")
    dtype: Literal["auto", "fp32", "bf16"] = Field("auto", description="export: of the weights; auto: as trained")
    merge: bool = Field(False, description="export: LoRA's adapters into the model's own weights")


class VerifyConfig(Section):
    """`dpo-ds precompute --verify FOLDER`: every hash of a finished cache, and a summary."""

    verify: str


COMMANDS: dict[str, type[Section]] = {
    "sft": SftConfig,
    "reward": RewardConfig,
    "train": TrainConfig,
    "precompute": PrecomputeConfig,
    "sample": SampleConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
}
RECORDED = "environment"  # config.yaml's record of versions and machine; not a key, ignored when the file is used again


def keys(config: type[Section], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> pydantic field, in the order of declaration, a section's required keys first: what flags and README
    are made from.
    """
    found = {}
    fields = config.model_fields.items()
    for name, field in sorted(fields, key=lambda item: prefix != "" and not item[1].is_required()):
        if _is_section(field):
            found |= keys(field.annotation, f"{prefix}{name}.")
        else:
            found[prefix + name] = field
    return found


def load(command: str, yaml_path: str | None, overrides: dict[str, str]) -> tuple[Section, list[str]]:
    """The validated config, and lines that tell the user what of the YAML file this command does not use.

    Args:
        overrides: dotted key -> text as given on the command line; wins over YAML, which wins over defaults.
    Raises:
        ConfigError: one line that names the key, the value, the rule and the nearest key.
    """
    config = COMMANDS[command]
    values, notes = ({}, []) if yaml_path is None else _read_yaml(command, config, Path(yaml_path))
    known = keys(config)
    for key, text in overrides.items():
        if key not in known:
            raise ConfigError(f"unknown key --{key}; {did_you_mean(key, known)}")
        *sections, leaf = key.split(".")
        node = values
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = _from_text(text, known[key].annotation, key)
    try:
        return config.model_validate(values), notes
    except ValidationError as error:
        raise ConfigError(_first_line(error, known, overrides, yaml_path)) from None


def did_you_mean(word: str, choices: typing.Iterable[str]) -> str:
    """`did you mean 'x'?`, else the whole list; a key's last part alone counts too."""
    choices = list(choices)
    by_leaf = {choice.rsplit(".", 1)[-1]: choice for choice in reversed(choices)}
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    close = close or [by_leaf[leaf] for leaf in difflib.get_close_matches(word.rsplit(".", 1)[-1], by_leaf, n=1)]
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(choices)}"


def to_plain(config: Section) -> dict:
    """Nested dict of plain YAML types, every key resolved."""
    return config.model_dump(mode="json")


def command_line(command: str, run: Section) -> str:
    """What a user types for `command` with the settings of `run` that it knows and that are not the defaults."""
    words = ["dpo-ds", command]
    for key, field in keys(COMMANDS[command]).items():
        value = run
        for part in key.split("."):
            value = getattr(value, part, None)
        if value is not None and (field.is_required() or value != field.get_default(call_default_factory=True)):
            words += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    return shlex.join(words)


def flatten(values: dict, prefix: str = "", depth: int = 2) -> dict[str, Any]:
    """{"data": {"limit": 3}} -> {"data.limit": 3}; dicts that are values (data.columns) stay whole."""
    flat = {}
    for name, value in values.items():
        if isinstance(value, dict) and depth > 1:
            flat |= flatten(value, f"{prefix}{name}.", depth - 1)
        else:
            flat[prefix + name] = value
    return flat


def _read_yaml(command: str, config: type[Section], path: Path) -> tuple[dict, list[str]]:
    values = yaml_file.read_mapping(path, "config")
    values.pop(RECORDED, None)
    elsewhere = {name for other in COMMANDS.values() for name in _names_below(other)}
    unused = sorted(set(values) & (elsewhere - set(config.model_fields) - set(keys(config))))
    for name in unused:
        del values[name]
    for name, value in values.items():
        if name in config.model_fields and _is_section(config.model_fields[name]):
            values[name] = {} if value is None else value  # `train:` with nothing under it
            if not isinstance(values[name], dict):
                example = next(key for key in keys(config) if key.startswith(f"{name}."))
                raise ConfigError(f"{path}: {name} is {value!r}, expected keys below it, such as {example}")
    for key in list(_unknown(values, config)):
        if key in elsewhere and key not in values:
            unused.append(key)
            _remove(values, key)
            continue
        if key in keys(config):
            raise ConfigError(f"{path}: {key!r} is written with a dot; nest it: {key.replace('.', ': {', 1)}: ...}}")
        known = keys(config) if "." in key else config.model_fields
        raise ConfigError(f"{path}: unknown key {key!r}; {did_you_mean(key, known)}")
    return values, [f"{path}: {command} does not use {', '.join(unused)}"] if unused else []


def _names_below(config: type[Section], prefix: str = "") -> typing.Iterator[str]:
    """Every key and every section, dotted."""
    for name, field in config.model_fields.items():
        yield prefix + name
        if _is_section(field):
            yield from _names_below(field.annotation, f"{prefix}{name}.")


def _remove(values: dict, key: str) -> None:
    *sections, leaf = key.split(".")
    for section in sections:
        values = values[section]
    del values[leaf]


def _is_section(field) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, Section)


def _unknown(values: dict, config: type[Section], prefix: str = "") -> typing.Iterator[str]:
    for name, value in values.items():
        field = config.model_fields.get(name)
        if field is None:
            yield f"{prefix}{name}"
        elif isinstance(value, dict) and _is_section(field):
            yield from _unknown(value, field.annotation, f"{prefix}{name}.")


def _from_text(text: str, annotation: Any, key: str) -> Any:
    """Command-line text as a value: null, lists and dicts are YAML, all else is left to pydantic's own conversion."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    if text == "null" and union and type(None) in typing.get_args(annotation):
        return None
    if annotation is not str and text[:1] in ("[", "{"):
        try:
            return yaml_file.parse(text)
        except yaml_file.YAMLError:
            raise ConfigError(f"--{key} {text}: not a YAML list or mapping") from None
    return text


def _first_line(error: ValidationError, known: dict, overrides: dict, yaml_path: str | None) -> str:
    """pydantic's first finding as one line: where it was given, the key, the value, the rule."""
    finding = error.errors()[0]
    location = [str(part) for part in finding["loc"]]
    dotted = ".".join(location)
    key = next((known_key for known_key in known if f"{dotted}.".startswith(f"{known_key}.")), dotted)
    rule = finding["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if finding["type"] == "missing":
        needs = [k for k in known if k == key or k.startswith(f"{key}.")]
        required = [k for k in needs if known[k].is_required()]
        return f"{', '.join(required or [key])} is required; give it as --{(required or [key])[0]} or in --config"
    if finding["type"] == "value_error":
        line = rule if rule.startswith(key) or "." not in key else f"{key}: {rule}"
        return f"{yaml_path}: {line}" if yaml_path and key not in overrides else line
    where = f"--{key}" if key in overrides else f"{yaml_path}: {key}"
    return f"{where}: {finding['input']!r} should be {rule}"
