"""LoRA (Hu et al. 2021, arXiv 2106.09685) by peft: low-rank adapters train, the model's own weights are frozen."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpo_ds.config import LoraSection
from dpo_ds.errors import ConfigError
from dpo_ds.models.loading import save_tensors

ADAPTER = "default"  # peft's name for the only one
WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."  # what peft puts before transformers' names


def check_lora(section: LoraSection, width: int) -> None:
    """Checks that adapters which are asked for can be had by a model of this hidden width.

    Raises:
        ConfigError: peft is not installed, or a rank that no layer's adapter can have.
    """
    if section.r > width:
        raise ConfigError(f"--model.lora.r {section.r} is beyond the model's width of {width}: that is no low rank")
    if section.r and find_spec("peft") is None:
        raise ConfigError(f"--model.lora.r {section.r} needs peft: pip install 'dpo-ds[lora]'")


def add_adapters(causal_lm: PreTrainedModel, section: LoraSection, seed: int, task: str = "CAUSAL_LM") -> None:
    """Freezes the model and gives its linear layers adapters, equal on all ranks and without effect yet (B = 0).

    Works on a model whose own weights are partitioned: DeepSpeed partitions the adapters when it takes the model.

    Raises:
        ConfigError: model.lora.target_modules names no layer that can have one.
    """
    from peft import LoraConfig

    config = LoraConfig(
        r=section.r,
        lora_alpha=2 * section.r if section.alpha is None else section.alpha,
        lora_dropout=section.dropout,
        target_modules=section.target_modules,
        task_type=task,
    )
    torch.manual_seed(seed)
    try:
        causal_lm.add_adapter(config, ADAPTER)
    except ValueError as error:
        known = sorted({name.rsplit(".", 1)[-1] for name, m in causal_lm.named_modules() if type(m) is torch.nn.Linear})
        raise ConfigError(
            f"--model.lora.target_modules {section.target_modules}: {str(error).splitlines()[0][:150]}; "
            f"linear layers are {', '.join(known)}"
        ) from None
    for parameter in trained(causal_lm).values():
        parameter.data = parameter.data.to(causal_lm.dtype)  # DeepSpeed wants one type and keeps fp32 masters itself


def is_adapted(causal_lm: PreTrainedModel) -> bool:
    return bool(getattr(causal_lm, "_hf_peft_config_loaded", False))


def trained(causal_lm: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in causal_lm.named_parameters() if parameter.requires_grad}


@contextlib.contextmanager
def adapters_off(causal_lm: PreTrainedModel) -> Iterator[None]:
    """The model as it was before `add_adapters`; for forwards without gradients."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in causal_lm.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def merged(
    read: Callable[[str], Tensor | None], names: Collection[str], scale: float
) -> Callable[[str], Tensor | None]:
    """Returns what reads one of the model's own weights, by transformers' name, with scale * B A added in fp32.

    `read` gives one of `names`, the weights and adapters that there are, or None to a rank that only helps to gather;
    so does what is returned. A weight whose adapters are not among `names` comes as it is.
    """

    def read_merged(name: str) -> Tensor | None:
        weight = read(name)
        b, a = (f"{name.removesuffix('.weight')}.lora_{side}.{ADAPTER}.weight" for side in "BA")
        if b not in names:
            return weight
        b, a = read(b), read(a)
        return None if weight is None else (weight.float() + scale * (b.float() @ a.float())).to(weight.dtype)

    return read_merged


def scale_of(section: LoraSection) -> float:
    """Returns alpha / r, by which adapters count."""
    return (2 * section.r if section.alpha is None else section.alpha) / section.r




def write_adapters(folder: Path, causal_lm: PreTrainedModel, read: Callable[[str], Tensor | None]) -> None:
    """peft's two files: transformers and peft open `folder` as the model that was trained, with its adapters.

    `read` gives a trained parameter by its name, or None to a rank that only helps to gather. All ranks enter.
    """
    tensors = {name: read(name) for name in trained(causal_lm)}
    if any(tensor is None for tensor in tensors.values()):
        return
    renamed = {PREFIX + name.replace(f".{ADAPTER}.", "."): tensor for name, tensor in tensors.items()}
    save_tensors(renamed, folder / WEIGHTS_FILE)
    config = causal_lm.peft_config[ADAPTER]
    base = Path(causal_lm.name_or_path)
    config.base_model_name_or_path = str(base.resolve()) if base.is_dir() else causal_lm.name_or_path
    config.inference_mode = True
    config.save_pretrained(folder)
    config.inference_mode = False
