"""Compares what every rank runs, and knows some versions that were found broken."""

from __future__ import annotations

import platform
import socket
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from packaging.version import Version

from dpo_ds.cluster import collectives, rendezvous
from dpo_ds.commands.doctor.report import FAIL, PASS, WARN, Finding

VERSIONS = "versions"
DRIVER = Path("/proc/driver/nvidia/version")
REMEDY = "install the same on every node (pip install -c constraints.txt), or use one environment that all nodes mount"


class Broken(NamedTuple):
    """A version, or a range of them, that does harm, with where that is told."""

    package: str
    is_in: Callable[[Version], bool]
    harm: str
    link: str


BROKEN = (
    Broken("NCCL", lambda v: v == Version("2.29.2"), "can hang", "https://github.com/pytorch/pytorch/pull/174338"),
    Broken(
        "NCCL", lambda v: Version("2.26.0") <= v < Version("2.26.2"), "can hang when a communicator is aborted",
        "https://github.com/pytorch/pytorch/pull/149546",
    ),
    Broken(
        "deepspeed", lambda v: v == Version("0.14.3"), "gives gradients of zero",
        "https://github.com/deepspeedai/DeepSpeed/issues/5692",
    ),
)  # fmt: skip


def of_this_rank() -> dict[str, str]:
    """Returns what this rank runs, by name; `host` is where."""
    found = {"host": socket.gethostname(), "python": platform.python_version(), **rendezvous.code()}
    found["datasets"] = version("datasets")
    if torch.cuda.is_available():
        found["CUDA"] = str(torch.version.cuda)
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        found["GPU"] = torch.cuda.get_device_name()
    if DRIVER.is_file():
        words = DRIVER.read_text().split()
        found["driver"] = next((word for word in words if word[0].isdigit()), "unknown")
    return found


def judge(of_ranks: Sequence[Mapping[str, str]]) -> list[Finding]:
    """Names what differs between ranks, with rank and host, and what is known to be broken."""
    findings = []
    for what in dict.fromkeys(name for found in of_ranks for name in found if name != "host"):
        values = [found.get(what, "not there") for found in of_ranks]
        usual, count = Counter(values).most_common(1)[0]
        others = [
            f"{value} on {found['host']} (rank {rank})"
            for rank, (value, found) in enumerate(zip(values, of_ranks, strict=True))
            if value != usual
        ]
        if others:
            more = f" and {len(others) - 4} more" if len(others) > 4 else ""
            text = f"{what} is {', '.join(others[:4])}{more}, {usual} on {count} others"
            findings.append(Finding(VERSIONS, FAIL, text, REMEDY))
    for broken in BROKEN:
        here = of_ranks[0].get(broken.package)
        if here is not None and broken.is_in(Version(here)):
            text = f"{broken.package} {here} {broken.harm}"
            findings.append(Finding(VERSIONS, WARN, text, f"take another; see {broken.link}"))
    if not findings:
        first = of_ranks[0]
        text = ", ".join(f"{name} {value}" for name, value in first.items() if name != "host")
        ranks = f"{len(of_ranks)} rank{'s' * (len(of_ranks) > 1)}"
        findings.append(Finding(VERSIONS, PASS, f"the same on {ranks}: {text}", figures=dict(first)))
    return findings


def check() -> list[Finding]:
    """All ranks enter."""
    return judge(collectives.gather_objects(of_this_rank()))
