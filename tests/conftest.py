"""Fixtures that test files share."""

import os

import pytest
import torch

from tests.forkserver import fork_server

if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else deepspeed warns on a terminal that some tests read


@pytest.fixture(autouse=True)
def environment_is_restored():
    """Takes back what a command called in this process wrote into the environment (RANK, MASTER_ADDR, ...): a later
    test's launcher would hand it to its ranks.
    """
    before = os.environ.copy()
    yield
    if os.environ.copy() != before:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="session")
def forks():
    """Starts ranks in a second or two each; see forkserver.py."""
    with fork_server() as server:
        yield server
