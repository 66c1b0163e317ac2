"""Tokenizers and models small enough for a CPU, as Hugging Face folders: for the demo and for the tests."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

PAD, EOS, BOS = "<|pad|>", "<|eos|>", "<|bos|>"
_SIZES = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
FAMILIES: dict[str, dict] = {  # what each family's config needs beside the sizes that all of them take
    "llama": _SIZES,
    "qwen2": _SIZES,
    "qwen3": _SIZES | {"head_dim": 16},
    "mistral": _SIZES | {"sliding_window": 64},
    "gemma2": _SIZES | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 64},
    "qwen3_moe": _SIZES | {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
    "gpt2": {"n_head": 4, "n_positions": 512},
}


def train_tokenizer(texts: Iterable[str], vocab_size: int, *, bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab_size` entries (256 bytes and the special ones at least), with EOS and pad.

    With `bos` it puts BOS before every text by itself, as Llama's does; without, it has none, as Qwen's.
    """
    special = [PAD, EOS] + [BOS] * bos
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
        )
    names = {"pad_token": PAD, "eos_token": EOS} | ({"bos_token": BOS} if bos else {})
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names)


def tiny_config(family: str, vocab_size: int, *, hidden: int = 64, layers: int = 2, **changes) -> PretrainedConfig:
    """The family's own config, small; `changes` are its keys and win. Dropout stays at the family's default."""
    if family == "gpt2":
        sizes = {"n_embd": hidden, "n_layer": layers}
    else:
        sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": 3 * hidden}
    return AutoConfig.for_model(family, **(FAMILIES[family] | sizes | {"vocab_size": vocab_size} | changes))


def special_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int | None]:
    """The special tokens as a model's config names them, so that `generate` stops where the tokenizer says."""
    return {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "eos", "bos")}


def tiny_llama(tokenizer: PreTrainedTokenizerFast, *, hidden=64, layers=2, seed=0) -> LlamaForCausalLM:
    """A Llama of random weights that fits the tokenizer."""
    config = tiny_config("llama", len(tokenizer), hidden=hidden, layers=layers, **special_ids(tokenizer))
    return random_model(config, seed)


def random_model(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """The config's causal language model, float32, initialised as its family is; the caller's RNG is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def save_tiny_model(folder: Path | str, tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel) -> Path:
    """Config, safetensors and tokenizer, which `from_pretrained(folder)` opens."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)
