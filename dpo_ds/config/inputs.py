"""Lists what a run reads and where it saves: models, data, reference, checkpoints, DeepSpeed's files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, TypeAdapter, ValidationError, field_validator, model_validator

from dpo_ds.config.section import FilePath, Section, checked_source, path_of
from dpo_ds.config.text_file import read_text
from dpo_ds.errors import shorten


class LoraSection(Section):
    r: int = Field(0, ge=0, le=65536, description="rank of the adapters; 0: train all weights")
    alpha: float | None = Field(None, gt=0, description="adapters count alpha / r times; 2 r if not given")
    dropout: float = Field(0.0, ge=0, lt=1, description="on the adapters' input while training")
    target_modules: str | list[str] = Field(
        "all-linear", description="names of linear layers, or a regular expression of whole names; never the head"
    )

    @field_validator("target_modules")
    @classmethod
    def _compiles(cls, given):
        try:
            re.compile(given if isinstance(given, str) else "")
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{shorten(given)} is no regular expression ({error})") from None
        return given


class ModelOptions(Section):
    """How any model is loaded."""

    attn: str = Field("auto", description="transformers' attention implementation of the padded layout")
    trust_remote_code: bool = Field(False, description="run model code that comes with the folder")


class SampleModelSection(ModelOptions):
    """A model as it lies in its folder."""

    path: FilePath = Field(description="Hugging Face folder or Hub id")
    revision: str | None = Field(None, description="branch, tag or commit on the Hub")
    from_config: bool = Field(False, description="random weights from the folder's config.json, for tests")


class ModelSection(SampleModelSection):
    compile: bool | Literal["auto"] = Field(
        "auto", description="torch.compile of each decoder layer; auto: on a GPU where there is a compiler"
    )
    router_aux_loss: float | None = Field(
        None, ge=0, description="what the auxiliary loss of a mixture's routers counts; null: what config.json says"
    )
    quantize: Literal["4bit"] | None = Field(
        None, description="4bit: frozen weights in NF4, on which LoRA's adapters train (QLoRA); needs CUDA"
    )
    lora: LoraSection = LoraSection()

    @model_validator(mode="after")
    def _quantizes_what_is_read(self):
        if self.quantize and self.from_config:
            raise ValueError(f"quantize {self.quantize}: weights are quantised as they are read; not from_config")
        return self


JINJA = ("{{", "{%")  # what every chat template holds
INTEGER = TypeAdapter(int)


class PromptDataSection(Section):
    """Lists the keys of the data section that prompts need."""

    format: str = Field(
        "auto",
        description="auto, explicit, implicit, hh, sharegpt, alpaca, orca, ranked, unpaired; "
        "sft: completion, messages, text",
    )
    columns: dict[str, str] = Field(default_factory=dict, description="renames: {chosen: better, rejected: worse}")
    max_length: int = Field(2048, gt=1, le=2**26, description="tokens of prompt plus one completion")
    max_prompt_length: int = Field(
        1024, gt=0, description="tokens of the prompt; not given, at most half of a data.max_length up to 1024"
    )
    on_bad_row: Literal["error", "skip"] = Field("error", description="skip counts them and lists them in the census")
    ignore_columns: list[str] = Field(
        default_factory=list, description="columns to leave out, though they carry meaning, such as system or images"
    )
    chat_template: str | None = Field(
        None, description="Jinja: a file, the text, or the name of one of the tokenizer's; null: the tokenizer's own"
    )

    @field_validator("chat_template")
    @classmethod
    def _text_of(cls, given):
        """Puts the file's text in the place of its path, so that what records this config holds the template itself.

        A name is left as it is: the tokenizer knows whether it has such a template.
        """
        if given is None or any(mark in given for mark in JINJA):
            return given
        path = Path(path_of(given))
        if not path.exists() and path.name == given and not path.suffix:
            return given
        text = read_text(path, "data.chat_template", "no such file")
        if not any(mark in text for mark in JINJA):
            raise ValueError(f"{shorten(given)} holds no Jinja: a chat template has {' or '.join(JINJA)} in it")
        return text

    @model_validator(mode="before")
    @classmethod
    def _half_for_the_prompt(cls, values):
        """Gives the prompt half of max_length where that alone is given and the other's default would leave no room."""
        if not isinstance(values, dict) or "max_length" not in values:
            return values
        try:
            length = INTEGER.validate_python(values["max_length"])  # text of the command line, 512.0 of a YAML file
        except ValidationError:  # which the key itself tells
            return values
        if 1 < length <= cls.model_fields["max_prompt_length"].default:
            return {"max_prompt_length": length // 2} | values
        return values


class SampleDataSection(PromptDataSection):
    limit: int | None = Field(None, gt=0, description="use the first n rows read, before dropping")


class EvaluationDataSection(PromptDataSection):
    prompt_rendering: Literal["conversation", "generation"] = Field(
        "conversation",
        description="the prompt that the chat template writes before an answer that is there, or before one to come",
    )
    eval: str | list[str | dict[str, Any]] | None = Field(None, description="pairs to evaluate on, given as data.train")

    @field_validator("train", "eval", check_fields=False)
    @classmethod
    def _weights(cls, source):
        return checked_source(source)

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
    group: Literal["none", "prompt"] = Field(
        "none", description="prompt: rows of one prompt share a batch, the prompt and each completion computed once"
    )


class ReferenceSection(Section):
    kind: Literal["live", "cached", "adapter", "none"] = Field(
        "live",
        description="live: a second, inference-only engine; cached: from reference.cache; adapter: LoRA off; "
        "none: only, and by default, for the losses that need no reference",
    )
    path: FilePath | None = Field(None, description="the reference model; model.path if not given")
    cache: FilePath | None = Field(None, description="folder that dpo-ds precompute fills, for reference.kind cached")
    update_every: int = Field(0, ge=0, description="steps between updates of a live reference (TR-DPO); 0: frozen")
    update_alpha: float = Field(0.6, gt=0, le=1, description="share of the policy in such an update")


class InferenceSection(Section):
    config: FilePath = Field(description="a DeepSpeed JSON file; absent and auto keys are filled from this config")


class DeepSpeedSection(InferenceSection):
    reference_config: FilePath | None = Field(
        None, description="the reference's JSON file; derived from config if not given"
    )


class CheckpointSection(Section):
    every: int = Field(0, ge=0, description="steps between checkpoints; 0: at the end only")
    keep: int = Field(2, gt=0, description="newest complete checkpoints kept")
    best: str | None = Field(
        None, description="metric of evaluations, such as eval_loss: the checkpoint with the best is kept, too, and "
        "becomes final/; null: final/ is the last step"
    )
    asynchronous: bool = Field(True, description="write from a copy in host memory while training goes on")
    resume: FilePath = Field("auto", description="auto: the newest complete one, else start; never; or a folder")
    save_before_end_seconds: int = Field(0, ge=0, description="save and exit 75 so long before the time limit; 0: off")
    time_limit_seconds: int = Field(0, ge=0, description="of this process; 0: Slurm's SLURM_JOB_END_TIME alone")
