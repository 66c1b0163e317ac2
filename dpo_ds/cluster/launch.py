"""Which rank this process is, read from the environment that the launcher leaves; no torch, no deepspeed.

deepspeed and torchrun set RANK, WORLD_SIZE, LOCAL_RANK and MASTER_*. srun sets its own names, translated here, so that
`srun python -m dpo_ds ...` works by itself. A process that nobody launched is alone.
"""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass

from dpo_ds.errors import ConfigError


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
        """CPU threads for this rank: the node's cores shared evenly, or those that srun has bound it to."""
        cores, env = len(os.sched_getaffinity(0)), os.environ
        if _in_srun() and cores < int(env.get("SLURM_CPUS_ON_NODE", "0")) and self.local_world_size == _slurm_tasks():
            return cores
        return max(1, cores // self.local_world_size)


def from_environment() -> Launch:
    """The launcher's rank, Slurm's if srun started us, else one process.

    Raises:
        ConfigError: a variable that should be a number is none.
    """
    env = os.environ
    try:
        if "RANK" in env and "WORLD_SIZE" in env:
            local = env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or env["WORLD_SIZE"]  # torchrun, deepspeed
            return Launch(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", "0")), int(local))
        if _in_srun():
            return Launch(
                int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"]), int(env["SLURM_LOCALID"]), _slurm_tasks()
            )
    except ValueError as error:
        raise ConfigError(f"the launcher's environment is not usable: {error}") from None
    return Launch(0, 1, 0, 1)


def complete_environment(launch: Launch) -> None:
    """Sets what torch.distributed reads; without it DeepSpeed looks for mpi4py in a process that no launcher
    started.
    """
    env = os.environ
    env.setdefault("RANK", str(launch.rank))
    env.setdefault("WORLD_SIZE", str(launch.world_size))
    env.setdefault("LOCAL_RANK", str(launch.local_rank))
    env.setdefault("LOCAL_WORLD_SIZE", str(launch.local_world_size))  # from_environment is asked again
    if _in_srun():  # every task must come to the same address and port without a word between them
        env.setdefault("MASTER_ADDR", first_host(env["SLURM_STEP_NODELIST"]))
        job, step = int(env["SLURM_JOB_ID"]), int(env["SLURM_STEP_ID"])
        env.setdefault("MASTER_PORT", str(20000 + (job * 97 + step) % 12000))
    env.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in env:
        env["MASTER_PORT"] = str(free_port())


def _in_srun() -> bool:
    """More than one task of an srun step; a batch script itself has no step variables."""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "SLURM_PROCID" in os.environ


def _slurm_tasks() -> int:
    """Of the srun step on this node; with torchrun as the task, fewer than ranks."""
    return tasks_on_node(os.environ["SLURM_STEP_TASKS_PER_NODE"], int(os.environ["SLURM_NODEID"]))


def tasks_on_node(tasks_per_node: str, node: int) -> int:
    """Tasks on the node-th host of Slurm's list: "4(x2),1" is 4, 4, 1."""
    counts = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks_per_node):
        counts += [int(count)] * int(times or 1)
    return counts[node]


def first_host(nodelist: str) -> str:
    """The first host of Slurm's compressed list: "gpu[07-09,12],login" is gpu07."""
    prefix, numbers = re.match(r"([^\[,]+)(?:\[([^\]]+)\])?", nodelist).groups()
    return prefix + (re.split("[-,]", numbers)[0] if numbers else "")


def free_port() -> int:
    """A TCP port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
