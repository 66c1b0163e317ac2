"""Small models of whatever family transformers knows: its own defaults, made narrow."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
from transformers import AutoConfig

from dpo_ds.batch import PreferencePair

VOCABULARY, LAYERS = 160, 2
UNEVEN = ((9, 4, 7), (1, 1, 5), (6, 1, 1), (12, 6, 2))  # prompt, chosen and rejected

SMALL = {  # whatever of these a family's config has
    "vocab_size": VOCABULARY, "hidden_size": 32, "n_embd": 32, "d_model": 32, "embedding_size": 32,
    "intermediate_size": 48, "ffn_dim": 48, "n_inner": 48, "d_ff": 48, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "decoder_attention_heads": 4,
    "encoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": LAYERS,
    "n_layer": LAYERS, "n_layers": LAYERS, "num_layers": LAYERS, "decoder_layers": LAYERS, "encoder_layers": LAYERS,
    "max_position_embeddings": 128, "n_positions": 128, "initializer_range": 0.2, "word_embed_proj_dim": 32,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "kv_lora_rank": 8, "q_lora_rank": 8,
    "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "topk_group": 1, "first_k_dense_replace": 1,
    "rotary_dim": 4, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 4, "mamba_n_groups": 1, "state_size": 4,
    "lru_width": 32, "attention_window_size": 8, "chunk_size": 8, "mamba_chunk_size": 8,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
ENCODERS = (  # decoders only where their config says so
    "bert", "roberta", "xlm-roberta", "camembert", "electra", "ernie", "megatron-bert", "data2vec-text",
    "bert-generation", "rembert", "roformer", "roc_bert", "big_bird", "reformer",
)  # fmt: skip
LATENT = (  # multi-head latent attention, whose head_dim is that of the rotary part
    "deepseek_v2", "deepseek_v3", "deepseek_v32", "axk1", "axk2", "glm_moe_dsa", "youtu", "minicpm3", "hy_v4",
    "glm4_moe_lite",
)  # fmt: skip
SETTINGS = {  # where a family needs more than to be narrow
    **dict.fromkeys(ENCODERS, {"is_decoder": True}),
    **dict.fromkeys(LATENT, {"head_dim": 4, "num_key_value_heads": 4}),
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral"), {"head_dim": 8}),
    "nemotron": {"num_key_value_heads": 2},
    "dots1": {"n_routed_experts": 4, "num_experts": 4, "num_local_experts": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8},
    "zamba2": {"mamba_headdim": 16, "n_mamba_heads": 4},
    "longcat_flash": {"qk_head_dim": 8},
}  # fmt: skip


def tiny_config_of(family: str) -> Any:
    """Returns the family's default config, small; `pairs` of a vocabulary as small can be put through its model."""
    config = AutoConfig.for_model(family)
    shrink(config)
    for name, value in SETTINGS.get(family, {}).items():
        setattr(config, name, value)
    return config


def shrink(config: Any) -> None:
    for name, value in SMALL.items():
        with contextlib.suppress(Exception):  # some are read-only, or differ by layer
            if getattr(config, name, None) is not None:
                setattr(config, name, value)
    for name in ("layer_types", "mlp_layer_types", "layers_block_type"):
        with contextlib.suppress(Exception):
            kinds = getattr(config, name)
            different = sorted(set(kinds), key=kinds.index)
            setattr(config, name, (different if len(different) > 1 else kinds)[:LAYERS])
    for name, value in list(vars(config).items()):
        if name.endswith("_config") and hasattr(value, "to_dict"):
            shrink(value)


def pairs(vocabulary: int = VOCABULARY) -> list[PreferencePair]:
    generator = np.random.default_rng(1)
    tokens = [[generator.integers(3, vocabulary, size=n) for n in pair] for pair in UNEVEN]
    return [PreferencePair(p, c, r, np.ones(len(c), bool), np.ones(len(r), bool)) for p, c, r in tokens]
