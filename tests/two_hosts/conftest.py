"""The services, started once; where they cannot be, every test here skips and says why."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.small_jobs import make_world
from tests.two_hosts import hosts as namespaces
from tests.two_hosts import slurm as slurm_services
from tests.two_hosts import ssh as ssh_services


@pytest.fixture(scope="session")
def world() -> Iterator[Path]:
    """A folder that both hosts see; short, as it is part of the names of sockets."""
    folder = Path(tempfile.mkdtemp(prefix="dpo_ds-", dir="/tmp"))
    folder.chmod(0o755)
    yield make_world(folder)
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def hosts(world) -> Iterator[dict[str, namespaces.Host]]:
    if reason := namespaces.missing():
        pytest.skip(reason)
    with namespaces.two_hosts(world) as both:
        yield both


@pytest.fixture(scope="session")
def slurm(world, hosts) -> Iterator[slurm_services.Slurm]:
    if reason := namespaces.missing(*slurm_services.PROGRAMS):
        pytest.skip(reason)
    folder = world / "slurm"
    folder.mkdir()
    with slurm_services.slurm(folder, hosts) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def ssh(world, hosts) -> dict[str, namespaces.Host]:
    """The hosts, with sshd on both."""
    if reason := namespaces.missing(*ssh_services.PROGRAMS):
        pytest.skip(reason)
    folder = world / "ssh"
    folder.mkdir()
    ssh_services.start(folder, hosts)
    return hosts
