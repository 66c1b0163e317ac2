"""Where a benchmark runs: the machine and the versions on it. Light: torch is all that it imports."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as dpo-ds does before it imports torch
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking for a GPU must not touch it before jobs.py forks
import torch  # noqa: E402

import dpo_ds  # noqa: E402

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else deepspeed warns that it found nothing better
PACKAGES = ("torch", "triton", "deepspeed", "transformers", "trl", "liger-kernel", "flash-attn-4")


def environment() -> dict:
    """Device, cores, load and versions; it touches the GPU, so a process that forks others leaves it to one of them."""
    if HAS_GPU:
        device, memory = torch.cuda.get_device_name(), torch.cuda.mem_get_info()[1]
    else:
        cpus = (line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
        device, memory = next(cpus, platform.processor()), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    machine = {"device": device, "memory_gib": round(memory / 2**30, 1), "cores": os.cpu_count()}
    machine |= {"load_before": os.getloadavg()[0], "python": sys.version.split()[0], "dpo-ds": dpo_ds.__version__}
    return machine | {package: _version(package) for package in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
