"""Reads and checks which rank this process is, as the launcher's environment says; no torch, no deepspeed.

deepspeed and torchrun set RANK, WORLD_SIZE, LOCAL_RANK and MASTER_*. srun sets its own names, translated here, so that
`srun python -m dpo_ds ...` works by itself. A process that nobody launched is alone.
"""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path

from dpo_ds.errors import ConfigError

LARGEST = 1 << 20  # ranks; more is a typing mistake
# srun sets all of these for every task; SLURM_TASK_PID too, which containers may not have.
SRUN = (
    "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_JOB_ID", "SLURM_STEP_ID",
    "SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NODELIST",
)  # fmt: skip


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
        cores = len(os.sched_getaffinity(0))
        if srun_mistake() is None and cores < _number("SLURM_CPUS_ON_NODE", 0, default=0):
            if self.local_world_size == _slurm_tasks():
                return cores
        return max(1, cores // self.local_world_size)


ALONE = Launch(0, 1, 0, 1)


def from_environment() -> Launch:
    """Returns the launcher's rank, Slurm's if srun started this process, else that of a process alone.

    Raises:
        ConfigError: a variable with a value that cannot be, or one missing; the message names it.
    """
    env = os.environ
    if env.get("RANK", "0") != "0" or env.get("WORLD_SIZE", "1") != "1" or {"RANK", "WORLD_SIZE"} <= env.keys():
        return _of_launcher()
    if srun_mistake() is None:
        if env["SLURM_STEP_NUM_TASKS"] == "1":  # a batch script or torchrun in one task
            return ALONE
        ranks = _number("SLURM_STEP_NUM_TASKS", 1, LARGEST)
        rank = _number("SLURM_PROCID", 0, ranks - 1, f"srun started {ranks} tasks")
        local_world_size = _slurm_tasks()
        return Launch(rank, ranks, _number("SLURM_LOCALID", 0, local_world_size - 1), local_world_size)
    return ALONE


def _of_launcher() -> Launch:
    """Returns what RANK and its companions say, each checked against the others."""
    ranks = _number("WORLD_SIZE", 1, LARGEST)
    rank = _number("RANK", 0, ranks - 1, f"WORLD_SIZE is {ranks}")
    # torchrun says LOCAL_WORLD_SIZE, deepspeed LOCAL_SIZE.
    named = next((name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if os.environ.get(name)), None)
    here = ranks if named is None else _number(named, 1, LARGEST)
    local = _number("LOCAL_RANK", 0, here - 1, f"{named or 'WORLD_SIZE'} is {here}", default=0)
    if ranks > 1:
        if not os.environ.get("MASTER_ADDR", "").strip():
            raise ConfigError(f"MASTER_ADDR is not set: all {ranks} ranks meet on rank 0's host; {START}")
        _number("MASTER_PORT", 1, 65535)
    return Launch(rank, ranks, local, here)


START = "start with deepspeed, torchrun or srun, or unset RANK and WORLD_SIZE"


def _number(name: str, least: int, most: int | None = None, because: str = "", default: int | None = None) -> int:
    """Returns the variable `name` as a number from `least` to `most`."""
    text = os.environ.get(name, "")
    if not text and default is not None:
        return default
    if not text:
        raise ConfigError(f"{name} is not set, and other variables of a launcher are; {START}")
    value = int(text) if re.fullmatch(r"-?[0-9]{1,18}", text) else None
    if value is None or value < least or (most is not None and value > most):
        bounds = f"from {least} to {most}" if most is not None else f"of at least {least}"
        because = f" ({because})" if because else ""
        raise ConfigError(f"{name} is {text!r}, which is no number {bounds}{because}; {START}")
    return value


def notes() -> list[str]:
    """Returns a line on each variable that is set and means nothing here."""
    env = os.environ
    if "RANK" in env or from_environment() != ALONE:
        return []
    lines = []
    if (mistake := srun_mistake()) and _number("SLURM_STEP_NUM_TASKS", 0, default=1) > 1:
        lines.append(f"{mistake}: Slurm's variables are ignored, this process is alone; srun starts several")
    if "MASTER_ADDR" in env:
        lines.append(f"MASTER_ADDR {env['MASTER_ADDR']} is ignored: no launcher started this process, it is alone")
    return lines


def srun_mistake() -> str | None:
    """Returns why this process is no task of an srun step; None where it is one.

    Raises:
        ConfigError: it is one, as its parents show, and a variable is missing.
    """
    env = os.environ
    if "SLURM_PROCID" not in env or "SLURM_STEP_NUM_TASKS" not in env:  # a batch script itself has no step
        return "SLURM_PROCID and SLURM_STEP_NUM_TASKS are not both set"
    if "SLURM_PTY_PORT" in env or "SLURM_PTY_WIN_COL" in env:
        return f"SLURM_PROCID {env['SLURM_PROCID']} is of an interactive shell"
    task = env.get("SLURM_TASK_PID")
    if task is not None and task not in (ancestors := _ancestors()) and not _in_container(ancestors[-1]):
        return f"SLURM_TASK_PID {task} is no parent of this process"
    if missing := [name for name in SRUN if name not in env]:
        if task is None:
            return f"{missing[0]} is not set, SLURM_PROCID {env['SLURM_PROCID']} is"
        raise ConfigError(f"{missing[0]} is not set, though srun started this process and sets {', '.join(SRUN)}")
    return None


def _ancestors() -> list[str]:
    """Returns the process ids of this process, its parent, and so on up to the first that can be seen."""
    found, pid = [], os.getpid()
    while pid:
        found.append(str(pid))
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            break
        pid = int(stat.rpartition(")")[2].split()[1])  # the program's name, in brackets, may hold anything
    return found


def _in_container(first: str) -> bool:
    """Tells whether process ids are a container's, which Slurm's are not: its first process is of the step already."""
    try:
        return b"SLURM_PROCID=" in Path(f"/proc/{first}/environ").read_bytes()
    except OSError:  # another user's
        return first != "1"


def complete_environment(launch: Launch) -> None:
    """Sets what torch.distributed reads; without it DeepSpeed looks for mpi4py in a process that no launcher
    started.
    """
    env = os.environ
    is_srun = "RANK" not in env and launch != ALONE
    env["RANK"], env["WORLD_SIZE"] = str(launch.rank), str(launch.world_size)
    env.setdefault("LOCAL_RANK", str(launch.local_rank))
    env.setdefault("LOCAL_WORLD_SIZE", str(launch.local_world_size))  # from_environment is asked again
    if launch.world_size == 1:  # nobody to meet: what is set may be left over, and its port in use
        if env.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            env["MASTER_ADDR"], env["MASTER_PORT"] = "127.0.0.1", str(free_port())
    elif is_srun:  # every task must come to the same address and port without a word between them
        env.setdefault("MASTER_ADDR", first_host(env["SLURM_STEP_NODELIST"]))
        job, step = _number("SLURM_JOB_ID", 0), _number("SLURM_STEP_ID", 0)
        env.setdefault("MASTER_PORT", str(20000 + (job * 97 + step) % 12000))
        _number("MASTER_PORT", 1, 65535)


def _slurm_tasks() -> int:
    """Returns the tasks of the srun step on this node; with torchrun as the task, fewer than ranks."""
    node = _number("SLURM_NODEID", 0, LARGEST)
    try:
        return tasks_on_node(os.environ["SLURM_STEP_TASKS_PER_NODE"], node)
    except IndexError:
        tasks = os.environ["SLURM_STEP_TASKS_PER_NODE"]
        raise ConfigError(f"SLURM_STEP_TASKS_PER_NODE {tasks!r} tells of no node {node}, SLURM_NODEID does") from None


def tasks_on_node(tasks_per_node: str, node: int) -> int:
    """Returns the tasks on the node-th host of Slurm's list: "4(x2),1" is 4, 4, 1."""
    counts = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks_per_node):
        counts += [int(count)] * int(times or 1)
    return counts[node]


def first_host(nodelist: str) -> str:
    """Returns the first host of Slurm's compressed list: "gpu[07-09,12],login" is gpu07."""
    prefix, numbers = re.match(r"([^\[,]+)(?:\[([^\]]+)\])?", nodelist).groups()
    return prefix + (re.split("[-,]", numbers)[0] if numbers else "")


def free_port() -> int:
    """Returns a TCP port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
