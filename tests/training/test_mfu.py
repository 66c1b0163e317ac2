"""The FLOPs of a step, counted by hand for small models and by torch for one of them."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dpo_ds.config import LoraSection
from dpo_ds.data.batching import Lengths
from dpo_ds.demo.tiny import random_model, tiny_config
from dpo_ds.memory.cards import CARDS
from dpo_ds.models import lora
from dpo_ds.training.mfu import ModelFlops, Utilisation, attended, peak_flops

# Width 8, one head of 8, inner 16, vocabulary 10: a layer has 4 x 8 x 8 + 3 x 8 x 16 = 640 weights, the head 80.
CONFIG = {
    "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 1, "num_key_value_heads": 1,
    "num_hidden_layers": 2, "head_dim": 8,
}  # fmt: skip


def lengths(*pairs: tuple[int, int, int]) -> Lengths:
    table = np.array(pairs, np.int64)
    return Lengths(table[:, 0], table[:, 1:])


def test_queries_see_the_prompt_and_their_own_completion():
    """Prompt 2, chosen 3, rejected 1: 1 + 2 + 3 + 4 + 5 and, for rejected, 3. With a window of 2, 1 + 2 + 2 + 2 + 2 and
    2."""
    assert attended(lengths((2, 3, 1)), None) == 15 + 3
    assert attended(lengths((2, 3, 1)), 2) == 9 + 2
    assert attended(lengths((2, 3, 1), (1, 1, 0)), None) == 18 + 3


def test_a_llama_by_hand():
    """Six tokens: 6 x 2 x 1280 in products, 18 pairs x 2 layers x 2 x (8 + 8) in attention, 4 targets x 160."""
    flops = ModelFlops.of(random_model(tiny_config("llama", 10, **CONFIG)))
    products, attention, head = 6 * 2 * 1280, 18 * 2 * 32, 4 * 160
    assert flops.forward(lengths((2, 3, 1)), 4) == products + attention + head
    assert flops.with_backward(lengths((2, 3, 1)), 4) == 3 * (products + attention + head)


def test_torch_counts_the_same():
    """One sequence without a prompt, scored at every token: torch's counter takes attention for square."""
    model = random_model(tiny_config("llama", 10, **CONFIG)).eval()
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.arange(1, 8)[None], use_cache=False)
    flops = ModelFlops.of(model)
    square = sum(flops.pairs) * (7 * 7 - 28)  # 1 + ... + 7 = 28 of 49 pairs count
    assert flops.forward(lengths((0, 7, 0)), 7) == counter.get_total_flops() - square


def test_adapters_need_no_gradient_of_frozen_weights():
    """Rank 2 on all seven products: 2 x (4 x (8 + 8) + 3 x (8 + 16)) = 272 trained weights a layer."""
    model = random_model(tiny_config("llama", 10, **CONFIG))
    lora.add_adapters(model, LoraSection(r=2), seed=0)
    flops = ModelFlops.of(model)
    assert (flops.token, flops.trained) == (2 * 2 * (640 + 272), 2 * 2 * 272)
    attention, head = 18 * 2 * 32, 4 * 160
    expected = 6 * (2 * flops.token + flops.trained) + 3 * attention + 2 * head
    assert flops.with_backward(lengths((2, 3, 1)), 4) == expected


def test_of_experts_those_that_are_chosen_count():
    """Two of four experts of 3 x 8 x 12 weights; the router has 4 x 8, attention 256."""
    config = tiny_config("qwen3_moe", 10, **CONFIG | {"moe_intermediate_size": 12})
    assert ModelFlops.of(random_model(config)).token == 2 * 2 * (256 + 32 + 2 * 288)


def test_windows_alternate_in_gemma():
    config = tiny_config("gemma2", 10, layers=4, sliding_window=3)
    assert ModelFlops.of(random_model(config)).windows == [3, None, 3, None]


def test_utilisation_counts_the_reference_once_and_the_policy_three_times():
    """Two GPUs of 1 MFLOP/s for half a second could do 1e6; a Llama's forward of six tokens is 17152."""
    flops = ModelFlops.of(random_model(tiny_config("llama", 10, **CONFIG)))
    assert flops.forward(lengths((2, 3, 1)), 4) == 17152
    assert Utilisation(2e6, flops, [flops])(lengths((2, 3, 1)), 4, 0.5) == 4 * 17152 / 1e6


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12), ("NVIDIA L40S", 362e12), ("NVIDIA A10", 125e12), ("Tesla T4", None),
    ],
)  # fmt: skip
def test_peaks_go_by_name_and_only_for_bfloat16(monkeypatch, name, flops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), torch.bfloat16) == flops
    assert peak_flops(torch.device("cuda"), torch.float32) is None
    assert peak_flops(torch.device("cpu"), torch.bfloat16) is None
    assert min(card.peak for card in CARDS.values()) > 1e14
