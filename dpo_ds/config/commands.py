"""Every command with the sections it reads, and what must fit between them."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from dpo_ds.config.completions import CompletionsSection, EvaluateSection, SampleSection, names_model
from dpo_ds.config.evaluation import OF_LABELS, OF_PAIRS, OF_ROWS, OF_SCORES, check_followed
from dpo_ds.config.inputs import (
    CheckpointSection,
    DataSection,
    DeepSpeedSection,
    EvaluationDataSection,
    InferenceSection,
    ModelOptions,
    ModelSection,
    ReferenceSection,
    SampleDataSection,
    SampleModelSection,
)
from dpo_ds.config.loss import ImplicitRewardSection, LossSection
from dpo_ds.config.rl import RlSection, check_parts
from dpo_ds.config.section import FilePath, Section
from dpo_ds.config.train import HubSection, PrecomputeSection, RewardSection, TrackingSection, TrainSection, repository


class SftConfig(Section):
    """Supervised fine-tuning on chosen completions: from a pre-trained model to the reference policy."""

    command: ClassVar[str] = "sft"
    sides: ClassVar[tuple[str, ...]] = ("chosen",)  # of a pair, that go through the model
    is_classifier: ClassVar[bool] = False
    trains: ClassVar[bool] = True

    model: ModelSection
    data: DataSection
    train: TrainSection = TrainSection()
    deepspeed: DeepSpeedSection
    checkpoint: CheckpointSection = CheckpointSection()
    sample: CompletionsSection = CompletionsSection()
    tracking: TrackingSection = TrackingSection()
    hub: HubSection = HubSection()
    output_dir: FilePath = Field(min_length=1, description="everything the run writes goes there")

    @property
    def evaluated(self) -> tuple[str, ...]:
        """The metrics of this run's evaluations that can be better or worse."""
        return OF_ROWS

    @model_validator(mode="after")
    def _follows_what_it_evaluates(self):
        has_data = self.data.eval is not None
        check_followed(self.checkpoint.best, self.train.stop_after_worse, has_data, self.evaluated)
        if self.train.stop_after_worse and not self.train.eval_every:
            given = f"train.stop_after_worse {self.train.stop_after_worse}"
            raise ValueError(f"{given} goes by evaluations between steps; give train.eval_every, which is 0")
        return self

    @model_validator(mode="after")
    def _quantizes_what_is_frozen(self):
        if self.model.quantize and not self.model.lora.r:
            remedy = "train adapters on them, with --model.lora.r above 0"
            raise ValueError(f"model.quantize {self.model.quantize}: only frozen weights can be; {remedy}")
        return self

    @model_validator(mode="after")
    def _has_prompts_to_complete(self):
        if self.train.sample_every and not self.is_classifier and self.sample.prompts is None:
            every = self.train.sample_every
            raise ValueError(f"train.sample_every {every} shows completions of prompts; give some as sample.prompts")
        return self


class RewardConfig(SftConfig):
    """A Bradley-Terry reward model on pairs: a score for every completion, normalised to mean zero."""

    command: ClassVar[str] = "reward"
    sides: ClassVar[tuple[str, ...]] = ("chosen", "rejected")
    is_classifier: ClassVar[bool] = True
    sample: ClassVar[None] = None  # a scorer completes nothing

    reward: RewardSection = RewardSection()

    @property
    def evaluated(self) -> tuple[str, ...]:
        return OF_SCORES

    @model_validator(mode="after")
    def _is_not_quantized(self):
        _check_quantize(self.model, "reward trains a head in full and exports a whole model")
        return self


class TrainConfig(SftConfig):
    """Preference optimisation of a policy on pairs, against a frozen reference."""

    command: ClassVar[str] = "train"
    sides: ClassVar[tuple[str, ...]] = ("chosen", "rejected")

    loss: LossSection = LossSection()
    reference: ReferenceSection = ReferenceSection()

    @property
    def evaluated(self) -> tuple[str, ...]:
        return OF_LABELS if set(self.loss.names) <= {"kto", "bco"} else OF_PAIRS

    @model_validator(mode="after")
    def _reference_fits(self):
        _check_reference(self)
        return self


class RlConfig(Section):
    """Reinforcement learning from a score: a policy draws completions of prompts and is updated with them (PPO)."""

    command: ClassVar[str] = "rl"
    is_classifier: ClassVar[bool] = False
    trains: ClassVar[bool] = True

    model: ModelSection
    data: SampleDataSection = SampleDataSection()
    rl: RlSection
    loss: LossSection = LossSection()
    reference: ReferenceSection = ReferenceSection()
    train: TrainSection = TrainSection()
    deepspeed: DeepSpeedSection
    checkpoint: CheckpointSection = CheckpointSection()
    tracking: TrackingSection = TrackingSection()
    hub: HubSection = HubSection()
    output_dir: FilePath = Field(min_length=1, description="everything the run writes goes there")

    @model_validator(mode="after")
    def _sections_fit(self):
        check_parts(self)
        if self.checkpoint.best is not None or self.train.stop_after_worse:
            raise ValueError("checkpoint.best and train.stop_after_worse go by evaluations on pairs; rl has none")
        _check_quantize(self.model, "rl draws from whole copies of the policy")
        _check_reference(self)
        return self


def _check_quantize(model: ModelSection, why_not: str) -> None:
    if model.quantize:
        raise ValueError(f"model.quantize {model.quantize}: only sft, train and precompute can; {why_not}")


def _check_reference(run: TrainConfig | RlConfig) -> None:
    """Raises ValueError for a reference that this run cannot have."""
    wanted = run.reference
    if run.model.quantize and wanted.kind == "live":
        raise ValueError(
            f"model.quantize {run.model.quantize} with reference.kind live: a second copy of the model that is there; "
            "use reference.kind adapter, or cached"
        )
    if wanted.update_every and (wanted.kind != "live" or run.model.lora.r):
        why = f"reference.kind {wanted.kind}" if wanted.kind != "live" else "LoRA"
        raise ValueError(
            f"reference.update_every {wanted.update_every}: only a whole, live reference can follow the policy; "
            f"this run has {why}"
        )
    if wanted.update_every and wanted.path not in (None, run.model.path):
        raise ValueError(
            f"reference.update_every {wanted.update_every}: policy and reference must be one model; leave out "
            f"reference.path {wanted.path}"
        )
    if run.reference.kind == "cached" and run.reference.cache is None:
        raise ValueError("reference.kind cached needs --reference.cache, a folder filled by dpo-ds precompute")
    if run.reference.kind == "adapter" and not run.model.lora.r:
        raise ValueError("reference.kind adapter is the policy without adapters; it needs --model.lora.r above 0")
    if run.reference.kind == "adapter" and run.reference.path not in (None, run.model.path):
        raise ValueError(
            f"reference.kind adapter is model.path {run.model.path} itself; leave out reference.path "
            f"{run.reference.path}, or use reference.kind live"
        )


class PrecomputeConfig(Section):
    """Log-probs of the frozen reference on all pairs, stored once for every later run with reference.kind cached."""

    sides: ClassVar[tuple[str, ...]] = ("chosen", "rejected")
    trains: ClassVar[bool] = False

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


def reference_section(run: TrainConfig | RlConfig | PrecomputeConfig) -> ModelSection:
    """Returns the section that the reference is loaded by; model.revision is of model.path alone."""
    if run.reference.path in (None, run.model.path):
        return run.model
    return run.model.model_copy(update={"path": run.reference.path, "revision": None})


def critic_section(run: RlConfig) -> ModelSection | None:
    """Returns the section that the critic is loaded by: of rl.critic, rl.score's reward model, or model.path; None for
    an algorithm without one.
    """
    rl, model = run.rl, run.model
    if rl.algorithm != "ppo":
        return None
    path = rl.critic or (rl.score if names_model(rl.score) else model.path)
    changes = {"lora": model.lora.model_copy(update={"r": 0})}
    if path != model.path:
        changes |= {"path": path, "revision": None, "from_config": False}
    return model.model_copy(update=changes)


class SampleConfig(Section):
    """Completions of prompts, scored, and the pairs that the scores make: what train takes."""

    model: SampleModelSection
    data: SampleDataSection = SampleDataSection()
    sample: SampleSection
    deepspeed: InferenceSection


class EvaluateConfig(Section):
    """Accuracy and margins on pairs, KL to the reference, reward and win rate of samples; with a report to look at."""

    evaluate: EvaluateSection
    model: ModelOptions = ModelOptions()
    data: EvaluationDataSection = EvaluationDataSection()
    loss: ImplicitRewardSection = ImplicitRewardSection()
    deepspeed: InferenceSection
    output_dir: FilePath = Field(min_length=1, description="everything the run writes goes there")

    @model_validator(mode="after")
    def _has_something_to_measure(self):
        if self.data.eval is None and (self.evaluate.prompts is None or self.evaluate.n == 0):
            raise ValueError("nothing to evaluate on: give preference pairs as data.eval, or evaluate.prompts")
        return self


class ExportConfig(Section):
    """From a sharded checkpoint to a Hugging Face folder, on one process without a GPU."""

    source: FilePath = Field(description="export: a checkpoint folder, or an output_dir for its newest one")
    to: FilePath = Field(description="export: the folder to make")
    dtype: Literal["auto", "fp32", "bf16"] = Field("auto", description="export: of the weights; auto: as trained")
    merge: bool = Field(False, description="export: LoRA's adapters into the model's own weights")
    trust_remote_code: bool = Field(False, description="export: run code that the model's folder brings")
    push: str | None = Field(None, description="export: OWNER/NAME on the Hub to push the folder to; null: nowhere")
    private: bool = Field(True, description="export: as hub.private")

    @field_validator("push")
    @classmethod
    def _is_a_name(cls, given):
        return repository(given)


class ConvertConfig(Section):
    """A config file of TRL, LLaMA-Factory or Axolotl as one of ours, with a list of what could not be translated."""

    file: FilePath = Field(description="convert: the file")
    gpus: int = Field(1, gt=0, description="convert: of the run, for a batch size that is given for one of them")


class PlanConfig(Section):
    """Tells beforehand what a training run will take, from its config and the model's config.json alone: memory, time,
    GPU hours and cost; and what to change where it does not fit.
    """

    run: SerializeAsAny[SftConfig | RlConfig]
    file: FilePath | None
    gpus: int | None = Field(gt=0, le=2**20)  # in all; None: the fewest
    nodes: int | None = Field(gt=0)  # None: as few as eight GPUs each make
    gpu: str
    host_memory: float | None = Field(gt=0)  # GiB of a node; None: not judged
    price: float | None = Field(ge=0)  # of a GPU for an hour
    efficiency: float = Field(gt=0, le=1)
    lengths: tuple[int, int] | None  # mean tokens of a prompt and of a completion
    write: FilePath | None
    as_json: bool


class VerifyConfig(Section):
    """`dpo-ds precompute --verify FOLDER`: every hash of a finished cache, and a summary."""

    verify: FilePath


class DoctorConfig(Section):
    """Looks at what a training run will stand on, makes one step of it and keeps nothing: for before a long run."""

    run: SerializeAsAny[SftConfig]
    lenient: tuple[str, ...]  # checks whose failure is a warning
    as_json: bool


TRAINING = ("train", "sft", "reward")  # on rows that are there
CHECKS = (
    "versions", "clocks", "collectives", "pairs", "data", "mask", "model", "disk", "loss", "reference", "cross-talk",
    "step", "memory", "checkpoint",
)  # fmt: skip

COMMANDS: dict[str, type[Section]] = {
    "sft": SftConfig,
    "reward": RewardConfig,
    "train": TrainConfig,
    "rl": RlConfig,
    "precompute": PrecomputeConfig,
    "sample": SampleConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
    "convert": ConvertConfig,
}
RECORDED = "environment"  # config.yaml's record of versions and machine; not a key, ignored when the file is used again
