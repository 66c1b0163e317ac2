"""DeepSpeed's JSON: read, checked against the run config, its absent and "auto" keys filled. Imports no deepspeed.

The files keep their usual form, so that those written for the Hugging Face trainer work unchanged. The engine itself
always gets one pair a micro-batch and no accumulation: where a global batch ends is ours to say (trainer.py).
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_ds.config import TrainSection, did_you_mean
from dpo_ds.config.deepspeed_keys import (
    ADAMW,
    AUTO,
    IMPLEMENTATION,
    MATHEMATICS,
    SECTIONS,
    TYPED,
    check_keys,
    with_defaults,
)
from dpo_ds.config.text_file import read_text
from dpo_ds.errors import ConfigError, shorten

LEAST_BUCKET = 2**24  # elements: width 4096 squared; smaller messages cost more time than they save memory
MOST_BUCKET = 2**28  # elements, half a GiB in bf16
LAYER = 16  # times the width squared: a little more elements than a dense decoder layer has (Llama 3: 13 to 15)
EVERY_WEIGHT = 2**62  # elements
SCHEDULE_OF = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}


@dataclass(frozen=True)
class Machine:
    """Describes what "auto" depends on: ranks in the job, device type, and whether it computes bf16."""

    ranks: int
    device: str
    has_bf16: bool


def read(path: str, key: str = "deepspeed.config") -> dict:
    """The JSON object in `path`.

    Raises:
        ConfigError: missing, not UTF-8, not JSON, or not an object.
    """
    if path == "none" and not Path(path).exists():
        raise ConfigError(f"--{key} none: training needs a DeepSpeed engine; ds_configs/ holds tested files")
    text = read_text(path, key, missing="no such file; ds_configs/ holds tested ones")
    try:
        values = json.loads(text, object_pairs_hook=_object, parse_constant=_no_number)
    except RecursionError:
        raise ConfigError(f"--{key} {path}: nested too deeply for a DeepSpeed config") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"--{key} {path}:{error.lineno}:{error.colno}: not JSON ({error.msg})") from None
    except ValueError as error:  # ours, or Python's of a number of 4300 digits
        raise ConfigError(f"--{key} {path}: {str(error).split('; use sys')[0]}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"--{key} {path}: holds a {type(values).__name__}, a DeepSpeed config is an object {{...}}")
    return values


def _no_number(word: str):
    raise ValueError(f"{word} is no number that a DeepSpeed config can hold")


def _object(pairs: list[tuple[str, Any]]) -> dict:
    """A JSON object in which no key stands twice; null counts as absent."""
    values = dict(pairs)
    if len(values) < len(pairs):
        repeated = next(key for i, (key, _) in enumerate(pairs) if key in [other for other, _ in pairs[:i]])
        raise ValueError(f"{repeated!r} is given twice in one object")
    return {key: value for key, value in values.items() if value is not None}


def fill_policy(
    given: dict, path: str, run: TrainSection, machine: Machine, hidden_size: int
) -> tuple[dict, list[str]]:
    """Returns what the policy's engine gets, and lines on what the JSON asks for that happens otherwise.

    Raises:
        ConfigError: a literal contradicts the run config (both named), or asks for what this trainer does not do.
    """
    config = copy.deepcopy(given)
    notes = _check_common(config, path, machine)
    notes += _check_batch(config, path, run, machine)
    _take_literal(config, path, "gradient_clipping", "train.max_grad_norm", run.max_grad_norm)
    optimizer = _optimizer(config, path, run, machine)
    notes += _check_scheduler(config, path, run)
    zero = _fill_zero(config, hidden_size, machine)
    _check_hpz(zero, path, machine)
    _check_optimizer_offload(zero, path)
    filled = config | _batch_of_one(machine) | {"zero_optimization": zero, "optimizer": optimizer}
    filled["gradient_clipping"] = run.max_grad_norm  # 0 switches it off, where absent means 1
    if zero.get("offload_optimizer") and machine.device == "cpu":
        filled["zero_force_ds_cpu_optimizer"] = False  # DeepSpeedCPUAdam would need a compiler
    _fill_precision(filled, machine)
    return with_defaults(_without_auto(filled), MATHEMATICS), notes


def fill_reference(
    given: dict, path: str, machine: Machine, hidden_size: int, name: str = "reference"
) -> tuple[dict, list[str]]:
    """Returns what the reference's engine gets: partitioned weights and nothing that belongs to training.

    name: what the model is, where it is another one that only answers.

    With `optimizer` left in, DeepSpeed would silently build a second full ZeRO-3 optimizer.
    """
    config = copy.deepcopy(given)
    notes = _check_common(config, path, machine)
    for training_only in ("optimizer", "scheduler", "gradient_clipping", "data_types"):
        config.pop(training_only, None)
    zero = _fill_zero(config, hidden_size, machine)
    for training_only in ("offload_optimizer", "zero_hpz_partition_size", "zero_quantized_gradients"):
        zero.pop(training_only, None)  # hpZ on two models in one process crashes
    _give_own_folder(zero, name)
    filled = config | _batch_of_one(machine) | {"zero_optimization": zero}
    _fill_precision(filled, machine)
    filled.pop("data_types", None)
    return with_defaults(_without_auto(filled), MATHEMATICS), notes


def fill_critic(given: dict, path: str, run: TrainSection, machine: Machine, hidden_size: int) -> dict:
    """Returns what the engine of a model gets that is trained beside the policy, whose notes hold for it, too.

    Raises:
        ConfigError: as `fill_policy`.
    """
    filled, _ = fill_policy(given, path, run, machine, hidden_size)
    _give_own_folder(filled["zero_optimization"], "critic")
    return filled


def _give_own_folder(zero: dict, name: str) -> None:
    """DeepSpeed empties the folder on NVMe for each engine that it makes."""
    if zero.get("offload_param", {}).get("nvme_path"):
        zero["offload_param"] = zero["offload_param"] | {"nvme_path": f"{zero['offload_param']['nvme_path']}/{name}"}


def _check_optimizer_offload(zero: dict, path: str) -> None:
    """DeepSpeed 0.19.8 leaves the fp32 weights and moments that lie on NVMe out of a checkpoint's shards, and copies
    its swap files beside them instead, without fsync.
    """
    if zero.get("offload_optimizer", {}).get("device") == "nvme":
        raise ConfigError(
            f"{path}: offload_optimizer.device nvme is refused: DeepSpeed's checkpoints would hold no weights; use cpu "
            "(offload_param may stay on nvme)"
        )


def is_bf16(filled: dict) -> bool:
    return bool(filled.get("bf16", {}).get("enabled", False))


def _check_common(config: dict, path: str, machine: Machine) -> list[str]:
    for section in SECTIONS:
        if section in config and not isinstance(config[section], dict) and config[section] != AUTO:
            raise ConfigError(f"{path}: {section} is {shorten(config[section])}, DeepSpeed expects an object {{...}}")
        if config.get(section) == AUTO:
            del config[section]
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", AUTO)
    if stage != AUTO and (stage != 3 or type(stage) is not int):
        shown = _as_json(stage)
        why = {1: "ZeRO-1 and 2 accumulate gradients wrongly (DeepSpeed#7718)", 0: "it shards nothing"}
        reason = why.get(min(stage, 1), "") if type(stage) is int else "it must be the number 3"
        raise ConfigError(f"{path}: zero_optimization.stage {shown} is refused, {reason}; set it to 3 or leave it out")
    for section in ("fp16", "bf16"):
        enabled = config.get(section, {}).get("enabled", AUTO)
        if enabled != AUTO and not isinstance(enabled, bool):
            raise ConfigError(f'{path}: {section}.enabled is {_as_json(enabled)}, must be true, false or "auto"')
    if config.get("fp16", {}).get("enabled") is True:
        raise ConfigError(f"{path}: fp16 is refused, its range is too small for log-probs; use bf16 or fp32")
    for section in ("amp", "torch_autocast"):
        if config.pop(section, {}).get("enabled", False) not in (False, AUTO):
            raise ConfigError(f"{path}: amp and torch_autocast are refused, they hide a type; use bf16 or fp32")
    if not zero.get("compute_grad_norm", True):
        raise ConfigError(f"{path}: zero_optimization.compute_grad_norm false is refused, the norm is logged")
    config.pop("fp16", None)
    for section in TYPED.keys() & config.keys():
        config[section] = _without_auto(config[section])
    notes = check_keys(config, path)
    if config.get("bf16", {}).get("enabled") is True and not machine.has_bf16:
        notes.append(f"{path}: bf16 on a {machine.device} without bf16 arithmetic is about ten times slower than fp32")
    return notes


def _check_batch(config: dict, path: str, run: TrainSection, machine: Machine) -> list[str]:
    """Returns what becomes of sizes that the file gives: they may agree, and decide nothing."""
    total, micro, accumulation = (
        config.get(key, AUTO)
        for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    )
    for number in (total, micro, accumulation):
        if number != AUTO and type(number) is not int:
            raise ConfigError(f'{path}: batch size {_as_json(number)} must be a whole number or "auto"')
    if total != AUTO and total != run.global_batch_size:
        raise ConfigError(
            f"{path}: train_batch_size {total} contradicts train.global_batch_size {run.global_batch_size}; "
            'make them equal or write "auto"'
        )
    if AUTO not in (micro, accumulation) and micro * accumulation * machine.ranks != run.global_batch_size:
        raise ConfigError(
            f"{path}: train_micro_batch_size_per_gpu {micro} x gradient_accumulation_steps {accumulation} x "
            f'{machine.ranks} ranks contradicts train.global_batch_size {run.global_batch_size}; write "auto"'
        )
    sizes = {"train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": accumulation}
    given = " and ".join(f"{key} {size}" for key, size in sizes.items() if size != AUTO)
    if not given:
        return []
    return [
        f"{path}: {given} not used: a micro-batch holds train.micro_batch_tokens {run.micro_batch_tokens} tokens, "
        f"and as many of them as train.global_batch_size {run.global_batch_size} takes make an update"
    ]


def _take_literal(node: dict, path: str, key: str, run_key: str, value: Any) -> None:
    """Drops `key` when it says what the run config says or "auto"."""
    given = node.pop(key.rsplit(".", 1)[-1], AUTO)
    if given == AUTO:
        return
    value = list(value) if isinstance(value, tuple) else value
    if isinstance(given, bool) or given != value:
        raise ConfigError(
            f'{path}: {key} {shorten(given)} contradicts {run_key} {value}; make them equal or write "auto"'
        )


def _optimizer(config: dict, path: str, run: TrainSection, machine: Machine) -> dict:
    given = config.pop("optimizer", {})
    kind = given.get("type", AUTO)
    if kind not in (AUTO, "AdamW"):
        raise ConfigError(f'{path}: optimizer.type {shorten(kind)} is not supported; use "AdamW" or leave it out')
    params = dict(given.get("params", {}))
    ours = {"lr": "learning_rate", "betas": "adam_betas", "eps": "adam_eps", "weight_decay": "weight_decay"}
    for key, name in ours.items():
        _take_literal(params, path, f"optimizer.params.{key}", f"train.{name}", getattr(run, name))
        params[key] = getattr(run, name)
    params["betas"] = list(params["betas"])
    for key, value in ADAMW.items():
        if params.pop(key, AUTO) not in (AUTO, value):
            raise ConfigError(f"{path}: optimizer.params.{key} must be {json.dumps(value)} in AdamW; leave it out")
    for key in params.keys() - ours.keys() - set(IMPLEMENTATION):
        nearest = did_you_mean(key, [*ours, *IMPLEMENTATION])
        raise ConfigError(f"{path}: unknown key 'optimizer.params.{key}' of AdamW; {nearest}")
    of_torch = {"fused", "foreach"} & params.keys()
    if of_torch and machine.device != "cpu" and not params.get("torch_adam"):
        raise ConfigError(f"{path}: optimizer.params.{min(of_torch)} is torch's; give torch_adam true beside it")
    if machine.device == "cpu":
        params["torch_adam"] = True  # FusedAdam is built with a compiler at the first start
        params.setdefault("fused", not params.get("foreach"))  # torch's own, one pass over the memory
    return {"type": "AdamW", "params": params}


def _check_scheduler(config: dict, path: str, run: TrainSection) -> list[str]:
    """The learning rate is set from train.schedule before every update; a scheduler in the JSON may only agree."""
    given = config.pop("scheduler", None)
    if given is None:
        return []
    params = dict(given.get("params", {}))
    _take_literal(params, path, "scheduler.params.warmup_max_lr", "train.learning_rate", run.learning_rate)
    _take_literal(params, path, "scheduler.params.warmup_num_steps", "train.warmup_steps", run.warmup_steps)
    kind = given.get("type", AUTO)
    if not isinstance(kind, str):
        raise ConfigError(f"{path}: scheduler.type is {shorten(kind)}, must be a name")
    if SCHEDULE_OF.get(kind) == run.schedule or kind == AUTO:
        return []
    return [f"{path}: scheduler {kind[:60]} is not used; the learning rate follows train.schedule {run.schedule}"]


def bucket_size(hidden_size: int) -> int:
    """Returns the elements of a decoder layer of this width, roughly, and no fewer than a message is worth."""
    return max(min(LAYER * hidden_size**2, MOST_BUCKET), hidden_size**2, LEAST_BUCKET)


def _fill_zero(config: dict, hidden_size: int, machine: Machine) -> dict:
    """Sizes of what is "auto". A layer is a unit: its gradients are reduced in one message, and the weights of the next
    one are fetched in one while it computes. Of a single rank every slice is the weight itself, which stays in place.
    """
    zero = config.pop("zero_optimization", {}) | {"stage": 3}
    bucket = bucket_size(hidden_size)
    stays = machine.ranks == 1 and (zero.get("offload_param") or {}).get("device", "none") == "none"
    sizes = {
        "reduce_bucket_size": bucket,
        "stage3_prefetch_bucket_size": bucket,
        "stage3_param_persistence_threshold": EVERY_WEIGHT if stays else 10 * hidden_size,
    }
    for key, size in sizes.items():
        if zero.get(key, AUTO) == AUTO:
            zero[key] = size
    return zero


def _check_hpz(zero: dict, path: str, machine: Machine) -> None:
    size = zero.get("zero_hpz_partition_size", 1)
    if type(size) is not int or size < 1 or machine.ranks % min(size, machine.ranks):
        raise ConfigError(
            f"{path}: zero_optimization.zero_hpz_partition_size {json.dumps(size)} does not divide {machine.ranks} "
            "ranks; it is the number of GPUs of a node"
        )


def _fill_precision(filled: dict, machine: Machine) -> None:
    enabled = filled.get("bf16", {}).get("enabled", AUTO)
    bf16 = machine.has_bf16 and machine.device != "cpu" if enabled == AUTO else enabled
    filled["bf16"] = filled.get("bf16", {}) | {"enabled": bf16}
    if bf16 and filled.get("data_types", {}).get("grad_accum_dtype", AUTO) == AUTO:
        filled["data_types"] = {"grad_accum_dtype": "fp32"}  # else accumulation and reduction are bf16


def _batch_of_one(machine: Machine) -> dict:
    return {
        "train_batch_size": machine.ranks,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 2**31 - 1,
        "timers": {"throughput": {"enabled": False}},  # it synchronises every forward
        "checkpoint": {"tag_validation": "Fail"},
    }


def _as_json(value: Any, width: int = 60) -> str:
    shown = json.dumps(value)
    return shown if len(shown) <= width else shown[: width - 1] + "…"


def _without_auto(node: Any) -> Any:
    """DeepSpeed's own default stands for every "auto" that is nobody's to fill."""
    if isinstance(node, dict):
        return {key: _without_auto(value) for key, value in node.items() if value != AUTO}
    return node
