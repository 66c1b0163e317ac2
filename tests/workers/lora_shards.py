"""What ZeRO-3 keeps on a rank of a model with adapters: main(MODEL, OUT) writes rank 0's view of it as JSON."""

import json
import math
import sys
from pathlib import Path

from dpo_ds.__main__ import end
from dpo_ds.cluster import launch
from dpo_ds.cluster.process_group import enter, leave
from dpo_ds.config import LoraSection, ModelSection, TrainSection
from dpo_ds.config.deepspeed import Machine, fill_policy
from dpo_ds.models import lora
from dpo_ds.models.causal_lm import LogProbModel
from dpo_ds.models.engine import Policy
from dpo_ds.models.loading import load_causal_lm


def main(model: str, out: str) -> None:
    place = launch.from_environment()
    device = enter(place)
    given = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    config, _ = fill_policy(given, "test", TrainSection(), Machine(place.world_size, "cpu", False), 32)
    causal_lm = load_causal_lm(ModelSection(path=model), config)
    lora.add_adapters(causal_lm, LoraSection(r=4), seed=0)
    policy = Policy(LogProbModel(causal_lm), config, device)
    parameters = dict(policy.causal_lm.named_parameters())
    trained = lora.trained(policy.causal_lm)
    share = {name: math.ceil(parameter.ds_numel / place.world_size) for name, parameter in parameters.items()}
    result = {
        "whole": [n for n, p in parameters.items() if p.ds_tensor.numel() != share[n] or p.numel()],
        "trained": len(trained),
        "frozen": len(parameters) - len(trained),
        "trained_elements": sum(parameter.ds_numel for parameter in trained.values()),
        "adam_elements": sum(flat.numel() for flat in policy.engine.optimizer.fp32_partitioned_groups_flat),
    }
    if place.is_first:
        Path(out).write_text(json.dumps(result))
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
    end(0)
