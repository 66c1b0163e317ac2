"""Two ranks under ZeRO-3, each decoder layer one unit or not: usage layers.py OUT CASE... (JSON objects, one launch).

A case: family, changes (keys of transformers' config), lora, checkpointing, zero (DeepSpeed's zero_optimization).
Each trains three steps of DPO in both ways, two micro-batches a step, an empty one among them. The first step's
gradients are taken a third time, by autograd alone on whole models without DeepSpeed. Rank 0 writes what differs.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad, z3_leaf_module
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_ds.__main__ import end
from dpo_ds.batch import Batch, packed_batch
from dpo_ds.cluster import launch
from dpo_ds.cluster.process_group import enter, leave, quiet_libraries
from dpo_ds.config import LoraSection, ModelSection, TrainSection
from dpo_ds.config.deepspeed import Machine, fill_policy, fill_reference
from dpo_ds.demo.tiny import random_model, tiny_config
from dpo_ds.losses import DPO
from dpo_ds.models import lora
from dpo_ds.models.attention import use_packed_attention
from dpo_ds.models.causal_lm import LogProbModel
from dpo_ds.models.checks import settle_layout
from dpo_ds.models.engine import Policy, load_frozen
from dpo_ds.models.export import gathered_state_dict
from dpo_ds.models.layers.units import decoder_layers
from dpo_ds.models.loading import load_causal_lm, switch_dropout_off
from tests.tiny import VOCAB, random_pairs

PAIRS = random_pairs(7)
SHARES = [[PAIRS[:3], PAIRS[3:4]], [PAIRS[4:], []]]  # of two ranks
LOSS = DPO(beta=0.5)
STEPS = 3


def adapted(model, case: dict):
    if case.get("lora"):
        lora.add_adapters(model, LoraSection(r=4), seed=0)
    if case.get("checkpointing"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return LogProbModel(model)


def loss_of(batch: Batch, policy_N: Tensor, reference_N: Tensor) -> Tensor:
    """The part of the mean over the global batch, for ranks that are averaged."""
    return LOSS(batch.pair_logps(policy_N), batch.pair_logps(reference_N)).sum() * dist.get_world_size() / len(PAIRS)


def train(case: dict, folder: str, zero: dict, device) -> dict:
    """Losses and gradient norms, the first step's gradients, the weights at the end; how many leaves there were."""
    section, ranks = ModelSection(path=folder), dist.get_world_size()
    machine, run = Machine(ranks, "cpu", False), TrainSection(learning_rate=1e-2, global_batch_size=7)
    given = {"zero_optimization": {"stage3_param_persistence_threshold": 0} | zero}
    policy_config, _ = fill_policy(given, "test", run, machine, 32)
    reference_config, _ = fill_reference(given, "test", machine, 32)
    policy = Policy(adapted(load_causal_lm(section, policy_config), case), policy_config, device)
    reference = load_frozen(section, reference_config, device)
    settle_layout("packed", [policy, reference])
    losses, gradients = [], {}
    for step in range(STEPS):
        for index, micro in enumerate(SHARES[dist.get_rank()]):
            batch = packed_batch(micro).to(device)
            loss = loss_of(batch, *(model.token_logps(batch) for model in (policy, reference)))
            losses.append(loss.item())
            policy.backward(loss, is_last=index == 1)
        if step == 0:
            named = policy.causal_lm.named_parameters()
            gradients = {name: safe_get_full_grad(parameter) for name, parameter in named if parameter.requires_grad}
        losses.append(policy.step(1e-2))
    weights = gathered_state_dict(policy.causal_lm)
    leaves = [sum(map(z3_leaf_module, decoder_layers(model.causal_lm))) for model in (policy, reference)]
    return {"losses": losses, "gradients": gradients, "weights": weights, "leaves": leaves}


def by_autograd(case: dict, folder: str) -> dict[str, Tensor]:
    """The first step's gradients."""
    config = AutoConfig.from_pretrained(folder)
    switch_dropout_off(config)
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder, config=config) for _ in range(2))
    policy, reference = adapted(policy, case).train(), LogProbModel(reference).eval()
    for model in (policy, reference):
        assert not use_packed_attention(model.causal_lm)
    sums = {name: 0.0 for name, parameter in policy.causal_lm.named_parameters() if parameter.requires_grad}
    for micro in SHARES[dist.get_rank()]:
        batch = packed_batch(micro)
        with torch.no_grad():
            reference_N = reference(batch)
        loss_of(batch, policy(batch), reference_N).backward()
        for name, parameter in policy.causal_lm.named_parameters():
            if name in sums:
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                dist.all_reduce(gradient)
                sums[name] = sums[name] + gradient / dist.get_world_size()
                parameter.grad = None
    return sums


def compare(case: dict, folder: str, device) -> dict:
    zero = case.get("zero", {})
    units, modules = (train(case, folder, zero | leaf, device) for leaf in ({}, {"leaf_module": {"classes": []}}))
    exact = by_autograd(case, folder)
    apart = [(weight - modules["weights"][name]).norm().item() for name, weight in units["weights"].items()]
    return {
        "leaves": [units["leaves"], modules["leaves"]],
        "losses": [units["losses"], modules["losses"]],
        "gradients": len(exact),
        "inexact": [name for name, gradient in exact.items() if not torch.equal(gradient, units["gradients"][name])],
        "still": [name for name, gradient in exact.items() if not gradient.any()],
        "apart": max(apart, default=0.0),  # of the weights, which rank 0 alone has
    }


def main(out: str, *cases: str) -> None:
    place = launch.from_environment()
    quiet_libraries()
    device = enter(place)
    results = []
    for number, case in enumerate(map(json.loads, cases)):
        folder = f"{Path(out).parent}/{number}"
        if place.is_first:
            config = tiny_config(case["family"], VOCAB, hidden=32, layers=3, **case.get("changes", {}))
            random_model(config).save_pretrained(folder)
        dist.barrier()
        results.append(compare(case, folder, device))
    if place.is_first:
        Path(out).write_text(json.dumps(results))
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
    end(0)
