"""Two ranks: two steps of DPO with each DeepSpeed file, reference derived from it: ds_files.py OUT FILE...

Files named *moe* train a mixture of experts. In the second step rank 1 has no pair left: it runs one token through two
experts while rank 0 uses them all. Rank 0 writes to OUT what both ranks saw.
"""

import json
import sys
from pathlib import Path

import torch.distributed as dist
from deepspeed.utils import get_z3_leaf_modules
from transformers import AutoConfig

from dpo_ds.__main__ import end
from dpo_ds.batch import packed_batch
from dpo_ds.cluster import launch
from dpo_ds.cluster.process_group import enter, leave, quiet_libraries
from dpo_ds.config import ModelSection, TrainSection
from dpo_ds.config.deepspeed import Machine, fill_policy, fill_reference, read
from dpo_ds.demo.tiny import tiny_config
from dpo_ds.losses import DPO
from dpo_ds.models import attention
from dpo_ds.models.causal_lm import LogProbModel
from dpo_ds.models.engine import Policy, load_frozen
from dpo_ds.models.loading import load_causal_lm
from tests.tiny import VOCAB, random_pairs

EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


def two_steps(path: str, folder: Path, device) -> dict:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    is_moe = "moe" in Path(path).name
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": VOCAB}
    config = AutoConfig.for_model("mixtral", **sizes, **EXPERTS) if is_moe else tiny_config("llama", VOCAB, hidden=32)
    model_path = folder / Path(path).stem
    if rank == 0:
        config.save_pretrained(model_path)
    dist.barrier()
    run, machine = TrainSection(learning_rate=1e-2, global_batch_size=8), Machine(ranks, "cpu", False)
    policy_config, _ = fill_policy(read(path), path, run, machine, 32)
    reference_config, _ = fill_reference(read(path), path, machine, 32)
    section = ModelSection(path=str(model_path), from_config=True)
    policy = Policy(LogProbModel(load_causal_lm(section, policy_config)), policy_config, device)
    reference = load_frozen(section, reference_config, device)
    for model in (policy, reference):
        attention.use_packed_attention(model.causal_lm)
    losses, norms = [], []
    for step in range(2):
        pairs = random_pairs(4, seed=rank) if step == 0 or rank == 0 else []
        batch = packed_batch(pairs)
        logps = [batch.pair_logps(model.token_logps(batch)) for model in (policy, reference)]
        loss = DPO()(*logps).sum() * ranks / (8 if step == 0 else 4)
        policy.backward(loss, is_last=True)
        copies = [_second_copies(model) for model in (policy, reference)]  # until the next update
        norms.append(policy.step(run.learning_rate))
        dist.all_reduce(loss := loss.detach() / ranks)
        losses.append(loss.item())
    zero = policy.engine.config["zero_optimization"]
    return {
        "losses": losses,
        "norms": norms,
        "dtype": str(next(policy.causal_lm.parameters()).dtype),
        "leaves": len(get_z3_leaf_modules(policy.engine.module)),
        "second copies": copies,
        "offloaded": {name: zero[name]["device"] for name in ("offload_param", "offload_optimizer") if name in zero},
        "finite": all(p.ds_tensor.isfinite().all().item() for p in policy.causal_lm.parameters()),
    }


def _second_copies(model) -> int:
    """Parameters of which hpZ keeps a copy within the node."""
    return sum(p.ds_secondary_tensor is not None for p in model.causal_lm.parameters())


def main(out: str, *files: str) -> None:
    place = launch.from_environment()
    quiet_libraries()
    device = enter(place)
    found = {Path(path).name: two_steps(path, Path(out).parent, device) for path in files}
    everyones: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, found)
    if place.is_first:
        Path(out).write_text(json.dumps(everyones))
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
    end(0)
