"""Two hosts on one machine: Linux namespaces of their own for network, host name and /etc/hosts, joined by one cable.

Processes and files are shared, as on a cluster with a shared file system. Needs root and iproute2.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.ranks import ROOT

ADDRESSES = {"alpha": "10.213.47.1", "beta": "10.213.47.2"}
UP = 'hostname "$1" && mount --bind "$2" /etc/hosts && ip link set lo up && echo up && exec sleep infinity'


@dataclass(frozen=True)
class Host:
    """Runs commands as if logged in there."""

    name: str
    address: str
    cpu: int  # of the machine: ranks of two hosts must not crowd each other's
    holder: subprocess.Popen  # keeps the namespaces alive

    def inside(self, *command: str, cwd: Path = ROOT) -> list[str]:
        enter = ["nsenter", f"--target={self.holder.pid}", "--net", "--uts", "--mount", f"--wdns={cwd}", "--"]
        return [*enter, "taskset", "--cpu-list", str(self.cpu), *map(str, command)]

    def start(self, *command: str, cwd: Path = ROOT, **settings) -> subprocess.Popen:
        return subprocess.Popen(self.inside(*command, cwd=cwd), **settings)

    def run(self, *command: str, cwd: Path = ROOT, timeout: float = 60, **settings) -> subprocess.CompletedProcess:
        command = self.inside(*command, cwd=cwd)
        return subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL, **settings
        )

    def processes(self) -> list[int]:
        """Every process of this host but its holder."""
        here, found = _network(self.holder.pid), []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != self.holder.pid and _network(int(entry.name)) == here:
                found.append(int(entry.name))
        return found

    def kill_all(self) -> None:
        """What a power cut does to the host's processes."""
        while pids := self.processes():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    def cable(self, state: str) -> None:
        """state: up or down."""
        subprocess.run(self.inside("ip", "link", "set", "cable", state), check=True)


def environment(**more: str) -> dict[str, str]:
    """Of a user who has logged in to use this checkout, on a CPU."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "PYTEST_"))}
    return kept | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "LC_ALL": "C.UTF-8",
        "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **more,
    }  # fmt: skip


def minute() -> float:
    """60 seconds of an idle machine: more where its processors are shared with other work."""
    return 60 * max(1.0, os.getloadavg()[0] / os.cpu_count())


def missing(*programs: str) -> str:
    """Why there can be no hosts here, or ""."""
    if os.geteuid() != 0:
        return "needs root, for network namespaces and the services"
    absent = [name for name in ("unshare", "nsenter", "taskset", "ip", *programs) if shutil.which(name) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (make test-cluster installs them)"
    probe = ["unshare", "--net", "--uts", "--mount", "ip", "link", "add", "veth1", "type", "veth"]
    probe = subprocess.run(probe, capture_output=True, text=True)
    return f"no network namespaces here: {probe.stderr.strip()}" if probe.returncode else ""


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[dict[str, Host]]:
    """alpha and beta; everything that still runs in them at the end is killed."""
    table = folder / "etc-hosts"
    names = "".join(f"{address} {name}\n" for name, address in ADDRESSES.items())
    table.write_text(f"127.0.0.1 localhost\n{names}")
    hosts, cpus = {}, sorted(os.sched_getaffinity(0))
    try:
        for i, (name, address) in enumerate(ADDRESSES.items()):
            command = ["unshare", "--net", "--uts", "--mount", "sh", "-c", UP, "sh", name, str(table)]
            holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            hosts[name] = Host(name, address, cpus[i % len(cpus)], holder)
            assert holder.stdout.readline() == "up\n"
        first, second = hosts.values()
        peer = ["peer", "name", "cable", "netns", str(second.holder.pid)]
        subprocess.run(first.inside("ip", "link", "add", "cable", "type", "veth", *peer), check=True)
        for host in hosts.values():
            subprocess.run(host.inside("ip", "address", "add", f"{host.address}/24", "dev", "cable"), check=True)
            host.cable("up")
        yield hosts
    finally:
        for host in hosts.values():
            host.kill_all()
            host.holder.kill()
            host.holder.wait()


def _network(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/net")
    except OSError:  # it has ended
        return ""
