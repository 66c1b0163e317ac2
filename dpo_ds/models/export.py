"""From a sharded policy to a Hugging Face folder."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from transformers.core_model_loading import revert_weight_conversion
from transformers.dynamic_module_utils import custom_object_save

from dpo_ds import __version__
from dpo_ds.cluster import collectives
from dpo_ds.cluster.shared_files import leftovers, temporary_beside
from dpo_ds.models import lora
from dpo_ds.models.loading import own_dropout, save_tensors

SHARD_BYTES = 5 * 10**9
SCORING = """
A text is prompt, completion and EOS; it is scored at its last token, so pad on the right. The reward has mean zero over
the calibration data:

    model = AutoModelForSequenceClassification.from_pretrained(FOLDER)
    ids = tokenizer([prompt + completion + tokenizer.eos_token], padding=True, return_tensors="pt")
    reward = model(**ids).logits[:, 0] - model.config.reward_mean
"""


def gathered_state_dict(causal_lm) -> dict[str, torch.Tensor]:
    """Every parameter and persistent buffer on rank 0's CPU, gathered one by one; {} elsewhere. All ranks enter.

    Tied parameters stay one tensor under two names.
    """
    import deepspeed

    is_first, state, seen = collectives.rank() == 0, {}, {}
    for name, parameter in causal_lm.named_parameters(remove_duplicate=False):
        with deepspeed.zero.GatheredParameters([parameter]):
            if is_first:
                if id(parameter) not in seen:
                    seen[id(parameter)] = parameter.detach().cpu().clone()
                state[name] = seen[id(parameter)]
    if is_first:
        parameters = dict(causal_lm.named_parameters(remove_duplicate=False))
        state |= {name: value.cpu() for name, value in causal_lm.state_dict().items() if name not in parameters}
    return state


def export(
    causal_lm, tokenizer, folder: Path, card: str, merge: bool = False, progress: Callable[[], None] = lambda: None
) -> None:
    """`folder` becomes a Hugging Face model, gathered parameter by parameter, one output shard in memory at a time.

    It appears in one move, whole. All ranks enter. A model with adapters gives those alone, as peft saves them, or,
    with `merge`, its own weights with theirs added. progress(): told on every rank at each parameter.
    """
    import deepspeed

    is_first = collectives.rank() == 0
    held = tensors = dict(causal_lm.named_parameters()) | persistent_buffers(causal_lm)

    def read(name: str) -> torch.Tensor | None:
        progress()
        with deepspeed.zero.GatheredParameters([held[name]] if hasattr(held[name], "ds_id") else []):
            return held[name].detach().cpu().clone() if is_first else None

    temporary = temporary_beside(folder)
    if is_first:
        for left in leftovers(folder.parent, re.escape(folder.name)):
            shutil.rmtree(left)
        temporary.mkdir(parents=True)
    adapters_alone = lora.is_adapted(causal_lm) and not merge
    if adapters_alone:
        lora.write_adapters(temporary, causal_lm, read)
        if is_first:
            write_words(temporary, tokenizer, card)
    else:
        if lora.is_adapted(causal_lm):
            merging = lora.Merging(causal_lm)
            tensors = {name: held[own] for name, own in merging.names.items()}
            read = merging.reader(read)
        sizes = {name: getattr(t, "ds_numel", t.numel()) * t.element_size() for name, t in tensors.items()}
        write_shards(temporary, sizes, read, causal_lm)
    if is_first and not adapters_alone:
        with own_dropout(causal_lm):
            write_rest(temporary, causal_lm, causal_lm.dtype, tokenizer, card)
    if is_first:
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    collectives.barrier()


def persistent_buffers(causal_lm) -> dict[str, torch.Tensor]:
    parameters = dict(causal_lm.named_parameters(remove_duplicate=False))
    return {name: value for name, value in causal_lm.state_dict().items() if name not in parameters}


def write_shards(
    folder: Path, sizes: dict[str, int], read: Callable[[str], torch.Tensor | None], causal_lm, limit: int = SHARD_BYTES
) -> None:
    """The tensors named in `sizes` (name -> bytes) as safetensors files of at most `limit` bytes, and their index.

    `read` gives a tensor by name, or None to a rank that only helps to gather. One above the limit is a file alone.
    """
    plan: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if size > room or not plan:
            plan.append([])
            room = limit
        plan[-1].append(name)
        room -= size
    weight_map = {}
    for number, names in enumerate(plan, 1):
        file = "model.safetensors" if len(plan) == 1 else f"model-{number:05d}-of-{len(plan):05d}.safetensors"
        weight_map |= dict.fromkeys(_write_shard(folder / file, names, read, causal_lm), file)
    if len(plan) > 1 and weight_map:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _write_shard(path: Path, names: list[str], read: Callable[[str], torch.Tensor | None], causal_lm) -> list[str]:
    """One file; the names in it, none on a rank that only helps to gather. Nothing of it stays in memory."""
    shard: dict[str, torch.Tensor] = {}
    for name in names:
        tensor = read(name)
        if tensor is not None:
            # Experts are fused when a model is loaded; on disk each has a name of its own.
            shard |= revert_weight_conversion(causal_lm, {name: tensor})
    if shard:
        save_tensors(shard, path)
    return list(shard)


def write_rest(folder: Path, causal_lm, dtype: torch.dtype, tokenizer, card: str) -> None:
    """Everything of a Hugging Face model but its weights: config, generation config, remote code, tokenizer, card."""
    config = causal_lm.config
    config.dtype, config.architectures = dtype, [type(causal_lm).__name__]
    if causal_lm.is_remote_code():
        custom_object_save(causal_lm, folder, config=config)
    config.save_pretrained(folder)
    if causal_lm.can_generate():
        causal_lm.generation_config.save_pretrained(folder)
    write_words(folder, tokenizer, card)


def write_words(folder: Path, tokenizer, card: str) -> None:
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")


def model_card(command: str, run: dict, metrics: dict, versions: dict) -> str:
    """README.md of final/: what it was made from and how, in the form that the Hub reads."""
    loss = run.get("loss", {"name": command} | run.get("reward", {}))
    rows = "\n".join(f"| {name} | {value:.6g} |" for name, value in metrics.items())
    used = ", ".join(f"{name} {version}" for name, version in versions.items())
    titles = {"sft": "Supervised fine-tuning", "reward": "Reward model"}
    title = titles.get(command, f"Preference optimisation ({loss['name']})")
    adapters_alone = run["model"]["lora"]["r"] and command != "reward"
    names = loss["name"] if isinstance(loss["name"], list) else [loss["name"]]
    front = {"library_name": "peft" if adapters_alone else "transformers", "base_model": run["model"]["path"]}
    return f"""---
{yaml.safe_dump(front | {"tags": ["dpo_ds", *names]}, sort_keys=False, allow_unicode=True)}---
# {title} of {run["model"]["path"]}

Trained by dpo_ds {__version__} on {run["data"]["train"]}.
{SCORING if command == "reward" else ""}
| last metric | value |
| --- | --- |
{rows}

Loss: {loss}. Learning rate {run["train"]["learning_rate"]}, {run["train"]["schedule"]}; global batch
{run["train"]["global_batch_size"]}; seed {run["train"]["seed"]}.

Versions: {used}.
"""
