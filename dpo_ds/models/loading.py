"""Checks Hugging Face models and tokenizers before any weight is read, and loads them under ZeRO-3, dropout off."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
import socket
import sys
import traceback
from collections.abc import Collection, Iterator
from pathlib import Path
from types import MethodType
from urllib.parse import urlsplit
from urllib.request import getproxies

import huggingface_hub
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import cached_file

from dpo_ds.cluster import collectives
from dpo_ds.cluster.foreign import SHOWN_BY, refusing
from dpo_ds.cluster.records import Damaged, read_object
from dpo_ds.config import ModelSection, did_you_mean
from dpo_ds.errors import ConfigError, ModelError, UserError
from dpo_ds.models.adapters import folder_of, is_adapter, make_whole
from dpo_ds.models.layers import quantized

HUB_SECONDS = 5  # for a connection to the Hub
CLASSIFIER = "ForSequenceClassification"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def check_model(section: ModelSection, path: str, key: str = "model.path", classifier: bool = False):
    """The model's transformers config, after looking at what can be looked at without loading weights.

    Raises:
        ModelError: no such folder or Hub id, no readable config.json, not a causal language model, no weights; an
            adapter without its base, or one that is to have adapters of its own.
        ConfigError: a model.attn that transformers does not know.
    """
    known = ["auto", "eager", *ALL_ATTENTION_FUNCTIONS]
    if section.attn not in known and "/" not in section.attn:  # OWNER/NAME is a kernel on the Hub
        raise ConfigError(f"--model.attn {section.attn}: unknown to transformers; {did_you_mean(section.attn, known)}")
    folder = Path(path)
    if is_adapter(folder):
        make_whole(section, path, key)
    elif folder.is_dir():
        check_folder(folder, path, key, needs_weights=not section.from_config)
    elif folder.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1:
        what = "is a file" if folder.exists() else "does not exist"
        raise ModelError(f"--{key} {path}: {what}; expected a Hugging Face folder with config.json, or a Hub id")
    else:
        _check_hub(path, key)
    with refusing(lambda what: ModelError(f"--{key} {path}: no usable model config: {what}{SHOWN_BY}")):
        config = AutoConfig.from_pretrained(
            folder_of(path), revision=section.revision, trust_remote_code=section.trust_remote_code
        )
    remote = section.trust_remote_code and "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not remote:
        raise ModelError(f"--{key} {path}: model_type {config.model_type!r} is no causal language model")
    named = next(iter(config.architectures or []), "")
    if named.endswith(CLASSIFIER) and not classifier:
        raise ModelError(f"--{key} {path}: is a {named}, as dpo-ds reward makes them, and no language model")
    return config


def check_shape(section: ModelSection, path: str, key: str = "model.path", classifier: bool = False):
    """`check_model` for who needs the shapes alone: weights need not be there."""
    return check_model(section.model_copy(update={"from_config": True}), path, key, classifier)


def _check_hub(path: str, key: str) -> None:
    """Raises ModelError for a mistyped folder, at once: transformers would ask the Hub for it, half a minute long where
    there is no network.
    """
    if cached_file(path, "config.json", local_files_only=True, _raise_exceptions_for_missing_entries=False):
        return
    parent = Path(path).parent
    if parent != Path(".") and parent.is_dir():
        raise ModelError(f"--{key} {path}: does not exist, though the folder {parent} does; a Hub id is OWNER/NAME")
    url = urlsplit(huggingface_hub.constants.ENDPOINT)
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        why = "HF_HUB_OFFLINE is set"
    elif getproxies().get(url.scheme):
        return  # a proxy asks in our place
    else:
        try:
            socket.create_connection((url.hostname, url.port or 443), timeout=HUB_SECONDS).close()
            return
        except OSError as error:
            why = f"{url.hostname} cannot be reached: {error.strerror or error}"
    raise ModelError(f"--{key} {path}: no such folder, and the Hugging Face Hub cannot be asked ({why})")


def load_tokenizer(section: ModelSection, config, path: str, key: str = "model.path"):
    """The folder's tokenizer, which must have an end-of-sequence token and fit the model's vocabulary."""
    with refusing(lambda what: ModelError(f"--{key} {path}: no usable tokenizer: {what}{SHOWN_BY}")):
        tokenizer = AutoTokenizer.from_pretrained(
            folder_of(path), revision=section.revision, trust_remote_code=section.trust_remote_code
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"--{key} {path}: the tokenizer has no EOS token, so a completion could never end; "
            "set eos_token in its tokenizer_config.json"
        )
    if tokenizer.eos_token_id >= config.get_text_config().vocab_size:
        raise ModelError(
            f"--{key} {path}: the tokenizer's EOS is token {tokenizer.eos_token_id}, the model's vocab_size is "
            f"{config.get_text_config().vocab_size}; they do not belong together"
        )
    return tokenizer


def load_causal_lm(section: ModelSection, ds_config: dict) -> PreTrainedModel:
    return load_model(AutoModelForCausalLM, section, ds_config)


def load_model(
    auto_class, section: ModelSection, ds_config: dict, settings: dict | None = None, new: Collection[str] = ()
) -> PreTrainedModel:
    """The model with its parameters partitioned over the ranks as they are made (deepspeed.zero.Init), dropout off.

    All ranks enter. `ds_config` decides the dtype; section.attn "auto" leaves transformers its choice. settings: of the
    transformers config, beside the folder's own. new: weights that the folder may lack; transformers draws them.
    """
    from deepspeed.runtime.config import DeepSpeedConfig
    from transformers.integrations import HfDeepSpeedConfig

    with refusing(lambda what: ConfigError(f"DeepSpeed refuses deepspeed.config: {what}{SHOWN_BY}")):
        if "zero_optimization" in ds_config:
            DeepSpeedConfig(ds_config)  # read while weights are loaded, where a mistake would be called the model's
        zero_init = HfDeepSpeedConfig(ds_config)  # held weakly by transformers: without this name, nothing is sharded
    bf16 = ds_config["bf16"]["enabled"]
    options = {"trust_remote_code": section.trust_remote_code, "dtype": torch.bfloat16 if bf16 else torch.float32}
    if section.attn != "auto":
        options["attn_implementation"] = section.attn
    quantizes = getattr(section, "quantize", None) is not None  # then every rank first has the whole model, in 4 bits
    path = folder_of(section.path)

    def mistake(what: str) -> UserError:
        frames = traceback.extract_tb(sys.exc_info()[2])
        if any("/deepspeed/runtime/swap_tensor/" in frame.filename for frame in frames):
            swap = ds_config["zero_optimization"]["offload_param"]["nvme_path"]
            needs = "each node must be able to write there and to build DeepSpeed's async_io (libaio; ds_report tells)"
            return ConfigError(f"deepspeed.config: offload_param.nvme_path {swap}: {what}; {needs}{SHOWN_BY}")
        how = "weights of other shapes than its config.json says" if "mismatch" in what else "cannot be loaded"
        return ModelError(f"{path}: {how}: {what}{SHOWN_BY}")

    with refusing(mistake):
        config = AutoConfig.from_pretrained(
            path, revision=section.revision, trust_remote_code=section.trust_remote_code
        )
        config.update(settings or {})
        dropouts = switch_dropout_off(config)
        if section.from_config:
            torch.manual_seed(0)  # rank 0's draw is broadcast; seeded, so that policy and reference are the same model
            causal_lm = auto_class.from_config(config, **options)
        else:
            options |= {"quantization_config": quantized.settings(options["dtype"])} if quantizes else {}
            causal_lm, loading = auto_class.from_pretrained(
                path, config=config, revision=section.revision, output_loading_info=True, **options
            )
    if not section.from_config:
        check_complete(path, set(loading["missing_keys"]) - set(new))
        check_no_more(path, causal_lm, loading["unexpected_keys"])
        if loading["unexpected_keys"] and collectives.rank() == 0:
            print(f"dpo-ds: {_left_out(path, causal_lm, loading['unexpected_keys'])}", flush=True)
    del zero_init
    if type(causal_lm.config) not in auto_class._model_mapping and not causal_lm.is_remote_code():
        name = type(causal_lm).__name__
        raise ModelError(f"{path}: its text part, {name}, is nothing that transformers could open by itself again")
    causal_lm.dropouts = dropouts
    if quantizes and (lines := quantized.take_loaded(causal_lm)) and collectives.rank() == 0:
        print(*(f"dpo-ds: {line}" for line in lines), sep="\n", flush=True)
    switch_jitter_off(causal_lm)
    return causal_lm


def switch_dropout_off(config) -> dict[str, float]:
    """Sets every dropout rate of a transformers config, and of the configs in it, to 0; returns what they were, by
    their dotted names, for the export.
    """
    rates = {}
    for name, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            rates |= {f"{name}.{inner}": rate for inner, rate in switch_dropout_off(value).items()}
        elif isinstance(value, float) and value > 0 and "drop" in name:
            rates[name] = value
            setattr(config, name, 0.0)
    return rates


def switch_jitter_off(model: nn.Module) -> None:
    """Keeps modules that jitter while they train, the routers of mixtures of experts, in evaluation mode for good.
    Their rates stay: Phi's routers use theirs in evaluation, too.
    """
    for module in model.modules():
        if any("jitter" in name and isinstance(value, float) and value for name, value in vars(module).items()):
            module.train = MethodType(_stay_in_evaluation, module)
            module.eval()


def _stay_in_evaluation(module: nn.Module, mode: bool = True) -> nn.Module:
    return nn.Module.train(module, False)


@contextlib.contextmanager
def own_dropout(causal_lm: PreTrainedModel) -> Iterator[None]:
    """A time in which the model's config says what it came with: for the config that is saved."""
    for name, rate in causal_lm.dropouts.items():
        _set(causal_lm.config, name, rate)
    yield
    for name in causal_lm.dropouts:
        _set(causal_lm.config, name, 0.0)


def _set(config, dotted: str, rate: float) -> None:
    *outer, name = dotted.split(".")
    setattr(functools.reduce(getattr, outer, config), name, rate)


def has_table_of_positions(text_config) -> bool:
    """Tells whether a model looks positions up in a table, as GPT-1 and 2 and OPT do, which ends at
    max_position_embeddings or a few places behind; others compute them for any length. Built without weights.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(text_config)
    except Exception:  # a model of the folder's own code, or one that is no language model by itself
        return False
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    beside_words = [table for table in tables if table is not model.get_input_embeddings()]
    return any(0 <= table.num_embeddings - text_config.max_position_embeddings <= 8 for table in beside_words)


def check_folder(folder: Path, path: str, key: str, needs_weights: bool = True) -> None:
    """ModelError: no readable config.json, no weights, or some that are missing or cut short."""
    if not (folder / "config.json").is_file():
        problem = "no config.json in this folder, so it is no Hugging Face model"
        raise ModelError(f"--{key} {path}: {problem}{_remedy(folder)}")
    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"--{key} {path}/config.json: not JSON ({error})") from None
    if (folder / "generation_config.json").exists():
        try:  # transformers passes over one that it cannot read, and with it the tokens that end an answer
            read_object(folder / "generation_config.json")
        except Damaged as problem:
            raise ModelError(f"--{key} {path}/generation_config.json: {problem}; mend it or delete it") from None
    if needs_weights and not any((folder / name).is_file() for name in WEIGHTS):
        remedy = "; --model.from_config true starts at random" if key == "model.path" else ""
        raise ModelError(f"--{key} {path}: no weights ({WEIGHTS[0]} or its index){remedy}")
    if needs_weights:
        _check_weights(folder, path, key)


def _remedy(folder: Path) -> str:
    """For folders of ours and of peft that lead to a model."""
    if (folder / "final" / "config.json").is_file():
        return f"; it is a run's output_dir, whose model is {folder / 'final'}"
    if (folder / "adapter_config.json").is_file():
        run = folder.parent if folder.name == "final" else "OUTPUT_DIR"
        return f" but a LoRA adapter; make a whole one of both: dpo-ds export {run} --merge true --to DIR"
    if (folder / "checkpoints").is_dir() or (folder / "MANIFEST.json").is_file():
        return f"; it holds sharded checkpoints; make a model of one: dpo-ds export {folder} --to DIR"
    return ""


def _check_weights(folder: Path, path: str, key: str) -> None:
    """The headers of the safetensors files, which tell a file that was cut short; shards that the index names."""
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.is_file():
        with refusing(lambda what: ModelError(f"--{key} {path}: {index.name} is no index of weights: {what}")):
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    for file in sorted(folder / name for name in names if index.is_file() or (folder / name).is_file()):
        try:
            with safe_open(file, framework="pt"):
                pass
        except FileNotFoundError:
            raise ModelError(f"--{key} {path}: {file.name} is missing, {index.name} names it") from None
        except SafetensorError as error:
            raise ModelError(f"--{key} {path}: {file.name} is broken or cut short ({error}); copy it again") from None


def _left_out(path: str, model: nn.Module, names: Collection[str]) -> str:
    parts = sorted({name.rpartition(".layers.")[0] or name.rpartition(".")[0] for name in names})
    shown = ", ".join(parts[:4]) + (f" and {len(parts) - 4} more" if len(parts) > 4 else "")
    return f"{path}: {len(names)} weights are left out, as {type(model).__name__} has no {shown}; final/ lacks them"


def check_complete(path: str, missing: set[str]) -> None:
    """transformers draws weights that it does not find at random, with a warning at most: here that is an error."""
    if missing:
        first = ", ".join(sorted(missing)[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise ModelError(f"{path}: lacks the weights {first}, so it is no whole model of its config.json")


def check_no_more(path: str, model: nn.Module, unexpected: Collection[str]) -> None:
    """Raises ModelError for weights of layers beyond the config's number: half of the model would be trained."""
    lists = {f".{name}": len(m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    for name in sorted(unexpected):
        for found in re.finditer(r"\.(\d+)\.", name):
            layers = f".{name[: found.start()]}"  # a base model's file may leave out the outermost names
            count = next((length for own, length in lists.items() if own.endswith(layers)), math.inf)
            if int(found[1]) >= count:
                raise ModelError(
                    f"{path}: holds {name}, but config.json says {count} {layers[1:]}; they do not belong together"
                )


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Writes a safetensors file that whoever the umask lets may read; safetensors itself makes it the owner's alone."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)
