"""What DeepSpeed 0.19.8's stage 3 makes of a model's parameters: a rank's part, what is whole for a while, defaults.

By its source: runtime/zero/stage3.py, partition_parameters.py, partitioned_param_coordinator.py.
"""

from __future__ import annotations

import math
from itertools import groupby

from dpo_ds.memory.trace import Parameter

GATHERED = "weights gathered for a while"
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


def gathered(found: list[Parameter], zero: dict, width: int, ranks: int) -> dict[str, int]:
    """Weights that are whole for a while. Prefetching goes on until max_live_parameters are; those that will be needed
    again within max_reuse_distance are not given back; one layer (one parameter elsewhere) more is always fetched.

    What is fetched together comes in one buffer, which stays until the last of it was used, beside the copies.
    """
    if ranks == 1 and device_of(zero, "offload_param") == "none":
        return {}
    large = [p for p in found if p.numel > setting(zero, "param_persistence_threshold")]
    sizes = [p.numel for p in large]
    units = groupby(large, lambda p: id(p) if p.layer is None else p.layer)
    most = max((sum(p.numel for p in unit) for _, unit in units), default=0)
    limit = max(setting(zero, "max_live_parameters"), setting(zero, "max_reuse_distance")) + most
    fetch = most if most > max(sizes, default=0) else 0  # a single parameter needs no buffer
    for start in range(len(sizes)):
        total = count = 0
        while total < setting(zero, "prefetch_bucket_size") and start + count < len(sizes):
            total += sizes[start + count]
            count += 1
        if count > 1:
            fetch = max(fetch, total)
    return {
        GATHERED: int(width * min(sum(sizes), limit)),
        "their transfer buffer": int(width * fetch),
    }


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
