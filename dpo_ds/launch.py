"""Which rank this process is, read from the environment that the launcher leaves; no torch, no deepspeed."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """rank of world_size over all nodes; local_rank of local_world_size on this node."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_first_on_node(self) -> bool:
        return self.local_rank == 0

    @property
    def threads(self) -> int:
        """CPU threads for this rank: the node's cores shared evenly."""
        return max(1, len(os.sched_getaffinity(0)) // self.local_world_size)


def from_environment() -> Launch:
    """The launcher's RANK, WORLD_SIZE, LOCAL_RANK; one process when none started us."""
    env = os.environ
    if "RANK" not in env or "WORLD_SIZE" not in env:
        return Launch(0, 1, 0, 1)
    world_size = int(env["WORLD_SIZE"])
    local = env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or str(world_size)  # torchrun's name, deepspeed's name
    return Launch(int(env["RANK"]), world_size, int(env.get("LOCAL_RANK", "0")), int(local))


def complete_environment(launch: Launch) -> None:
    """Sets what torch.distributed reads; without it DeepSpeed looks for mpi4py in a process that no launcher
    started.
    """
    os.environ.setdefault("RANK", str(launch.rank))
    os.environ.setdefault("WORLD_SIZE", str(launch.world_size))
    os.environ.setdefault("LOCAL_RANK", str(launch.local_rank))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(free_port())


def free_port() -> int:
    """A TCP port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
