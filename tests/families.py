"""Small models of whatever family transformers knows: its own defaults, made narrow.

    python -m tests.families    tries them all, some 80 s, and writes the list in dpo_ds/models/README.md
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig

from dpo_ds.batch import Group
from tests.ranks import ROOT, WORKERS, start_ranks

VOCABULARY, LAYERS = 160, 2
UNEVEN = ((9, 4, 7), (1, 1, 5), (6, 1, 1), (12, 6, 2))  # prompt, chosen and rejected

FAMILIES = (  # of transformers' causal language models, those whose small model can be made, saved and loaded
    "afmoe", "apertus", "arcee", "aria_text", "axk1", "axk2", "bamba", "bart", "beam", "bert", "bert-generation",
    "big_bird", "bigbird_pegasus", "biogpt", "bitnet", "blenderbot", "blenderbot-small", "bloom", "camembert",
    "codegen", "cohere", "cohere2", "cohere2_moe", "cpmant", "ctrl", "cwm", "data2vec-text", "deepseek_v2",
    "deepseek_v3", "deepseek_v32", "diffllama", "doge", "electra", "ernie", "ernie4_5", "ernie4_5_moe", "exaone4",
    "exaone_moe", "falcon", "falcon_mamba", "flex_olmo", "flint", "fuyu", "gemma", "gemma2", "gemma3", "gemma3_text",
    "gemma4_text", "git", "glm", "glm4", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "got_ocr2", "gpt-sw3", "gpt2",
    "gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_neox_japanese", "gpt_oss", "gptj", "granite", "granite_swa",
    "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "helium", "hunyuan_v1_dense",
    "hunyuan_v1_moe", "hy_v3", "hy_v4", "hyperclovax", "inkling2_text", "inkling_text", "internlm3", "iquestcoder",
    "jais2", "jamba", "jetmoe", "kolibri1", "laguna", "lfm2", "lfm2_moe", "lfm3", "llama", "llama4", "llama4_text",
    "mamba", "mamba2", "marian", "mbart", "megatron-bert", "mellum", "mimo_v2_flash", "minicpm3", "minimax",
    "minimax_m2", "minimax_m3_vl_text", "ministral", "ministral3", "mistral", "mixtral", "modernbert-decoder", "moshi",
    "moss_transcribe_diarize", "mpt", "mvp", "nanochat", "nemotron", "nemotron_h", "olmo", "olmo2", "olmo3",
    "olmo_hybrid", "olmoe", "openai-gpt", "opt", "pegasus", "persimmon", "phi", "phi3", "phi4_multimodal", "phimoe",
    "plbart", "qwen2", "qwen2_moe", "qwen3", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_moe",
    "qwen3_next", "recurrent_gemma", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "rwkv",
    "seed_oss", "smollm3", "solar_open", "stablelm", "starcoder2", "trocr", "vaultgemma", "whisper", "xglm", "xlm",
    "xlm-roberta", "xlm-roberta-xl", "xlstm", "youtu", "zaya",
)  # fmt: skip
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
    "bert-generation", "rembert", "roformer", "roc_bert", "big_bird",
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
    "laguna": {"num_attention_heads_per_layer": [4, 4]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "zaya": {"num_experts_per_tok": 1},
    "deepseek_v2": {"head_dim": 4, "num_key_value_heads": 4, "num_experts_per_tok": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8},
}  # fmt: skip


BUILT = {  # what must be told at once
    "gemma4_text": {
        "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"],
        "per_layer_config": {"01": {"head_dim": 16}}, "vocab_size_per_layer_input": 160,
        "hidden_size_per_layer_input": 16,
    },
}  # fmt: skip


def tiny_config_of(family: str) -> Any:
    """Returns the family's default config, small; `pairs` of a vocabulary as small can be put through its model."""
    config = AutoConfig.for_model(family, **BUILT.get(family, {}))
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


def pairs(vocabulary: int = VOCABULARY) -> list[Group]:
    generator = np.random.default_rng(1)
    tokens = [[generator.integers(3, vocabulary, size=n) for n in pair] for pair in UNEVEN]
    return [Group.pair(p, c, r, np.ones(len(c), bool), np.ones(len(r), bool)) for p, c, r in tokens]


def try_all(folder: Path) -> dict[str, dict[str, Any]]:
    """What tests/workers/families.py saw, of every family; two processes share them."""
    started = []
    for part in range(2):
        where = folder / str(part)
        where.mkdir()
        command = [sys.executable, str(WORKERS / "families.py"), str(where / "out.json"), *FAMILIES[part::2]]
        started.append((where, start_ranks(command, 1, where)[0]))
    found: dict[str, dict[str, Any]] = {}
    for where, process in started:
        assert process.wait(600) == 0, (where / "rank-0.log").read_text()[-3000:]
        found |= json.loads((where / "out.json").read_text())
    return found


GUIDE = ROOT / "dpo_ds/models/README.md"
KINDS = {
    "packed": "**Packed**, each prompt computed once",
    "padded": "**Padded**, chosen and rejected as rows of their own",
    "refused": "**Refused**, with a line that says why, before training",
}


def listed(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The guide's list."""
    lines = []
    for kind, title in KINDS.items():
        names = sorted(name for name, seen in found.items() if seen["layout"] == kind)
        lines.append(f"{title} ({len(names)}): {', '.join(f'`{name}`' for name in names)}.")
    return "\n\n".join(lines) + "\n"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = try_all(Path(folder))
    text = GUIDE.read_text(encoding="utf-8")
    GUIDE.write_text(re.sub(r"\*\*Packed\*\*.*\Z", lambda _: listed(found), text, flags=re.DOTALL), encoding="utf-8")


if __name__ == "__main__":
    main()
