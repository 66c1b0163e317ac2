"""Frozen weights in 4 bits, on which adapters train: QLoRA (Dettmers et al. 2023, arXiv 2305.14314) by bitsandbytes.

A weight is NF4 in blocks of 64, their largest values quantised once more (double quantisation). bitsandbytes keeps two
weights in a byte, here several such bytes in a number of the run's own type, so that ZeRO-3 partitions and gathers them
as any weight; the blocks' values stay whole on each rank.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from dpo_ds.config import ModelSection
from dpo_ds.config.deepspeed import Machine
from dpo_ds.errors import ConfigError, ModelError

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # whoever imports it, as peft does, hears of CPU kernels
KIND, BLOCK = "nf4", 64
BITS = 4 + 8 / BLOCK + 32 / (256 * BLOCK)  # of a weight: itself, its block's value in a byte, and theirs in fp32
ROUNDING = ("zero_quantized_weights", "zero_quantized_nontrainable_weights")  # of ZeRO++, while weights are gathered


def check_quantize(section: ModelSection, machine: Machine, model_config) -> None:
    """Checks that this machine can do what model.quantize asks for, and the model have it done.

    Raises:
        ConfigError: no CUDA, or no bitsandbytes.
        ModelError: a folder whose weights are quantised already.
    """
    if section.quantize is None:
        return
    if machine.device != "cuda":
        without = "leave it out to train adapters on the weights as they are"
        raise ConfigError(f"--model.quantize {section.quantize} needs a CUDA GPU, and torch sees none here; {without}")
    require_bitsandbytes(f"--model.quantize {section.quantize}")
    if getattr(model_config, "quantization_config", None) is not None:
        problem = f"{section.path} holds quantised weights already; name the folder that they were made from"
        raise ModelError(f"--model.quantize {section.quantize}: {problem}")


def check_gathering(section: ModelSection, filled: dict, path: str) -> None:
    """Raises ConfigError where DeepSpeed, by its config `filled` from `path`, would round packed weights as if they
    were numbers.
    """
    wanted = [key for key in ROUNDING if filled["zero_optimization"].get(key)]
    if section.quantize and wanted:
        raise ConfigError(
            f"{path}: zero_optimization.{wanted[0]} rounds weights to 8 bits while they are gathered, which those of "
            f"model.quantize {section.quantize} would not survive; set it to false"
        )


def require_bitsandbytes(what: str) -> None:
    """Raises ConfigError where it is not installed; what: that needs it."""
    if find_spec("bitsandbytes") is None:
        raise ConfigError(f"{what} needs bitsandbytes: pip install 'dpo-ds[quantize]'")


def settings(dtype: torch.dtype) -> BitsAndBytesConfig:
    """Returns what transformers quantises by while it loads; dtype: the run's, in which products are computed."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=KIND,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,  # ZeRO-3 partitions numbers of one type
    )


def layers_to_quantize(causal_lm: PreTrainedModel) -> dict[str, nn.Module]:
    """Returns the layers that transformers quantises, by name: linear ones but the head and what the family wants in
    full precision, as the indexers of DeepSeek 3.2; not the adapters' own.
    """
    kept = HfQuantizer.get_modules_to_not_convert(causal_lm, None, causal_lm._keep_in_fp32_modules)
    return {
        name: module
        for name, module in causal_lm.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D))
        and should_convert_module(name.removesuffix(".base_layer"), kept)
        and ".lora_" not in name
    }


def is_quantized(causal_lm: PreTrainedModel) -> bool:
    return bool(getattr(causal_lm, "is_loaded_in_4bit", False))


def shape_of(parameter: Tensor) -> torch.Size | None:
    """Returns what a weight's shape was before it was quantised; None for one that is not."""
    state = getattr(parameter, "quant_state", None)
    return None if state is None else state.shape


def take_loaded(causal_lm: PreTrainedModel) -> list[str]:
    """Looks what transformers has quantised, and lets ZeRO-3 free it between forward and backward; returns a line for
    the user.

    Raises:
        ModelError: nothing, or the head, whose log-probs are computed from its weights.
    """
    from bitsandbytes.nn import Linear4bit

    from dpo_ds.models.layers.linear_4bit import UnitLinear4bit

    found = [module for module in causal_lm.modules() if isinstance(module, Linear4bit)]
    name = type(causal_lm).__name__
    if not found or isinstance(causal_lm.get_output_embeddings(), Linear4bit):
        raise ModelError(f"model.quantize: {name} has {'its head' if found else 'no linear layer'} to be quantised")
    for module in found:
        module.__class__ = UnitLinear4bit
    packed = sum(module.in_features * module.out_features for module in found)
    others = sum(p.numel() for p in causal_lm.parameters()) - sum(module.weight.numel() for module in found)
    return [f"{name}: {packed:,} of {packed + others:,} weights in 4 bits ({KIND.upper()}), the others as they are"]


def through_4_bits(weight: Tensor, layer: nn.Module) -> Tensor:
    """Returns a layer's weight as the run had it: quantised, and back in its own type. Works without a GPU."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    is_turned = isinstance(layer, Conv1D)  # [in, out]; blocks follow the inputs
    packed, state = quantize_4bit(
        (weight.T if is_turned else weight).contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type=KIND
    )
    return dequantize_4bit(packed, state).T if is_turned else dequantize_4bit(packed, state)
