"""One rank: every family that is named, as a user's folder of it would be trained: families.py OUT FAMILY...

Each is saved small, loaded under ZeRO-3, put into the layout that it takes, compared with its own logits on sequences
alone, trained one step and exported; the folder that comes of it is opened again. OUT gets a JSON object a family.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from dpo_ds.__main__ import end
from dpo_ds.batch import PAIR, packed_batch, padded_batch
from dpo_ds.cluster import launch
from dpo_ds.cluster.process_group import enter, leave, quiet_libraries
from dpo_ds.config import ModelSection, TrainSection
from dpo_ds.config.deepspeed import Machine, fill_policy
from dpo_ds.errors import ModelError
from dpo_ds.models.causal_lm import LogProbModel
from dpo_ds.models.checks import settle_layout
from dpo_ds.models.engine import Policy
from dpo_ds.models.export import export, headers
from dpo_ds.models.loading import load_causal_lm, load_tokenizer
from tests.data_helpers import tokenizer
from tests.families import pairs, tiny_config_of


def alone(model, pairs) -> torch.Tensor:
    """Token log-probs of every completion by the model's own logits, a sequence at a time."""
    found = []
    for pair in pairs:
        for side in PAIR:
            ids = torch.from_numpy(np.concatenate([pair.prompt, getattr(pair, side)]))
            with torch.no_grad():
                logps = model(input_ids=ids[None], use_cache=False).logits[0].float().log_softmax(-1)
            places = torch.arange(len(pair.prompt), len(ids))
            found.append(logps[places - 1, ids[places]])
    return torch.cat(found)


def try_family(family: str, folder: Path, device) -> dict:
    torch.manual_seed(0)
    path = folder / family
    model = AutoModelForCausalLM.from_config(tiny_config_of(family), dtype=torch.float32)
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    given = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    run = TrainSection(learning_rate=1e-2, global_batch_size=4)
    config, _ = fill_policy(given, "test", run, Machine(1, "cpu", False), 32)
    section = ModelSection(path=str(path))
    try:
        policy = Policy(LogProbModel(load_causal_lm(section, config)), config, device)
        layout, why = settle_layout("packed", [policy])
    except ModelError as refusal:
        return {"layout": "refused", "why": str(refusal)}
    batch = (packed_batch if layout == "packed" else padded_batch)(pairs())
    logps = policy.token_logps(batch)
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    error = (logps.detach() - alone(reference, pairs())).abs().max().item()
    policy.backward(logps.mean(), is_last=True)
    norm = policy.step(1e-2)
    tokenizer_of = load_tokenizer(section, policy.causal_lm.config, str(path))
    export(policy.causal_lm, tokenizer_of, folder / f"{family}-final", "")
    opened = AutoModelForCausalLM.from_pretrained(
        folder / f"{family}-final", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    with policy.evaluating():
        trained = policy.token_logps(batch)
    return {
        "layout": layout,
        "why": why,
        "error": error,
        "largest": logps.abs().max().item(),
        "norm": norm,
        "moved": (trained - logps.detach()).abs().max().item(),
        "reopened_error": (trained - alone(opened[0].eval(), pairs())).abs().max().item(),
        "missing": sorted(opened[1]["missing_keys"]),
        "unexpected": sorted(opened[1]["unexpected_keys"]),
        "same_names": headers(str(path)) == headers(str(folder / f"{family}-final")),
    }


def main(out: str, *families: str) -> None:
    place = launch.from_environment()
    quiet_libraries()
    device, results = enter(place), {}
    for family in families:
        start = time.monotonic()
        try:
            results[family] = try_family(family, Path(out).parent, device)
        except Exception as error:
            results[family] = {"layout": "failed", "why": f"{type(error).__name__}: {error}"}
        results[family]["seconds"] = round(time.monotonic() - start, 2)
        Path(out).write_text(json.dumps(results, indent=1))
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
    end(0)
