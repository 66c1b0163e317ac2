"""Enters and leaves the group of all ranks, quiets the libraries, and lets rank 0 alone speak.

torch comes in with this module; deepspeed and transformers only inside the functions that need them, after every check.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist

from dpo_ds.cluster import collectives, rendezvous
from dpo_ds.cluster.launch import Launch, complete_environment
from dpo_ds.config.deepspeed import Machine
from dpo_ds.errors import TrainingError, UserError

Say = Callable[[Iterable[str]], None]


def speaker(launch: Launch) -> Say:
    """Returns what prints lines on rank 0 and nothing elsewhere."""

    def say(lines: Iterable[str]) -> None:
        if launch.is_first:
            for line in lines:
                print(f"dpo-ds: {line}", flush=True)

    return say


def this_machine(launch: Launch) -> Machine:
    """Returns what DeepSpeed's configuration depends on: the number of ranks, their device, whether it has bf16."""
    has_bf16 = on_gpu() and torch.cuda.is_bf16_supported()
    return Machine(launch.world_size, "cuda" if on_gpu() else "cpu", has_bf16)


def on_gpu() -> bool:
    """Tells whether this process computes on a GPU; DS_ACCELERATOR=cpu leaves one alone that is there."""
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"


@contextlib.contextmanager
def process_group(launch: Launch) -> Iterator[torch.device]:
    """Gives this rank's device, in the group of all ranks, who enter together; who fails alone ends all of them."""
    try:
        yield enter(launch)
    except (UserError, TrainingError):  # every rank has it, and rank 0 says so
        raise
    except Exception as fault:
        rendezvous.peers().fault(fault)
        raise
    finally:
        leave()


def enter(launch: Launch) -> torch.device:
    """Joins the process group and returns this rank's device. All ranks enter."""
    import deepspeed
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator

    complete_environment(launch)
    rendezvous.wait_for_all()
    torch.set_num_threads(launch.threads)
    if get_accelerator().device_name() == "cpu":
        # Built with ninja and a compiler inside init_distributed otherwise; gloo gives the same bits.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # The deepspeed program sets it; where it is missing, DeepSpeed starts numactl at every reduction to count them.
        os.environ.setdefault("LOCAL_SIZE", str(launch.local_world_size))
        device = torch.device("cpu")
    else:
        get_accelerator().set_device(launch.local_rank)
        device = torch.device(get_accelerator().device_name(launch.local_rank))
    deepspeed.init_distributed(timeout=collectives.TIMEOUT, verbose=False, auto_mpi_discovery=False)
    return device


def leave() -> None:
    """Leaves the process group; without this a rank can abort at exit after a run that was fine."""
    if dist.is_initialized():
        dist.destroy_process_group()


def quiet_libraries() -> None:
    """Switches chatter, progress bars and deprecations of the libraries off, unless DPO_DS_VERBOSE asks for them. To be
    called as a command starts: transformers imports deepspeed where it likes.
    """
    if os.environ.get("DPO_DS_VERBOSE"):
        return
    import transformers

    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else deepspeed warns that it found nothing better
    # Torch 2.13's profiler tells of its begin and end at 5, USDT, which is above its errors (pytorch/kineto#1325).
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)  # on what layers/selective asks of torch
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for caller in ("torch", "transformers", "deepspeed"):  # they call what each other will rename
        warnings.filterwarnings("ignore", category=FutureWarning, module=caller)
    # DeepSpeed binds several ranks to their devices, which spares them this warning, but not a single rank, for which
    # NCCL can then fail (https://github.com/deepspeedai/DeepSpeed/issues/8248). The device it means is `enter`'s.
    warnings.filterwarnings("ignore", message=r"barrier\(\): using the device under current context")
