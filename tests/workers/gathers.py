"""One rank: which parameters DeepSpeed keeps from forward to backward once it knows a step: gathers.py OUT."""

import json
import sys
from pathlib import Path

from dpo_ds.__main__ import end
from dpo_ds.batch import packed_batch
from dpo_ds.cluster import launch
from dpo_ds.cluster.process_group import enter, leave, quiet_libraries
from dpo_ds.config import ModelSection, TrainSection
from dpo_ds.config.deepspeed import Machine, fill_policy
from dpo_ds.demo.tiny import random_model, tiny_config
from dpo_ds.models.causal_lm import LogProbModel
from dpo_ds.models.checks import settle_layout
from dpo_ds.models.engine import Policy
from dpo_ds.models.loading import load_causal_lm
from tests.tiny import VOCAB, random_pairs


def main(out: str) -> None:
    place = launch.from_environment()
    quiet_libraries()
    device = enter(place)
    path = str(Path(out).parent / "model")
    random_model(tiny_config("llama", VOCAB)).save_pretrained(path)
    given = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    config, _ = fill_policy(given, "test", TrainSection(global_batch_size=4), Machine(1, "cpu", False), 64)
    policy = Policy(LogProbModel(load_causal_lm(ModelSection(path=path), config)), config, device)
    assert settle_layout("packed", [policy]) == ("packed", "")
    batch = packed_batch(random_pairs(4))
    kept = []
    for _ in range(4):
        logps = policy.token_logps(batch)
        kept.append(sum(parameter.ds_status.name == "AVAILABLE" for parameter in policy.causal_lm.parameters()))
        policy.backward(logps.sum(), is_last=True)
        policy.step(1e-3)
    Path(out).write_text(json.dumps({"kept": kept, "parameters": len(list(policy.causal_lm.parameters()))}))
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
    end(0)
