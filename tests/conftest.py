"""Fixtures that test files share."""

import pytest

from tests.forkserver import fork_server


@pytest.fixture(scope="session")
def forks():
    """Starts ranks in a second or two each; see forkserver.py."""
    with fork_server() as server:
        yield server
