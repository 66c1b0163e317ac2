"""Makes one model of a LoRA adapter's folder, as peft and TRL write it, and of its base: an adapter is named
wherever a model can be. The merged weights are kept under DPO_DS_CACHE, made once on a machine.
"""

from __future__ import annotations

import hashlib
import json
import os
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from dpo_ds.cluster.derived import cache_root, content_digest, derive
from dpo_ds.cluster.foreign import SHOWN_BY, refusing
from dpo_ds.cluster.launch import from_environment
from dpo_ds.cluster.records import Damaged, read_object
from dpo_ds.config import LoraSection, ModelSection
from dpo_ds.errors import ModelError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")

_folders: dict[str, str] = {}  # of this process: an adapter's path -> where its whole model lies


def folder_of(path: str) -> str:
    """Returns the folder to read a model's files from: the merged one for an adapter that `make_whole` has seen, else
    `path` itself.
    """
    return _folders.get(path, path)


def is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def make_whole(section: ModelSection, path: str, key: str) -> None:
    """Merges the adapter in the folder `path` with its base, once on a machine; `folder_of` then tells where.

    The first rank of each node merges, on the CPU and in the base's own type, the others wait for it. With
    model.from_config there is nothing to merge: the base gives the shapes.

    Raises:
        ModelError: no weights, a base that is not there, another kind of model, adapters that are to be trained on top,
            or peft is missing or refuses.
    """
    adapter = Path(path)
    base = _base(adapter, path, key)
    if key == "model.path" and getattr(section, "lora", LoraSection()).r:
        remedy = "save what peft's merge_and_unload() gives and name that folder"
        raise ModelError(f"--{key} {path}: a LoRA adapter; no folder would hold the base of model.lora.r's; {remedy}")
    if section.from_config:
        _folders[path] = base
        return
    weights = next((adapter / name for name in ADAPTER_WEIGHTS if (adapter / name).is_file()), None)
    if weights is None:
        raise ModelError(f"--{key} {path}: a LoRA adapter without its weights ({ADAPTER_WEIGHTS[0]})")
    if find_spec("peft") is None:
        raise ModelError(f"--{key} {path}: a LoRA adapter, which needs peft: pip install 'dpo-ds[lora]'")
    identity = [version("peft"), version("transformers"), _base_identity(section, base)]
    identity += [content_digest(file) for file in sorted(file for file in adapter.iterdir() if file.is_file())]
    folder = cache_root() / "merged" / hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]

    def fill(work: Path) -> None:
        print(f"dpo-ds: {path}: an adapter of {base}; merged into {folder}", flush=True)
        with refusing(lambda what: ModelError(f"--{key} {path}: cannot be merged with {base}: {what}{SHOWN_BY}")):
            _merge(section, base, adapter, work)

    derive(folder, f"{path} merged with {base}", fill, from_environment().is_first_on_node)
    _folders[path] = str(folder)


def _base(adapter: Path, path: str, key: str) -> str:
    """Returns the adapter's base: a folder that is there, or a Hub id."""
    try:
        described = read_object(adapter / ADAPTER_CONFIG)
    except Damaged as problem:
        raise ModelError(f"--{key} {path}/{ADAPTER_CONFIG}: {problem}") from None
    base, task = described.get("base_model_name_or_path"), described.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        raise ModelError(f"--{key} {path}: an adapter of task_type {task!r}; only CAUSAL_LM is a language model's")
    if not isinstance(base, str) or not base:
        problem = "a LoRA adapter that names no base_model_name_or_path to merge it with"
        raise ModelError(f"--{key} {path}/{ADAPTER_CONFIG}: {problem}")
    if (base.startswith((".", "/", "~")) or base.count("/") > 1) and not (Path(base) / "config.json").is_file():
        problem = f"its base {base} is not there; set base_model_name_or_path in {ADAPTER_CONFIG} to where it is now"
        raise ModelError(f"--{key} {path}: {problem}")
    return base


def _base_identity(section: ModelSection, base: str) -> list[str]:
    """Returns what changes with the base's content: digests of a folder's files, a Hub id's commit."""
    if Path(base).is_dir():
        files = sorted(file for file in Path(base).iterdir() if file.is_file())
        return [f"{file.name} {content_digest(file)}" for file in files]
    config = AutoConfig.from_pretrained(base, trust_remote_code=section.trust_remote_code)
    return [f"{base}@{getattr(config, '_commit_hash', None)}"]


def _merge(section: ModelSection, base: str, adapter: Path, work: Path) -> None:
    """Writes the merged model with its tokenizer, the adapter's own where it brings one, into the folder `work`."""
    from peft import PeftModel

    options = {"trust_remote_code": section.trust_remote_code}
    has_tokenizer = any((adapter / name).is_file() for name in TOKENIZER_FILES)
    tokenizer = AutoTokenizer.from_pretrained(str(adapter) if has_tokenizer else base, **options)
    causal_lm = AutoModelForCausalLM.from_pretrained(base, dtype="auto", **options)
    rows = causal_lm.get_input_embeddings().num_embeddings
    if has_tokenizer and len(tokenizer) > rows:  # tokens were added in training; the adapter holds their rows
        causal_lm.resize_token_embeddings(len(tokenizer))
    with torch.no_grad():
        merged = PeftModel.from_pretrained(causal_lm, str(adapter)).merge_and_unload()
    merged.save_pretrained(work)
    tokenizer.save_pretrained(work)
    umask = os.umask(0)
    os.umask(umask)
    for file in work.iterdir():  # safetensors makes its files the owner's alone
        file.chmod(0o666 & ~umask)
