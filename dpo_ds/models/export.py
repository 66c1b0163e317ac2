"""From a sharded policy to a Hugging Face folder."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import yaml
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors import safe_open
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import cached_file

from dpo_ds import __version__
from dpo_ds.cluster import collectives
from dpo_ds.cluster.shared_files import leftovers, temporary_beside
from dpo_ds.errors import ModelError
from dpo_ds.models import lora
from dpo_ds.models.adapters import folder_of
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

    Raises:
        ModelError: what was written, read once more, is not the whole model.
    """
    path, shapes = causal_lm.config._name_or_path, {}
    on_disk = headers(folder_of(path)) if path else {}
    source = names_of(causal_lm, sizes, on_disk)
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
        weight_map |= dict.fromkeys(_write_shard(folder / file, names, read, causal_lm, source, shapes), file)
    if weight_map:
        check_written(folder, causal_lm, shapes)
    if len(plan) > 1 and weight_map:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _write_shard(
    path: Path, names: list[str], read: Callable[[str], torch.Tensor | None], causal_lm, source: dict[str, list[str]],
    shapes: dict[str, tuple[int, ...]],
) -> list[str]:  # fmt: skip
    """One file; the names in it, none on a rank that only helps to gather. Nothing of it stays in memory but, by the
    model's own names, the `shapes`.
    """
    shard: dict[str, torch.Tensor] = {}
    for name in names:
        tensor = read(name)
        if tensor is not None:
            shapes[name] = tuple(tensor.shape)
            # Experts are fused when a model is loaded; on disk each has a name of its own.
            parts = revert_weight_conversion(causal_lm, {name: tensor})
            theirs = sorted(source.get(name, ()), key=dot_natural_key)
            if len(theirs) == len(parts):
                parts = dict(zip(theirs, (parts[own] for own in sorted(parts, key=dot_natural_key)), strict=True))
            shard |= parts
    if shard:
        save_tensors(shard, path)
    return list(shard)


def headers(path: str) -> dict[str, tuple[int, ...]]:
    """Returns name -> shape of the tensors in a model's safetensors files, a folder's or a Hub id's in the cache; none
    where there are no such files.
    """
    folder = Path(path)
    if not folder.is_dir():
        config = cached_file(path, "config.json", local_files_only=True, _raise_exceptions_for_missing_entries=False)
        folder = Path(config).parent if config else folder
    found: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}
    return found


def names_of(causal_lm, own: Iterable[str], on_disk: Iterable[str]) -> dict[str, list[str]]:
    """Returns for each of the model's own names those that it has on disk, as transformers reads them: one, or those of
    experts that it fuses. final/ gets the names of the folder that the model came from.
    """
    conversions = get_model_conversion_mapping(causal_lm)
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    known, found = dict.fromkeys(own, True), {}
    for name in on_disk:
        target, _ = rename_source_key(name, renamings, converters, causal_lm.base_model_prefix, known)
        found.setdefault(target, []).append(name)
    return found


def check_written(folder: Path, causal_lm, shapes: dict[str, tuple[int, ...]]) -> None:
    """Reads the headers of what was written once more.

    Raises:
        ModelError: transformers would not find every weight of the model there, or find one of another shape.
    """
    written = headers(str(folder))
    found = names_of(causal_lm, shapes, written)
    for name, shape in shapes.items():
        files = found.get(name, [])
        if not files:
            kept = "the run's checkpoint is whole"
            raise ModelError(f"{folder}: lacks {name}, which {type(causal_lm).__name__} has; {kept}")
        if len(files) == 1 and math.prod(written[files[0]]) != math.prod(shape):
            raise ModelError(f"{folder}: {files[0]} has the shape {written[files[0]]}, not {shape}")


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


def is_on_hub(path: str) -> bool:
    """Tells a name on the Hub from a folder: the Hub refuses a card whose base_model is no such name."""
    try:
        validate_repo_id(path)
    except HFValidationError:
        return False
    return not Path(path).exists()


def model_card(command: str, run: dict, metrics: dict, versions: dict) -> str:
    """README.md of final/: what it was made from and how, in the form that the Hub reads."""
    loss = run.get("loss", {"name": command} | run.get("reward", {}))
    source = run["data"].get("train")
    if command == "rl":
        loss, source = {"name": run["rl"]["algorithm"]} | run["rl"], run["rl"]["prompts"]
    rows = "\n".join(f"| {name} | {value:.6g} |" for name, value in metrics.items())
    used = ", ".join(f"{name} {version}" for name, version in versions.items())
    rl = f"Reinforcement learning ({loss['name']})"
    titles = {"sft": "Supervised fine-tuning", "reward": "Reward model", "rl": rl}
    title = titles.get(command, f"Preference optimisation ({loss['name']})")
    adapters_alone = run["model"]["lora"]["r"] and command != "reward"
    names = loss["name"] if isinstance(loss["name"], list) else [loss["name"]]
    packed = run["model"].get("quantize") is not None  # configs of before have no such key
    trained_on = "\nAdapters were trained on that model's weights in 4 bits (NF4, bitsandbytes).\n" if packed else ""
    front = {"library_name": "peft" if adapters_alone else "transformers"}
    if is_on_hub(run["model"]["path"]):
        front["base_model"] = run["model"]["path"]
    return f"""---
{yaml.safe_dump(front | {"tags": ["dpo_ds", *names]}, sort_keys=False, allow_unicode=True)}---
# {title} of {run["model"]["path"]}

Trained by dpo_ds {__version__} on {source}.
{trained_on}{SCORING if command == "reward" else ""}
| last metric | value |
| --- | --- |
{rows}

Loss: {loss}. Learning rate {run["train"]["learning_rate"]}, {run["train"]["schedule"]}; global batch
{run["train"]["global_batch_size"]}; seed {run["train"]["seed"]}.

Versions: {used}.
"""
