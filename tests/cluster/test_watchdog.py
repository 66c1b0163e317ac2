"""Who listens, who is let in, and what counts as silence; test_stopping.py has the dead ranks of real jobs."""

import contextlib
import json
import os
import signal
import socket
import threading
import time
from types import SimpleNamespace

import pytest

from dpo_ds.cluster import connection, watchdog
from dpo_ds.cluster.connection import Connection, Foreign, introduce, listen, proof
from dpo_ds.cluster.watchdog import Peer, PeerWatch
from dpo_ds.errors import ConfigError

SECRET = "of this job"


@pytest.fixture
def rank_0():
    """Rank 0 of 3 and the address where it listens."""
    listener = listen("127.0.0.1", 100)
    watch = PeerWatch(0, 3, SECRET, listener)
    yield watch, listener.getsockname()
    watch.close(code=1)


def join(address, rank: int, secret: str = SECRET) -> Connection:
    member = Connection(socket.create_connection(address, timeout=5))
    introduce(member, rank, secret)
    return member


def until(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_rank_that_knows_the_secret_is_heard(rank_0):
    watch, address = rank_0
    member = join(address, 1)
    member.send(here={"host": "beta"})
    member.send(at=[5, 3, True])
    until(lambda: watch.peers[1].ticks == 5)
    assert (watch.peers[1].host, watch.peers[1].step, watch.peers[1].waits) == ("beta", 3, True)
    member.send(bye=0)
    until(lambda: watch.peers[1].left)


STRANGERS = {
    "a scanner": b"GET / HTTP/1.0\r\n\r\n",
    "no text": b"\xff\xfe\n",
    "no object": b"[1]\n",
    "deep": b"[" * 900 + b"\n",
    "without proof": json.dumps({"rank": 1, "nonce": "0", "proof": "0"}).encode() + b"\n",
    "another job": json.dumps({"rank": 1, "nonce": "0", "proof": proof("another", "rank", 1, "0")}).encode() + b"\n",
    "rank 0 itself": json.dumps({"rank": 0, "nonce": "0", "proof": "0"}).encode() + b"\n",
    "true": json.dumps({"rank": True, "nonce": "0", "proof": "0"}).encode() + b"\n",
    "a rank's words": b'{"fault": "you are all fired"}\n',
    "an endless line": b"a" * 5000,
}


@pytest.mark.parametrize("said", STRANGERS.values(), ids=STRANGERS)
def test_who_proves_nothing_is_sent_away_and_changes_nothing(rank_0, said):
    watch, address = rank_0
    stranger = socket.create_connection(address, timeout=5)
    stranger.sendall(said)
    with contextlib.suppress(ConnectionResetError):
        while stranger.recv(4096):  # a challenge, then the end
            pass
    assert watch.mistake is None and watch.lost is None and watch.phase == watchdog.MEETING
    assert join(address, 1).rank == 0, "and the rank itself is let in"


def test_many_silent_strangers_keep_no_rank_out(rank_0):
    watch, address = rank_0
    strangers = [socket.create_connection(address, timeout=5) for _ in range(3 * connection.STRANGERS)]
    assert join(address, 2).rank == 0
    assert len(watch._connections) <= connection.STRANGERS + 1
    for stranger in strangers:
        stranger.close()


def test_strangers_have_seconds_to_prove_themselves(rank_0, monkeypatch):
    monkeypatch.setattr(connection, "PROOF_SECONDS", 0.1)
    watch, address = rank_0
    watch._beat = 0.1
    with socket.create_connection(address, timeout=20) as stranger:
        assert b"nonce" in stranger.recv(4096)
        assert stranger.recv(4096) == b""


def test_what_listens_must_prove_that_it_is_rank_0():
    """Another job's rank 0, or whoever took the port meanwhile."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer():
            other, _ = listener.accept()
            other.sendall(b'{"nonce": "1"}\n')
            other.recv(4096)
            other.sendall(json.dumps({"proof": proof("another", "rank 0", "?")}).encode() + b"\n")

        threading.Thread(target=answer).start()
        with pytest.raises(Foreign):
            PeerWatch(1, 2, SECRET, socket.create_connection(listener.getsockname(), timeout=5))


def test_a_rank_that_is_there_already_is_not_replaced(rank_0):
    watch, address = rank_0
    first = join(address, 1)
    second = join(address, 1)
    assert second.receive() is None, "the connection is closed"
    assert watch.mistake == "two processes say that they are rank 1; each needs a RANK of its own"
    first.send(here={"host": "beta"})
    until(lambda: watch.peers[1].host == "beta")


@pytest.mark.parametrize("master, listens", [("127.0.0.1", "127.0.0.1"), ("localhost", "127.0.0.1")])
def test_a_job_on_one_node_listens_there_alone(master, listens):
    with listen(master, 1) as listener:
        assert listener.getsockname()[0] in (listens, "::1")


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("master", ["no-such-host.invalid", "debian"])
def test_a_name_that_says_nothing_of_the_network_means_all_addresses(address, master, monkeypatch):
    """Debian writes 127.0.1.1 beside a host's own name."""
    if ":" in address and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    if master == "debian":
        here = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))]
        monkeypatch.setattr(connection.socket, "getaddrinfo", lambda *_, **__: here)
    with listen(master, 1) as listener:
        monkeypatch.undo()
        socket.create_connection((address, listener.getsockname()[1]), timeout=5).close()


def test_silence_counts_only_while_ones_own_clock_ran():
    """Stopped for an hour, a job hears of nobody for an hour; 50 s of silence before that are 50 s still."""
    watch = SimpleNamespace(_own=Peer(heard=100.0, moved=100.0), peers={1: Peer(heard=50.0, moved=20.0)})
    PeerWatch._pass_over(watch, 3600.0, 3700.0)
    assert 3700.0 - watch.peers[1].heard == 50.0 and 3700.0 - watch.peers[1].moved == 80.0
    assert watch._own.heard == 3700.0
    watch.peers[1].heard = 3699.0  # heard since
    PeerWatch._pass_over(watch, 3600.0, 3700.0)
    assert watch.peers[1].heard == 3700.0, "and never in the future"


@pytest.mark.parametrize("told, here, named", [(11, 19, 19), (19, 18, 19), (None, 19, 19), (None, None, None)])
def test_a_lost_rank_was_where_the_others_are(told, here, named):
    """Ranks go in step, and what one has told last may be some steps old."""
    said = []
    watch = SimpleNamespace(phase=watchdog.WORKING, _step=here, peers={1: Peer(step=told)}, _end=said.append)
    PeerWatch._lose(watch, 1, "died", "")
    assert said == ["rank 1 died" + (f" at step {named}" if named else "")]


@pytest.mark.parametrize("value", ["0", "-1", "soon", "nan", "inf"])
def test_a_time_that_is_none_is_named(value, monkeypatch):
    monkeypatch.setenv(watchdog.PEER_SECONDS, value)
    with pytest.raises(ConfigError, match=f"DPO_DS_PEER_SECONDS is '{value}'"):
        PeerWatch(0, 2, SECRET, None)


def test_where_a_rank_waits_before_the_first_step_the_other_hangs(forks, tmp_path):
    codes, output = forks.run(["load"], 3, tmp_path, module="tests.workers.peers", DPO_DS_HANG_SECONDS="2")
    assert codes == [1, 1, 1] and "rank 1 hangs: no rank got on for 2 s" in output, output


def test_a_job_that_is_stopped_as_a_whole_goes_on(forks, tmp_path):
    env = {"DPO_DS_PEER_SECONDS": "1", "DPO_DS_HANG_SECONDS": "4"}
    ranks = forks.start(["steps"], 3, tmp_path, module="tests.workers.peers", timeout=60, **env)
    until(lambda: "began" in ranks.output())
    for pid in ranks.pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(6)
    for pid in ranks.pids:
        os.kill(pid, signal.SIGCONT)
    assert ranks.codes() == [0, 0, 0], ranks.output()
