"""From a sharded policy to a Hugging Face folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

from dpo_ds import __version__


def gathered_state_dict(causal_lm) -> dict[str, torch.Tensor]:
    """Every parameter and persistent buffer on rank 0's CPU, gathered one by one; {} elsewhere. All ranks enter.

    Tied parameters stay one tensor under two names.
    """
    is_first, state, seen = dist.get_rank() == 0, {}, {}
    for name, parameter in causal_lm.named_parameters(remove_duplicate=False):
        with deepspeed.zero.GatheredParameters([parameter]):
            if is_first:
                if id(parameter) not in seen:
                    seen[id(parameter)] = parameter.detach().cpu().clone()
                state[name] = seen[id(parameter)]
    if is_first:
        parameters = dict(causal_lm.named_parameters(remove_duplicate=False))
        state |= {name: value.cpu() for name, value in causal_lm.state_dict().items() if name not in parameters}
    return state


def export(causal_lm, tokenizer, folder: Path, card: str) -> None:
    """`folder` becomes a Hugging Face model: safetensors shards, config, generation config, tokenizer, model card.

    It appears in one move, whole. All ranks enter.
    """
    state = gathered_state_dict(causal_lm)
    if dist.get_rank() == 0:
        temporary = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        for name, rate in causal_lm.dropouts.items():
            setattr(causal_lm.config, name, rate)
        causal_lm.save_pretrained(temporary, state_dict=state)
        for name in causal_lm.dropouts:
            setattr(causal_lm.config, name, 0.0)
        tokenizer.save_pretrained(temporary)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    dist.barrier()


def model_card(command: str, run: dict, metrics: dict, versions: dict) -> str:
    """README.md of final/: what it was made from and how, in the form that the Hub reads."""
    loss = run.get("loss", {"name": "sft"})
    rows = "\n".join(f"| {name} | {value:.6g} |" for name, value in metrics.items())
    used = ", ".join(f"{name} {version}" for name, version in versions.items())
    title = "Supervised fine-tuning" if command == "sft" else f"Preference optimisation ({loss['name']})"
    return f"""---
library_name: transformers
tags: [dpo_ds, {loss["name"]}]
---
# {title} of {run["model"]["path"]}

Trained by dpo_ds {__version__} on {run["data"]["train"]}.

| last metric | value |
| --- | --- |
{rows}

Loss: {loss}. Learning rate {run["train"]["learning_rate"]}, {run["train"]["schedule"]}; global batch
{run["train"]["global_batch_size"]}; seed {run["train"]["seed"]}.

Versions: {used}.
"""
