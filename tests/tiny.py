"""Small pairs and models that tests share."""

from __future__ import annotations

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from dpo_ds.batch import PreferencePair

VOCAB = 257


def random_pairs(count: int, seed: int = 0, vocab: int = VOCAB) -> list[PreferencePair]:
    """Uneven pairs: prompts of 1 to 12 tokens, completions of 1 to 9; one with an untrained turn in the middle."""
    generator = np.random.default_rng(seed)
    pairs = []
    for index in range(count):
        prompt, chosen, rejected = (generator.integers(1, high) for high in (13, 10, 10))
        if index == 0:
            prompt, chosen, rejected = 1, 1, 7
        mask = np.ones(chosen, bool)
        mask[1:3] = chosen < 5  # a user's turn inside the completion
        tokens = generator.integers(1, vocab, prompt + chosen + rejected)
        pairs.append(
            PreferencePair(
                prompt=tokens[:prompt],
                chosen=tokens[prompt : prompt + chosen],
                rejected=tokens[prompt + chosen :],
                chosen_mask=mask,
                rejected_mask=np.ones(rejected, bool),
                index=index,
            )
        )
    return pairs


def save_tiny(folder, config, seed: int = 0) -> str:
    """Random weights of `config`'s family in `folder`."""
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return str(folder)


def tiny_config(family: str):
    """A config of the family with every trait that matters to log-probs: GQA, windows, soft-caps, tied heads."""
    from transformers import Gemma2Config, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

    common = dict(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    windowed = dict(sliding_window=5)
    return {
        "llama": lambda: LlamaConfig(**common),
        "qwen2": lambda: Qwen2Config(**common, tie_word_embeddings=True),
        "qwen3": lambda: Qwen3Config(**common, head_dim=8),
        "mistral": lambda: MistralConfig(**common, **windowed),
        "gemma2": lambda: Gemma2Config(
            **common,
            **windowed,
            head_dim=8,
            query_pre_attn_scalar=8,
            final_logit_softcapping=5.0,
            attn_logit_softcapping=3.0,
        ),
        "gpt2": lambda: GPT2Config(
            vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=1
        ),
    }[family]()
