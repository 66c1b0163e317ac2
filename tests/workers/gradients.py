"""Ranks under ZeRO-3 against single-process autograd: usage gradients.py OUT LAYOUTS FAMILY... (one launch for all).
LAYOUTS, with commas between them: padded, packed, or spread N: packed, the tokens of each micro-batch over N ranks.

Every family: the DPO gradient of a global batch, spread over ranks and micro-batches with an empty one among them, then
one update. Rank 0 writes what it saw to OUT as JSON; the test asserts on it.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from dpo_ds.__main__ import end
from dpo_ds.cluster import collectives, launch
from dpo_ds.cluster.process_group import enter, leave, quiet_libraries
from dpo_ds.config import ModelSection, TrainSection
from dpo_ds.config.deepspeed import Machine, fill_policy, fill_reference
from dpo_ds.demo.tiny import random_model, tiny_config
from dpo_ds.errors import ModelError
from dpo_ds.losses import DPO
from dpo_ds.models.causal_lm import LogProbModel
from dpo_ds.models.checks import check_head, settle_layout, settle_sequence
from dpo_ds.models.engine import Policy, load_frozen
from dpo_ds.models.export import gathered_state_dict
from dpo_ds.models.loading import load_causal_lm
from dpo_ds.training.metrics import preference_sums
from tests.oracle import dpo_by_autograd, relative_errors
from tests.tiny import VOCAB, as_pairs, random_groups, random_pairs

TRAITS = {  # windows shorter than the sequences, soft-caps that bend; dropout stays at the family's own default
    "qwen2": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 5},
    "gemma2": {"sliding_window": 5, "final_logit_softcapping": 5.0, "attn_logit_softcapping": 3.0},
}


def check(family: str, folder: Path, rank: int, ranks: int, device, layout: str, spread: int) -> dict:
    from deepspeed.utils import safe_get_full_grad

    from dpo_ds.batch import packed_batch, padded_batch

    config = tiny_config(family, VOCAB, hidden=32, **TRAITS.get(family, {}))
    paths = [str(folder / f"{family}-{layout}-{name}") for name in ("policy", "reference")]
    if rank == 0:
        for seed, path in enumerate(paths):
            random_model(config, seed).save_pretrained(path)
    dist.barrier()
    given = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    machine = Machine(ranks, "cpu", False)
    run = TrainSection(learning_rate=1e-2, max_grad_norm=0, global_batch_size=8)
    policy_config, _ = fill_policy(given, "test", run, machine, 32)
    reference_config, _ = fill_reference(given, "test", machine, 32)
    attn = "eager" if family == "gemma2" else "auto"
    sections = [ModelSection(path=path, attn=attn) for path in paths]
    policy = Policy(LogProbModel(load_causal_lm(sections[0], policy_config)), policy_config, device)
    reference = load_frozen(sections[1], reference_config, device)

    head = policy.causal_lm.get_output_embeddings()
    known, head.scale = head.scale, 1.5 * head.scale  # as if the family had a logit scale that install_head overlooks
    try:
        check_head(policy)
        refusal = ""
    except ModelError as error:
        refusal = str(error)
    head.scale = known
    assert settle_layout(layout, [policy, reference]) == (layout, "")
    settle_sequence(spread, "", [policy, reference])
    groups = [*random_pairs(7), *random_groups((4,))]
    pairs = [pair for group in groups for pair in as_pairs(group)]
    shares = [[groups[:3], groups[3:4]], [groups[4:], []]]  # the last micro-batch is empty
    if collectives.data_ranks() == 1:
        shares = [[groups[:4], groups[4:], []]]
    loss_fn, sums = DPO(beta=0.5, label_smoothing=0.1), 0
    before = gathered_state_dict(policy.causal_lm)
    mine = shares[collectives.data_rank()]
    for index, micro in enumerate(mine):
        batch = (packed_batch if layout == "packed" else padded_batch)(micro)
        batch = batch.spread(spread, collectives.sequence_place()) if spread > 1 else batch
        policy_logps, reference_logps = (batch.pair_logps(m.token_logps(batch)) for m in (policy, reference))
        losses = loss_fn(policy_logps, reference_logps)
        sums = sums + preference_sums(losses, policy_logps, reference_logps, loss_fn.beta)
        policy.backward(losses.sum() * ranks / len(pairs), is_last=index == len(mine) - 1)
    collectives.reduce_data(sums)
    names = dict(policy.causal_lm.named_parameters())
    gradients = {name: safe_get_full_grad(parameter) for name, parameter in names.items()}
    norm = policy.step(1e-2)
    after = gathered_state_dict(policy.causal_lm)
    if rank != 0:
        return {}
    oracle = dpo_by_autograd(paths[0], paths[1], pairs, beta=0.5, label_smoothing=0.1, attn=attn)
    errors = relative_errors(gradients, oracle.gradients)
    still = [name for name in names if torch.equal(before[name], after[name])]
    return {
        "gradient_error": max(errors.values()),
        "worst": max(errors, key=errors.get),
        "loss": [sums[0].item() / len(pairs), oracle.loss],
        "norm": [norm, oracle.norm],
        "still": still,
        "parameters": len(names),
        "refusal": refusal,
    }


def main(out: str, layouts: str, *families: str) -> None:
    place = launch.from_environment()
    quiet_libraries()
    device = enter(place)
    results = {}
    for name in layouts.split(","):
        layout, _, spread = name.partition(" ")
        layout = "packed" if layout == "spread" else layout
        here = Path(out).parent, place.rank, place.world_size, device, layout, int(spread or 1)
        results[name] = {family: check(family, *here) for family in families}
    if place.is_first:
        Path(out).write_text(json.dumps(results))
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
    end(0)
