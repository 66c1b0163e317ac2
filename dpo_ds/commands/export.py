"""`dpo-ds export CHECKPOINT --to DIR`: a sharded checkpoint as a Hugging Face model, by one process without a GPU."""

from __future__ import annotations

import contextlib
import math
import re
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GenerationConfig

from dpo_ds.checkpoint.manifest import MANIFEST, Checkpoint, open_folder
from dpo_ds.checkpoint.resume import find
from dpo_ds.checkpoint.shards import ENGINE_PREFIX, Shards
from dpo_ds.cluster.foreign import SHOWN_BY, refusing
from dpo_ds.cluster.process_group import quiet_libraries
from dpo_ds.cluster.shared_files import leftovers, temporary_beside
from dpo_ds.config import ExportConfig, ModelSection
from dpo_ds.data.chat.template import BUILT_IN, DEFAULT_CHAT_TEMPLATE, TEMPLATE, set_template
from dpo_ds.errors import ConfigError, ModelError, shorten
from dpo_ds.models import lora
from dpo_ds.models.adapters import folder_of
from dpo_ds.models.causal_lm import freeze_beside_text
from dpo_ds.models.export import SHARD_BYTES, model_card, persistent_buffers, write_rest, write_shards, write_words
from dpo_ds.models.fingerprint import MODEL, model_as_recorded
from dpo_ds.models.layers import quantized
from dpo_ds.models.loading import check_model, load_tokenizer
from dpo_ds.models.reward_model import REWARD_MEAN, settle_padding
from dpo_ds.training import hub
from dpo_ds.training.output_dir import read_metrics

COMMAND_OF = {"rl": "rl", "loss": "train", "reward": "reward"}  # a section of the run's config -> who has it; else sft
TOLD = ("loss", "score", "kl", "entropy", "completion_tokens", "unfinished")  # in the model card, beside grouped ones
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def start(run: ExportConfig, shard_bytes: int = SHARD_BYTES) -> int:
    """Runs the command; its exit code.

    Raises:
        UserError: no complete, undamaged checkpoint; its model's config or tokenizer is gone; DIR exists.
    """
    quiet_libraries()
    checkpoint, target = _find(Path(run.source)), Path(run.to)
    if target.exists():
        raise ConfigError(f"--to {target}: exists already; choose a new folder")
    if run.push:
        hub.check_token(run.push, "push")
    if damaged := checkpoint.damage():
        raise ConfigError(f"{checkpoint.path}: {', '.join(damaged)} differs from what was written (SHA-256)")
    section = _section(checkpoint, run)
    config = check_model(section, section.path, classifier=True)
    tokenizer = load_tokenizer(section, config, section.path)
    _set_template(tokenizer, checkpoint)
    is_reward = "reward" in checkpoint.manifest["config"]
    if is_reward:
        config.update({"num_labels": 1, REWARD_MEAN: 0.0})
    with torch.device("meta"):
        auto_class = AutoModelForSequenceClassification if is_reward else AutoModelForCausalLM
        with refusing(lambda what: ModelError(f"{section.path}: cannot be loaded: {what}{SHOWN_BY}")):
            causal_lm = auto_class.from_config(config, trust_remote_code=section.trust_remote_code)
    if is_reward:
        unnormalised = f"{REWARD_MEAN} is 0: the mean over calibration data is taken where a run ends, for final/"
        for note in filter(None, [unnormalised, settle_padding(causal_lm, tokenizer)]):
            print(f"dpo-ds: {note}", flush=True)
    merge = run.merge or (is_reward and section.lora.r > 0)  # adapters alone would lack the head
    if (Path(folder_of(section.path)) / "generation_config.json").is_file():
        causal_lm.generation_config = GenerationConfig.from_pretrained(folder_of(section.path))
    if merge:
        _check_mergeable(checkpoint, section, config)
    shards = Shards(checkpoint)
    precision = checkpoint.manifest["identity"]["the precision"] if run.dtype == "auto" else run.dtype
    for left in leftovers(target.parent, re.escape(target.name)) if target.parent.is_dir() else ():
        shutil.rmtree(left)
    for note in hub.prepare(run.push, run.private, "push") if run.push else ():
        print(f"dpo-ds: {note}", flush=True)
    temporary = temporary_beside(target)
    temporary.mkdir(parents=True)
    if merge:
        write_merged(temporary, shards, causal_lm, section, DTYPES[precision], shard_bytes)
        write_rest(temporary, causal_lm, DTYPES[precision], tokenizer, _card(checkpoint))
    elif section.lora.r:
        with torch.device("meta"):
            lora.add_adapters(causal_lm, section.lora, seed=0)  # for their names alone
        lora.write_adapters(
            temporary, causal_lm, lambda name: shards.whole(f"{ENGINE_PREFIX}{name}", DTYPES[precision])
        )
        write_words(temporary, tokenizer, _card(checkpoint))
    else:
        write_weights(temporary, shards, causal_lm, section, DTYPES[precision], shard_bytes)
        write_rest(temporary, causal_lm, DTYPES[precision], tokenizer, _card(checkpoint))
    temporary.rename(target)
    print(f"dpo-ds: step {checkpoint.step} of {checkpoint.path} is now {target} ({precision})", flush=True)
    return 0 if run.push is None else _push(target, run)


def _push(folder: Path, run: ExportConfig) -> int:
    """Returns the exit code: 1 where the Hub does not take the folder, which a line says."""
    try:
        print(f"dpo-ds: pushed to {hub.push(folder, run.push, run.private)}", flush=True)
    except Exception as error:
        failure = hub.failure(folder, run.push, run.private, hub.words_of(error))
        print(f"dpo-ds: error: {failure}", file=sys.stderr, flush=True)
        return 1
    return 0


def write_weights(
    folder: Path, shards: Shards, causal_lm, section: ModelSection, dtype: torch.dtype, shard_bytes: int
) -> None:
    """The checkpoint's weights in `dtype`, rounded from fp32; buffers as they are. `causal_lm` gives names alone."""
    kept = freeze_beside_text(causal_lm)
    names = {name: f"{ENGINE_PREFIX}{name}" for name, _ in causal_lm.named_parameters()}
    missing = sorted(name for name, saved in names.items() if saved not in shards.slices)
    if missing and kept:
        return write_merged(folder, shards, causal_lm, section, dtype, shard_bytes)
    if missing:
        raise ConfigError(f"{shards.checkpoint.path}: holds no {missing[0]}, which {type(causal_lm).__name__} has")
    buffers = {name: shards.buffer(f"{ENGINE_PREFIX}{name}") for name in persistent_buffers(causal_lm)}
    sizes = {name: math.prod(shards.slices[saved].shape) * dtype.itemsize for name, saved in names.items()}
    sizes |= {name: buffer.nbytes for name, buffer in buffers.items()}

    def read(name: str) -> torch.Tensor:
        return buffers[name] if name in buffers else shards.whole(names[name], dtype)

    write_shards(folder, sizes, read, causal_lm, shard_bytes)


def write_merged(
    folder: Path, shards: Shards, causal_lm, section: ModelSection, dtype: torch.dtype, shard_bytes: int
) -> None:
    """The model's own weights with what was trained in their place, or what adapters add to them, summed in fp32."""
    task = "SEQ_CLS" if isinstance(getattr(causal_lm, "score", None), torch.nn.Module) else "CAUSAL_LM"
    layers = {} if section.quantize is None else quantized.layers_to_quantize(causal_lm)
    if section.lora.r:
        with torch.device("meta"):
            lora.add_adapters(causal_lm, section.lora, seed=0, task=task)  # for their names alone
    computed_in = DTYPES[shards.checkpoint.manifest["identity"]["the precision"]]
    merging, trained = lora.Merging(causal_lm), {name.removeprefix(ENGINE_PREFIX) for name in shards.slices}
    names = {own: name for name, own in merging.names.items()}
    with contextlib.ExitStack() as files:
        source = _own_weights(Path(folder_of(section.path)), files)
        if any(name not in source for own, name in names.items() if own not in trained):
            source = _loaded(section)  # its files have other names than the model, as of experts one by one

        def read(own: str) -> torch.Tensor:
            if own in trained:
                return shards.whole(f"{ENGINE_PREFIX}{own}", torch.float32)
            weight, layer = source[names[own]](), layers.get(names[own].removesuffix(".weight"))
            return weight if layer is None else quantized.through_4_bits(weight.to(computed_in), layer)

        tensors, merged = causal_lm.state_dict(), merging.reader(read)
        sizes = {name: tensors[own].numel() * dtype.itemsize for own, name in names.items()}
        write_shards(folder, sizes, lambda name: merged(name).to(dtype), causal_lm, shard_bytes)


def _own_weights(folder: Path, files: contextlib.ExitStack) -> dict[str, Callable[[], torch.Tensor]]:
    """Name -> what reads it from its safetensors file."""
    opened = [files.enter_context(safe_open(path, "pt")) for path in sorted(folder.glob("*.safetensors"))]
    return {name: partial(file.get_tensor, name) for file in opened for name in file.keys()}


def _loaded(section: ModelSection) -> dict[str, Callable[[], torch.Tensor]]:
    """As `_own_weights`, of the whole model in this host's memory, under the names that it has there."""
    options = {"revision": section.revision, "trust_remote_code": section.trust_remote_code, "dtype": "auto"}
    with refusing(lambda what: ModelError(f"{section.path}: cannot be loaded: {what}{SHOWN_BY}")):
        model = AutoModelForCausalLM.from_pretrained(folder_of(section.path), **options)
    return {name: tensor.detach for name, tensor in model.state_dict().items()}


def _check_mergeable(checkpoint: Checkpoint, section: ModelSection, config) -> None:
    if not section.lora.r:
        raise ConfigError(
            f"--merge: {checkpoint.path} has no adapters, all its weights were trained; leave --merge out"
        )
    if section.quantize:
        quantized.require_bitsandbytes("--merge of adapters that were trained on quantised weights")
    then = checkpoint.manifest["identity"][MODEL]
    now = model_as_recorded(then, section.path, config)
    if now != then:
        raise ConfigError(f"--merge: {MODEL} is now {now}, in {checkpoint.path} it was {then}; put the same model back")


def _section(checkpoint: Checkpoint, run: ExportConfig) -> ModelSection:
    """Returns the run's model section, but for what the user of `export` must say: whether the model's code may run."""
    try:
        section = ModelSection.model_validate(checkpoint.manifest["config"].get("model"))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(["model", *map(str, first["loc"])])
        raise ConfigError(f"{checkpoint.path}/{MANIFEST}: config.{where}: {first['msg']}") from None
    if section.trust_remote_code and not run.trust_remote_code:
        print(f"dpo-ds: {section.path} was trained with its own code, which export runs with --trust_remote_code alone")
    return section.model_copy(update={"trust_remote_code": run.trust_remote_code})


def _set_template(tokenizer, checkpoint: Checkpoint) -> None:
    """Gives the tokenizer the chat template that the run used; its config holds the text, whatever became of the file.
    """
    given = checkpoint.manifest["config"].get("data", {}).get("chat_template")
    if checkpoint.manifest["identity"].get(TEMPLATE) == BUILT_IN:
        given = DEFAULT_CHAT_TEMPLATE
    if not isinstance(given, str | None):
        raise ConfigError(f"{checkpoint.path}/{MANIFEST}: config.data.chat_template: {shorten(given)} is no text")
    set_template(tokenizer, given)


def _find(path: Path) -> Checkpoint:
    """The checkpoint in `path`, or the newest complete one of the run whose output_dir it is."""
    if not (path / MANIFEST).is_file() and (path / "checkpoints").is_dir():
        complete, notes = find(path, "auto")
        for note in notes:
            print(f"dpo-ds: {note}", flush=True)
        if complete:
            return complete[0]
    checkpoint, problem = open_folder(path)
    if checkpoint is None:
        raise ConfigError(f"{path}: {problem}; name a folder checkpoints/step-... or an output_dir that has some")
    return checkpoint


def _card(checkpoint: Checkpoint) -> str:
    run = checkpoint.manifest["config"]
    log = checkpoint.path.parent.parent / "metrics.jsonl"
    line = next((metrics for metrics in read_metrics(log) if metrics["step"] == checkpoint.step), {})
    shown = {name: value for name, value in line.items() if name in TOLD or "/" in name}
    command = next((name for section, name in COMMAND_OF.items() if section in run), "sft")
    return model_card(command, run, shown, checkpoint.manifest["versions"])
