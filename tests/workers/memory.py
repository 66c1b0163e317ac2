"""One rank: the memory of the tensors that torch's operators make in two steps of a tiny run: memory.py OUT CASE

A case is a JSON object: name, family, model (transformers config keys), quantize and lora (those sections' keys), ds
(DeepSpeed's JSON), live, activations, spread (over how many ranks), pairs (how often the same group stands in the
batch), shape (tokens of its prompt and completions). Rank 0 writes bytes to OUT.
"""

import gc
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from dpo_ds.__main__ import end
from dpo_ds.batch import Group, packed_batch
from dpo_ds.cluster import collectives, launch
from dpo_ds.cluster.process_group import enter, leave, quiet_libraries
from dpo_ds.config import ModelSection, TrainSection
from dpo_ds.config.deepspeed import Machine, fill_policy, fill_reference
from dpo_ds.demo.tiny import random_model, tiny_config
from dpo_ds.memory.trace import PeakMemory
from dpo_ds.models import attention
from dpo_ds.models.causal_lm import LogProbModel
from dpo_ds.models.engine import Policy, load_frozen
from dpo_ds.models.layers.activations import save_activation_memory
from dpo_ds.models.loading import load_causal_lm
from dpo_ds.models.lora import add_adapters


def measure(case: dict, folder: Path, device) -> dict[str, int]:
    """Bytes of all tensors: `state` when two steps are over, `peak` of the second, in which prefetching has begun."""
    machine, run = Machine(dist.get_world_size(), "cpu", False), TrainSection(learning_rate=1e-3, global_batch_size=2)
    config = tiny_config(case["family"], **case["model"])
    is_quantized = case["quantize"] is not None
    if dist.get_rank() == 0:
        (random_model(config) if is_quantized else config).save_pretrained(folder / case["name"])
    dist.barrier()
    kind = {"from_config": not is_quantized, "quantize": case["quantize"], "lora": case["lora"]}
    section = ModelSection(path=str(folder / case["name"]), **kind)
    policy_config, _ = fill_policy(case["ds"], "ds", run, machine, config.hidden_size)
    reference_config, _ = fill_reference(case["ds"], "ds", machine, config.hidden_size)
    prompt, *completions = (np.arange(1, count + 1) for count in case["shape"])
    best_first = np.array([[0, worse] for worse in range(1, len(completions))])
    masks = tuple(np.ones(len(tokens), bool) for tokens in completions)
    batch = packed_batch([Group(prompt, tuple(completions), masks, best_first)] * case["pairs"])
    if case["spread"] > 1:
        collectives.form_sequence_groups(case["spread"])
        batch = batch.spread(case["spread"], collectives.sequence_place())
    with PeakMemory([]) as meter:
        model = load_causal_lm(section, policy_config)
        if section.lora.r:
            add_adapters(model, section.lora, seed=0)
        save_activation_memory(model, case["activations"])
        policy = Policy(LogProbModel(model), policy_config, device)
        models = [policy]
        if case["live"]:
            models.append(load_frozen(section, reference_config, device))
        for each in models:
            attention.use_packed_attention(each.causal_lm)
        for step in range(2):
            meter.begin(f"step {step}")
            reference = batch.pair_logps(models[1].token_logps(batch)).logratio if case["live"] else 0.0
            logratio = batch.pair_logps(policy.token_logps(batch)).logratio
            loss = -torch.nn.functional.logsigmoid(0.1 * (logratio - reference)).sum()
            policy.backward(loss, is_last=True)
            policy.step(1e-3)
            del loss, logratio, reference
            gc.collect()
        return {"state": meter.live, "peak": meter.peaks["step 1"]}


def main(out: str, case: str) -> None:
    place = launch.from_environment()
    quiet_libraries()
    found = measure(json.loads(case), Path(out).parent, enter(place))
    if place.is_first:
        Path(out).write_text(json.dumps(found))
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
    end(0)
