"""Translates a config file of TRL, LLaMA-Factory or Axolotl into a run config of ours, as far as both mean the same.

A key whose answer in names.yaml is a key of ours is copied. What has to be put together is here, a function each. All
else is listed with its answer. Checking what came out is left to the config itself.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from dpo_ds.config import yaml_file
from dpo_ds.config.evaluation import OF_PAIRS, OF_ROWS, OF_SCORES
from dpo_ds.config.loss import LossName
from dpo_ds.config.peers.names import answer_to
from dpo_ds.errors import ConfigError, shorten

LOSSES = {"sigmoid": "dpo", "kto_pair": "kto", "aot_pair": "aot"}
SCHEDULES = {
    "linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant",
    "cosine_with_min_lr": "cosine_with_min_lr", "inverse_sqrt": "inverse_sqrt", "warmup_stable_decay": "wsd",
}  # fmt: skip
STAGES = {"sft": "sft", "dpo": "train", "kto": "train", "rm": "reward"}
PREFERENCES = ("dpo", "ipo", "orpo", "kto", "simpo")  # Axolotl's `rl`
DEEPSPEED = "ds_configs/zero3_bf16.json"
PATIENCE = ("early_stopping_patience", "early_stopping_steps")
EVALUATED = {"sft": OF_ROWS, "reward": OF_SCORES, "train": OF_PAIRS}
OFF = (None, "", "no", "none", False)


@dataclass
class Translation:
    """command and values: ours, by dotted key. notes: what was left out or changed, a line each. gpus: of the run."""

    peer: str
    gpus: int
    command: str = "train"
    values: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def note(self, key: str, value: Any, why: str) -> None:
        self.notes.append(f"{key} {shorten(value)}: {why}")


def translate(path: Path, gpus: int) -> Translation:
    """Translates a file. gpus: of the run, for a batch size that is given for one of them.

    Raises:
        ConfigError: no YAML, of none of the three, or of training that is not here.
    """
    given = {key: value for key, value in yaml_file.read_mapping(path, "file").items() if value is not None}
    peer = _peer_of(given, path)
    done = Translation(peer, gpus)
    taken = COMMANDS_OF[peer](given, done, path)
    for part in (_data, _batch, _schedule, _adapters, _evaluation, _saving, _hub, _trackers, _loss, _rest):
        taken |= part(given, done)
    for key, value in given.items():
        if key not in taken:
            _copy(key, value, done)
    if "deepspeed.config" not in done.values:
        done.values["deepspeed.config"] = DEEPSPEED
        done.notes.append(f"deepspeed.config is {DEEPSPEED}, of ours: the file names none")
    return done


def _peer_of(given: dict, path: Path) -> str:
    if "base_model" in given:
        return "Axolotl"
    if "stage" in given or "finetuning_type" in given:
        return "LLaMA-Factory"
    if "model_name_or_path" in given or "per_device_train_batch_size" in given:
        return "TRL"
    raise ConfigError(
        f"{path}: a config of none of TRL, LLaMA-Factory and Axolotl: it has no model_name_or_path, stage or base_model"
    )


def _command_of_trl(given: dict, done: Translation, path: Path) -> set[str]:
    only_sft = {"packing", "completion_only_loss", "assistant_only_loss", "dataset_text_field", "eval_packing"}
    if "center_rewards_coefficient" in given:
        done.command = "reward"
    elif only_sft & given.keys() and not {"beta", "loss_type"} & given.keys():
        done.command = "sft"
    elif not {"beta", "loss_type", "precompute_ref_log_probs"} & given.keys():
        done.notes.append("the file does not say which trainer it is of: taken for DPOTrainer's")
    return set()


def _command_of_llama_factory(given: dict, done: Translation, path: Path) -> set[str]:
    stage = given.get("stage", "sft")
    if stage not in STAGES:
        raise ConfigError(f"{path}: stage {shorten(stage)}: {', '.join(STAGES)} can be translated")
    done.command = STAGES[stage]
    if stage == "kto":
        done.values["loss.name"] = "kto"
    return {"stage", "do_train"}


def _command_of_axolotl(given: dict, done: Translation, path: Path) -> set[str]:
    kind = given.get("rl")
    done.command = "train" if kind else "reward" if given.get("reward_model") else "sft"
    if kind and kind not in PREFERENCES:
        raise ConfigError(f"{path}: rl {shorten(kind)}: {', '.join(PREFERENCES)} can be translated")
    if kind:
        done.values["loss.name"] = kind
    return {"rl", "reward_model"}


COMMANDS_OF = {"TRL": _command_of_trl, "LLaMA-Factory": _command_of_llama_factory, "Axolotl": _command_of_axolotl}


def _data(given: dict, done: Translation) -> set[str]:
    for theirs, ours in (("dataset", "data.train"), ("eval_dataset", "data.eval")):
        if names := given.get(theirs):
            names = names.split(",") if isinstance(names, str) else names
            found = [_of_dataset_info(name.strip(), given, done) for name in names]
            done.values[ours] = found[0] if len(found) == 1 else found
    for theirs, ours in (("datasets", "data.train"), ("test_datasets", "data.eval")):
        if sources := given.get(theirs):
            found = [_of_axolotl(source, done) for source in sources]
            done.values[ours] = found[0] if len(found) == 1 else found
    if template := given.get("template"):
        done.note("template", template, "the tokenizer's own chat template is used; another one is data.chat_template")
    return {"dataset", "eval_dataset", "dataset_dir", "datasets", "test_datasets", "template"}


def _of_dataset_info(name: str, given: dict, done: Translation) -> str:
    """Returns where LLaMA-Factory's dataset_info.json says that a data set is, and renames its columns."""
    folder = Path(given.get("dataset_dir", "data"))
    info = folder / "dataset_info.json"
    try:
        entry = json.loads(info.read_text(encoding="utf-8"))[name]
    except (OSError, ValueError, KeyError, TypeError):
        done.note("dataset", name, f"taken for a path or Hub id, {info} does not tell what it is")
        return name
    ours = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected", "messages": "conversations"}
    for theirs, column in entry.get("columns", {}).items():
        if theirs in ours and column != ours[theirs]:
            done.values.setdefault("data.columns", {})[ours[theirs]] = column
        elif theirs not in ours:
            done.note(f"{name}.columns.{theirs}", column, "not translated; data.columns renames columns")
    return str(folder / entry["file_name"]) if "file_name" in entry else entry.get("hf_hub_url", name)


def _of_axolotl(source: dict, done: Translation) -> str:
    files = source.get("data_files")
    files = [files] if isinstance(files, str) else files or []
    for key in sorted(source.keys() - {"path", "data_files", "ds_type", "split"}):
        done.note(f"datasets.{key}", source[key], "the format is found from the rows; data.columns renames columns")
    return files[0] if len(files) == 1 else source.get("path", "")


def _batch(given: dict, done: Translation) -> set[str]:
    one = given.get("per_device_train_batch_size", given.get("micro_batch_size"))
    accumulated = given.get("gradient_accumulation_steps", 1)
    if isinstance(one, int) and isinstance(accumulated, int):
        done.values["train.global_batch_size"] = one * accumulated * done.gpus
        done.notes.append(
            f"train.global_batch_size is {one} x {accumulated} x {done.gpus} GPUs, of all of them together "
            "(dpo-ds convert --gpus N translates for N); train.micro_batch_tokens bounds one forward"
        )
    if isinstance(steps := given.get("max_steps"), int) and steps > 0:
        done.values["train.max_steps"] = steps
    return {"per_device_train_batch_size", "micro_batch_size", "gradient_accumulation_steps", "max_steps"}


def _schedule(given: dict, done: Translation) -> set[str]:
    kind = given.get("lr_scheduler_type", given.get("lr_scheduler"))
    if kind in SCHEDULES:
        done.values["train.schedule"] = SCHEDULES[kind]
    elif kind is not None:
        done.note("lr_scheduler_type", kind, f"not here; train.schedule has {', '.join(SCHEDULES.values())}")
    options = dict(given.get("lr_scheduler_kwargs") or {})
    if "min_lr_rate" in options:
        done.values["train.min_lr_ratio"] = options.pop("min_lr_rate")
    for key, value in options.items():
        done.note(f"lr_scheduler_kwargs.{key}", value, "not translated")
    betas = [given.get(key, default) for key, default in (("adam_beta1", 0.9), ("adam_beta2", 0.999))]
    if {"adam_beta1", "adam_beta2"} & given.keys():
        done.values["train.adam_betas"] = betas
    if isinstance(warmup := given.get("warmup_steps"), float) and 0 < warmup < 1:
        done.values["train.warmup_ratio"] = warmup
    elif warmup:
        done.values["train.warmup_steps"] = int(warmup)
    taken = {"lr_scheduler_type", "lr_scheduler", "lr_scheduler_kwargs", "adam_beta1", "adam_beta2", "warmup_steps"}
    return taken | ({"warmup_ratio"} if warmup else set())


def _adapters(given: dict, done: Translation) -> set[str]:
    uses = given.get("use_peft") or given.get("adapter") or given.get("finetuning_type") == "lora"
    names = {"r": ("lora_r", "lora_rank"), "alpha": ("lora_alpha",), "dropout": ("lora_dropout",)}
    targets = given.get("lora_target_modules", given.get("lora_target"))
    if isinstance(targets, str) and "," in targets:
        targets = [name.strip() for name in targets.split(",")]
    if given.get("lora_target_linear") or targets in ("all", ["all"]):
        targets = "all-linear"
    if uses:
        done.values["model.lora.r"] = 8 if given.get("finetuning_type") else 16  # their defaults
        for ours, theirs in names.items():
            done.values |= {f"model.lora.{ours}": given[key] for key in theirs if key in given}
        if targets:
            done.values["model.lora.target_modules"] = targets
    taken = {"use_peft", "adapter", "finetuning_type", "lora_target", "lora_target_modules", "lora_target_linear"}
    bits = 4 if given.get("load_in_4bit") or given.get("adapter") == "qlora" else given.get("quantization_bit")
    if bits == 4 and uses and done.command != "reward":
        done.values["model.quantize"] = "4bit"
        taken |= {"load_in_4bit", "quantization_bit"}
    return taken.union(*names.values())


def _evaluation(given: dict, done: Translation) -> set[str]:
    strategy = given.get("eval_strategy", given.get("evaluation_strategy", "steps"))
    if strategy == "steps" and isinstance(given.get("eval_steps"), int):
        done.values["train.eval_every"] = given["eval_steps"]
    elif strategy == "epoch":
        done.note("eval_strategy", strategy, "train.eval_every counts steps; it stays 0, at the end only")
    for key in ("val_size", "val_set_size"):
        if given.get(key):
            done.note(key, given[key], "rows to evaluate on are in a file of their own, data.eval")
    return _following(given, done) | {"eval_strategy", "evaluation_strategy", "eval_steps", "val_size", "val_set_size"}


def _following(given: dict, done: Translation) -> set[str]:
    """Translates which checkpoint is the best, and when to stop; both need rows to evaluate on."""
    patience = next((key for key in PATIENCE if given.get(key)), None)
    metric = f"eval_{str(given.get('metric_for_best_model', 'loss')).removeprefix('eval_')}"
    wanted = patience or ("load_best_model_at_end" if given.get("load_best_model_at_end") else None)
    if wanted and "data.eval" not in done.values:
        done.note(wanted, given[wanted], "goes by evaluations, which need rows in data.eval")
    elif patience and not done.values.get("train.eval_every"):
        done.note(patience, given[patience], "goes by evaluations between steps, which need train.eval_every")
    elif wanted and metric not in EVALUATED[done.command]:
        done.note("metric_for_best_model", metric, "no metric of evaluations here; see checkpoint.best")
    elif wanted:
        done.values |= {"train.stop_after_worse": given[patience]} if patience else {}
        done.values |= {"checkpoint.best": metric} if given.get("load_best_model_at_end") else {}
    return {"load_best_model_at_end", "metric_for_best_model", *PATIENCE}


def _saving(given: dict, done: Translation) -> set[str]:
    strategy = given.get("save_strategy", "steps")
    if strategy == "steps" and isinstance(given.get("save_steps"), int):
        done.values["checkpoint.every"] = given["save_steps"]
    elif strategy == "epoch":
        done.note("save_strategy", strategy, "checkpoint.every counts steps; it stays 0, at the end only")
    if isinstance(resume := given.get("resume_from_checkpoint"), str):
        done.values["checkpoint.resume"] = resume
    return {"save_strategy", "save_steps", "resume_from_checkpoint"}


def _hub(given: dict, done: Translation) -> set[str]:
    if given.get("push_to_hub", done.peer == "Axolotl") and given.get("hub_model_id"):
        done.values["hub.push"] = given["hub_model_id"]
        if "hub_private_repo" in given:
            done.values["hub.private"] = given["hub_private_repo"]
    return {"push_to_hub", "hub_model_id", "hub_private_repo"}


def _trackers(given: dict, done: Translation) -> set[str]:
    told = given.get("report_to", "wandb" if given.get("wandb_project") else None)
    if told not in (None, "all"):
        names = [told] if isinstance(told, str) else list(told)
        done.values["tracking.to"] = [name for name in names if name not in OFF]
    elif told == "all":
        done.note("report_to", told, "tracking.to names them one by one")
    return {"report_to"}


def _loss(given: dict, done: Translation) -> set[str]:
    told = given.get("loss_type", given.get("pref_loss"))
    if told is not None and done.command == "train":
        names = [LOSSES.get(name, name) for name in (told if isinstance(told, list) else [told])]
        unknown = [name for name in names if name not in get_args(LossName)]
        if unknown:
            done.note("loss_type", unknown, "not here; loss.name stays dpo")
        else:
            done.values["loss.name"] = names[0] if len(names) == 1 else names
    if given.get("sync_ref_model"):
        done.values["reference.update_every"] = given.get("ref_model_sync_steps", 512)
        done.values["reference.update_alpha"] = given.get("ref_model_mixup_alpha", 0.6)
    if given.get("precompute_ref_log_probs"):
        done.note("precompute_ref_log_probs", True, "first dpo-ds precompute, then reference.kind cached")
    taken = {"loss_type", "pref_loss", "sync_ref_model", "ref_model_sync_steps", "ref_model_mixup_alpha"}
    return taken | {"precompute_ref_log_probs"}


def _rest(given: dict, done: Translation) -> set[str]:
    taken = {key for key in ("gradient_checkpointing", "activation_checkpointing") if key in given}
    if given.get("activation_offloading"):
        done.values["train.activation_memory"] = "offload"
    elif any(given[key] for key in taken):
        done.values["train.activation_memory"] = "checkpoint"
    if isinstance(given.get("deepspeed"), dict):
        done.note("deepspeed", given["deepspeed"], "write it into a file and name that")
        taken.add("deepspeed")
    return taken | {"activation_offloading"}


def _copy(key: str, value: Any, done: Translation) -> None:
    """Copies what has the same meaning, and lists all else with what it is here."""
    answer = answer_to(key)
    if answer is None:
        done.note(key, value, "not known here")
    elif answer.key and not answer.remark:
        done.values[answer.key] = value
    elif value not in OFF:
        done.note(key, value, str(answer))
