"""What DeepSpeed 0.19.8's stage 3 makes of a model's parameters: a rank's part, what is whole for a while, defaults.

By its source: runtime/zero/stage3.py, partition_parameters.py, partitioned_param_coordinator.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import groupby

from dpo_ds.memory.fetching import Coordinator, Limits, Use
from dpo_ds.memory.trace import Parameter

GATHERED = "weights gathered for a while"
PHASES = "forward", "head", "layers"
DEFAULTS = {  # DeepSpeedZeroConfig's, kept equal by a test
    "reduce_bucket_size": 500_000_000,
    "sub_group_size": 1_000_000_000,
    "prefetch_bucket_size": 50_000_000,
    "param_persistence_threshold": 100_000,
    "max_live_parameters": 1_000_000_000,
    "max_reuse_distance": 1_000_000_000,
    "contiguous_gradients": True,
    "zero_hpz_partition_size": 1,
}
NVME_PARAM = {"buffer_count": 5, "buffer_size": 100_000_000, "max_in_cpu": 1_000_000_000}
NVME_OPTIMIZER = {"buffer_count": 4}


def gathered(
    found: list[Parameter], zero: dict, width: int, ranks: int, *, recomputes: bool = False, is_classifier: bool = False
) -> dict[str, dict[str, int]]:
    """Returns bytes of weights that are whole for a while, in each phase of trace.peaks: "forward", and in training
    "head", the backward of what comes behind the decoder layers, and "layers", of all else.

    recomputes: layers run again in their backward. is_classifier: no head is tied to the embedding.
    """
    if ranks == 1 and device_of(zero, "offload_param") == "none":
        return {phase: {} for phase in PHASES}
    large = [p for p in found if p.numel > setting(zero, "param_persistence_threshold")]
    names = "prefetch_bucket_size", "max_live_parameters", "max_reuse_distance"
    limits = Limits(*(int(setting(zero, name)) for name in names))
    uses = list(_uses(large, recomputes, is_classifier))
    most = Coordinator(uses, [p.numel for p in large], limits).peaks()
    return {
        phase: {GATHERED: width * whole, "their transfer buffer": width * buffers}
        for phase, (whole, buffers) in ((phase, most.get(phase, (0, 0))) for phase in PHASES)
    }


def _uses(found: list[Parameter], recomputes: bool, is_classifier: bool) -> Iterator[Use]:
    """Yields the modules of these weights in the order in which a step reaches them."""
    layers = [
        tuple(number for number, _ in group)
        for layer, group in groupby(enumerate(found), lambda item: item[1].layer)
        if layer is not None
    ]
    first, last = (layers[0][0], layers[-1][-1]) if layers else (1, len(found) - 2)
    alone = [(number,) for number in range(len(found))]
    before, after = alone[:first], alone[last + 1 :]
    inner = layers or alone[first : last + 1]
    if not after and not is_classifier:
        after = before[:1]  # the head is the embedding
    trains = any(p.is_trained for p in found)
    for module in (*before, *inner, *after):
        yield Use("forward", module, len(module) > 1)
    if not trains:
        return
    for module in reversed(after):
        yield Use("head", module, False)
    for module in reversed(inner):
        for _ in range(1 + recomputes):
            yield Use("layers", module, len(module) > 1)
    for module in reversed(before):
        if found[module[0]].is_trained:
            yield Use("layers", module, False)


def subgroups(trained: list[Parameter], size: int, ranks: int) -> list[int]:
    """Elements of a rank in each of DeepSpeed's sub-groups: matrices first, then vectors (engine.parameter_groups)."""
    found = []
    for is_matrix in (True, False):
        shards = [math.ceil(p.numel / ranks) for p in trained if p.is_matrix == is_matrix]
        total = 0
        for elements in shards:
            total += elements
            if total >= size:
                found.append(total)
                total = 0
        found += [total] * (total > 0)
    return found


def shard(found: list[Parameter], ranks: int) -> int:
    return sum(math.ceil(p.numel / ranks) for p in found)


def setting(zero: dict, name: str):
    return zero.get(f"stage3_{name}", zero.get(name, DEFAULTS[name]))


def device_of(zero: dict, section: str) -> str:
    return zero.get(section, {}).get("device", "none")


def width_of(name: str | None, default: int) -> int:
    return default if name is None else {"fp32": 4, "float32": 4, "float": 4}.get(name, 2)


def pinned(size: int) -> int:
    """torch's allocator of pinned memory takes powers of two."""
    return 1 << (size - 1).bit_length() if size else 0
