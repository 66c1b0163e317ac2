"""LoRA (Hu et al. 2021, arXiv 2106.09685) by peft: low-rank adapters train, the model's own weights are frozen."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpo_ds.config import LoraSection
from dpo_ds.errors import ConfigError, first_line
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
        raise ConfigError(
            f"--model.lora.target_modules {section.target_modules}: {first_line(error)[:150]}; "
            f"{_layers_that_can(causal_lm)}"
        ) from None
    for parameter in trained(causal_lm).values():
        parameter.data = parameter.data.to(causal_lm.dtype)  # DeepSpeed wants one type and keeps fp32 masters itself


def _layers_that_can(causal_lm: PreTrainedModel) -> str:
    """Lists the layers that peft can adapt, by the last part of their names, or what there is instead."""
    from transformers.pytorch_utils import Conv1D

    head = causal_lm.get_output_embeddings()
    last = {name.rpartition(".")[2]: module for name, module in causal_lm.named_modules() if module is not head}
    linear = sorted(name for name, module in last.items() if isinstance(module, torch.nn.Linear | Conv1D))
    if linear:
        return f"linear layers are {', '.join(linear)}"
    kinds = sorted({type(module).__name__ for module in last.values() if any(module.parameters(recurse=False))})
    return f"it has no linear layer that peft can adapt; its weights lie in {', '.join(kinds)}"


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


class Merging:
    """Knows a model's own weights and which adapters are added to each, however many wrappers peft puts around it: one
    around a linear layer, one for each fused parameter of a mixture's experts, within each other.

    names: transformers' name of a weight or buffer -> its name within the wrappers.
    """

    def __init__(self, causal_lm: PreTrainedModel):
        from peft.tuners.tuners_utils import BaseTunerLayer

        modules = dict(causal_lm.named_modules())
        wrappers = {name: module for name, module in modules.items() if isinstance(module, BaseTunerLayer)}
        parameters = dict(causal_lm.named_parameters(remove_duplicate=False))
        buffers = [name for name in causal_lm.state_dict() if name not in parameters]
        own = [name for name, _ in causal_lm.named_parameters() if ".lora_" not in name] + buffers
        self.names = {re.sub(r"(\.base_layer)+\.", ".", name): name for name in own}
        self._around: dict[str, list[tuple[str, torch.nn.Module]]] = {name: [] for name in own}
        for at, wrapper in wrappers.items():
            inner = f"{at}.base_layer."
            while inner.removesuffix(".") in wrappers:
                inner += "base_layer."
            self._around[f"{inner}{getattr(wrapper, 'parameter_name', 'weight')}"].append((at, wrapper))

    def reader(self, read: Callable[[str], Tensor | None]) -> Callable[[str], Tensor | None]:
        """Returns what reads a weight by transformers' name, its adapters added in fp32.

        `read` gives a weight or adapter by the model's own name, or None to a rank that only helps to gather; so does
        what is returned.
        """

        def read_merged(name: str) -> Tensor | None:
            own = self.names[name]
            weight = read(own)
            for at, wrapper in self._around[own]:
                a, b = (read(f"{at}.lora_{side}.{ADAPTER}.weight") for side in "AB")
                if weight is not None:
                    weight = (weight.float() + _delta(wrapper, a.float(), b.float())).to(weight.dtype)
            return weight

        return read_merged


def _delta(wrapper: torch.nn.Module, a: Tensor, b: Tensor) -> Tensor:
    """Returns what an adapter adds to its weight, as peft computes it: scale * B A, an expert at a time where several
    lie in one parameter: a [experts * r, in], b [out, r * experts].
    """
    scale, experts = wrapper.scaling[ADAPTER], getattr(wrapper, "num_experts", 1)
    if experts == 1:
        return scale * ((b @ a).T if wrapper.fan_in_fan_out else b @ a)
    a, b = a.view(experts, -1, a.shape[1]), b.view(b.shape[0], -1, experts)
    order = "eoi" if wrapper._did_swap_in_out_features else "eio"
    return scale * torch.einsum(f"ore,eri->{order}", b, a)


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
