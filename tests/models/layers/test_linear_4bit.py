"""Layers of 4 bits against the same weights unpacked; on a GPU where there is one."""

import math

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM

from dpo_ds.models.layers import quantized
from tests.families import tiny_config_of

pytest.importorskip("bitsandbytes")
from bitsandbytes.functional import dequantize_4bit  # noqa: E402
from bitsandbytes.nn import Linear4bit  # noqa: E402

from dpo_ds.models.layers.linear_4bit import UnitLinear4bit  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_product_is_that_of_the_unpacked_weight_and_keeps_no_gathered_one(dtype):
    """By hand what ZeRO-3 does: the weight is emptied after the forward and gathered again, elsewhere, for backward."""
    torch.manual_seed(0)
    layer = Linear4bit(64, 48, bias=False, quant_type="nf4", quant_storage=dtype).to(dtype).to(DEVICE)
    layer.__class__ = UnitLinear4bit
    whole = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert whole.dtype == dtype
    x = torch.randn(5, 64, device=DEVICE, dtype=dtype, requires_grad=True)
    grad = torch.randn(5, 48, device=DEVICE, dtype=dtype)
    codes = layer.weight.data.clone()
    output = layer(x)
    kept = StorageWeakRef(layer.weight.untyped_storage())
    layer.weight.data = torch.empty(0, device=DEVICE, dtype=dtype)
    assert kept.expired()
    layer.weight.data = codes
    output.backward(grad)
    torch.testing.assert_close(output, x @ whole.T)
    torch.testing.assert_close(x.grad, grad @ whole)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), output)


@pytest.mark.parametrize("family", ["llama", "gpt2", "deepseek_v32"])
def test_layers_and_their_weights_are_those_that_transformers_quantises(family, tmp_path):
    """GPT-2 has its weights turned and its head tied, DeepSeek 3.2 linear layers that stay as they are. A merge, which
    is computed on a CPU, has the run's weights to the bit where that ran on one.
    """
    model = AutoModelForCausalLM.from_config(tiny_config_of(family), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    settings = quantized.settings(torch.bfloat16)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=settings)
    assert quantized.take_loaded(loaded)
    theirs = {name: p for name, p in loaded.named_parameters() if quantized.shape_of(p) is not None}
    layers = quantized.layers_to_quantize(model)
    assert {f"{name}.weight" for name in layers} == theirs.keys()
    for name, layer in layers.items():
        packed = theirs[f"{name}.weight"]
        assert packed.numel() == math.ceil(layer.weight.numel() / 4), "4 bits each in numbers of 16"
        unpacked = dequantize_4bit(packed.data, packed.quant_state).cpu().float()
        through = quantized.through_4_bits(layer.weight.data, layer).float()
        through = through.T if family == "gpt2" else through
        assert (through - unpacked).norm() <= (0 if DEVICE == "cpu" else 1e-3) * unpacked.norm(), name
