"""A model under ZeRO-3 and a replica leave no weights in memory: main(MODEL, DEEPSPEED_JSON)."""

import gc

import torch

from dpo_ds.cluster import launch, process_group
from dpo_ds.cluster.process_group import this_machine
from dpo_ds.config import ModelSection
from dpo_ds.config import deepspeed as ds_config
from dpo_ds.models import checks, engine
from dpo_ds.models.causal_lm import LogProbModel
from dpo_ds.models.loading import load_causal_lm


def weights_in_memory() -> int:
    """Bytes of parameters and of their slices."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if isinstance(t, torch.nn.Parameter)]
    tensors += [t.ds_tensor for t in tensors if hasattr(t, "ds_tensor")]
    return sum(t.numel() * t.element_size() for t in tensors)


def main(path: str, config: str) -> None:
    place = launch.from_environment()
    device = process_group.enter(place)
    filled, _ = ds_config.fill_reference(ds_config.read(config), config, this_machine(place), 32)
    for settings in (filled, {"bf16": {"enabled": False}}):
        model = LogProbModel(load_causal_lm(ModelSection(path=path), settings))
        is_spread = settings is filled
        model = engine.FrozenModel(model, filled, device) if is_spread else engine.Replica(model, device)
        assert checks.settle_layout("packed", [model])[0] == "packed"
        assert weights_in_memory() > 50_000
        engine.free(model)
        assert weights_in_memory() == 0
    process_group.leave()
