"""Two ranks: what torch allocates in two steps of tiny runs, by its profiler: memory.py OUT CASE...

A case is a JSON object: name, model (transformers config keys), ds (DeepSpeed's JSON), live, checkpointing, pairs (how
often the same pair stands in the batch), shape (its prompt, chosen and rejected tokens). Rank 0 writes bytes to OUT.
"""

import gc
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from dpo_ds import attention, launch
from dpo_ds.batch import PreferencePair, packed_batch
from dpo_ds.config import ModelSection, TrainSection
from dpo_ds.demo.tiny import tiny_config
from dpo_ds.ds_config import Machine, fill_policy, fill_reference
from dpo_ds.engine import Policy, finish_distributed, initialize_distributed, quiet_libraries
from dpo_ds.model import LogProbModel, load_causal_lm
from dpo_ds.reference.live import frozen_model


def measure(case: dict, folder: Path, device) -> dict[str, int]:
    """Bytes more than before: `state` while nothing runs after a step, `peak` of the second step, `start` up to then."""
    machine, run = Machine(dist.get_world_size(), "cpu", False), TrainSection(learning_rate=1e-3, global_batch_size=2)
    config = tiny_config("llama", **case["model"])
    if dist.get_rank() == 0:
        config.save_pretrained(folder / case["name"])
    dist.barrier()
    section = ModelSection(path=str(folder / case["name"]), from_config=True)
    policy_config, _ = fill_policy(case["ds"], "ds", run, machine, config.hidden_size)
    reference_config, _ = fill_reference(case["ds"], "ds", machine, config.hidden_size)
    lengths = dict(zip(("prompt", "chosen", "rejected"), case["shape"], strict=True))
    tokens = {name: np.arange(1, count + 1) for name, count in lengths.items()}
    masks = {f"{side}_mask": np.ones(lengths[side], bool) for side in ("chosen", "rejected")}
    batch = packed_batch([PreferencePair(**tokens, **masks)] * case["pairs"])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model = load_causal_lm(section, policy_config)
        if case["checkpointing"]:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        policy = Policy(LogProbModel(model), policy_config, device)
        models = [policy]
        if case["live"]:
            models.append(frozen_model(section, reference_config, device))
        for each in models:
            attention.use_packed_attention(each.causal_lm)
        for step in range(2):
            with record_function(f"step {step}"):
                reference = models[1].logps(batch).logratio if case["live"] else 0.0
                loss = -torch.nn.functional.logsigmoid(0.1 * (policy.logps(batch).logratio - reference)).sum()
                policy.backward(loss, is_last=True)
                policy.step(1e-3)
                del loss, reference
            with record_function(f"after {step}"):
                pass
    events = profiler.profiler.kineto_results.events()
    starts = {event.name(): event.start_ns() for event in events if event.name().startswith(("step ", "after "))}
    found, total = {"state": 0, "peak": 0, "start": 0}, 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda event: event.start_ns()):
        total += event.nbytes()
        when = event.start_ns()
        part = "peak" if starts["step 1"] <= when < starts["after 1"] else "start"
        if when < starts["after 1"]:
            found[part] = max(found[part], total)
        if when < starts["step 1"]:
            found["state"] = total
    for each in models:
        each.engine.destroy()
    return found


def main(out: str, *cases: str) -> None:
    place = launch.from_environment()
    quiet_libraries()
    device = initialize_distributed(place)
    found = {}
    for case in map(json.loads, cases):
        found[case["name"]] = measure(case, Path(out).parent, device)
        gc.collect()
        if place.is_first:
            Path(out).write_text(json.dumps(found))
    finish_distributed()


if __name__ == "__main__":
    main(*sys.argv[1:])
