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
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from dpo_ds import yaml_file
from dpo_ds.errors import ConfigError

LOSSES = ("dpo",)  # dpo_ds.losses.LOSSES by name; kept equal by a test, because that module imports torch


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


class LoraSection(Section):
    r: int = Field(0, ge=0, description="rank of the adapters; 0: train all weights")
    alpha: float | None = Field(None, gt=0, description="adapters count alpha / r times; 2 r if not given")
    dropout: float = Field(0.0, ge=0, lt=1, description="on the adapters' input while training")
    target_modules: str | list[str] = Field("all-linear", description="names of linear layers, never the head")


class ModelSection(Section):
    path: str = Field(description="Hugging Face folder or Hub id")
    revision: str | None = Field(None, description="branch, tag or commit on the Hub")
    from_config: bool = Field(False, description="random weights from the folder's config.json, for tests")
    attn: str = Field("auto", description="transformers' attention implementation of the padded layout")
    trust_remote_code: bool = Field(False, description="run model code that comes with the folder")
    lora: LoraSection = LoraSection()


class DataSection(Section):
    train: str | list[str | dict[str, Any]] = Field(description="path, Hub id, or list of them with weights")
    eval: str | list[str | dict[str, Any]] | None = Field(None, description="the same, for evaluation")
    format: str = Field("auto", description="auto, explicit, implicit, hh, sharegpt, alpaca; sft: completion, messages")
    columns: dict[str, str] = Field(default_factory=dict, description="renames: {chosen: better, rejected: worse}")
    max_length: int = Field(2048, gt=1, description="tokens of prompt plus one completion")
    max_prompt_length: int = Field(1024, gt=0, description="tokens of the prompt")
    limit: int | None = Field(None, gt=0, description="train on the first n rows read, before dropping")
    on_bad_row: Literal["error", "skip"] = Field("error", description="skip counts them and lists them in the census")

    @field_validator("train", "eval")
    @classmethod
    def _weights(cls, source):
        items = source if isinstance(source, list) else [source]
        if not items:
            raise ValueError("an empty list; name at least one path or Hub id")
        for item in items:
            if not isinstance(item, dict):
                continue
            if set(item) - {"path", "weight"} or not isinstance(item.get("path"), str):
                raise ValueError(f"{item} is not a source; write {{path: ..., weight: 1.0}}")
            given = item.get("weight", 1.0)
            try:
                item["weight"] = float(given)  # YAML reads 1e-1 as text
            except (TypeError, ValueError):
                item["weight"] = 0.0
            if not 0 < item["weight"] < float("inf"):
                raise ValueError(f"weight {given!r} of {item['path']} must be a number above 0")
        return source

    @model_validator(mode="after")
    def _room_for_completions(self):
        if self.max_prompt_length >= self.max_length:
            raise ValueError(
                f"data.max_prompt_length {self.max_prompt_length} must be below data.max_length {self.max_length}, "
                "or no token of a completion is left"
            )
        return self


class LossSection(Section):
    name: str = Field("dpo", description=", ".join(LOSSES))
    beta: float = Field(0.1, gt=0, description="strength of the pull to the reference")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="probability that a label is flipped (cDPO)")

    @field_validator("name")
    @classmethod
    def _known(cls, name):
        if name not in LOSSES:
            raise ValueError(f"unknown loss {name!r}; {did_you_mean(name, LOSSES)}")
        return name


class ReferenceSection(Section):
    kind: Literal["live", "cached", "adapter"] = Field(
        "live", description="live: a second, inference-only engine; cached: from reference.cache; adapter: LoRA off"
    )
    path: str | None = Field(None, description="the reference model; model.path if not given")
    cache: str | None = Field(None, description="folder that dpo-ds precompute fills and reference.kind cached reads")


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


class DeepSpeedSection(Section):
    config: str = Field(description="a DeepSpeed JSON file; absent and auto keys are filled from this config")
    reference_config: str | None = Field(
        None, description="the reference's JSON file; derived from config if not given"
    )


class PrecomputeSection(Section):
    layout: Literal["packed", "padded"] = Field("packed", description="packed: no padding, each prompt computed once")
    micro_batch_tokens: int = Field(16384, gt=0, description="tokens a rank holds in one forward, padding included")
    shard_rows: int = Field(512, gt=0, description="pairs a file: the most that a killed rank computes again")
    threads: int = Field(1, gt=0, description="CPU threads a rank; decides last bits, so it does not follow the ranks")


class CheckpointSection(Section):
    every: int = Field(0, ge=0, description="steps between checkpoints; 0: at the end only")
    keep: int = Field(2, gt=0, description="newest complete checkpoints kept")
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


class TrainConfig(SftConfig):
    """Preference optimisation of a policy on pairs, against a frozen reference."""

    loss: LossSection = LossSection()
    reference: ReferenceSection = ReferenceSection()

    @model_validator(mode="after")
    def _reference_fits(self):
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
    "train": TrainConfig,
    "precompute": PrecomputeConfig,
    "export": ExportConfig,
}
_ELSEWHERE = {name for config in COMMANDS.values() for name in config.model_fields}
RECORDED = "environment"  # config.yaml's record of versions and machine; not a key, ignored when the file is used again


def keys(config: type[Section], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> pydantic field, in the order of declaration: what flags and README are made from."""
    found = {}
    for name, field in config.model_fields.items():
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
    unused = sorted(set(values) & (_ELSEWHERE - set(config.model_fields)))
    for name in unused:
        del values[name]
    for name, value in values.items():
        if name in config.model_fields and _is_section(config.model_fields[name]):
            values[name] = {} if value is None else value  # `train:` with nothing under it
            if not isinstance(values[name], dict):
                example = next(key for key in keys(config) if key.startswith(f"{name}."))
                raise ConfigError(f"{path}: {name} is {value!r}, expected keys below it, such as {example}")
    for key in _unknown(values, config):
        if key in keys(config):
            raise ConfigError(f"{path}: {key!r} is written with a dot; nest it: {key.replace('.', ': {', 1)}: ...}}")
        known = keys(config) if "." in key else config.model_fields
        raise ConfigError(f"{path}: unknown key {key!r}; {did_you_mean(key, known)}")
    return values, [f"{path}: {command} does not use {', '.join(unused)}"] if unused else []


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
