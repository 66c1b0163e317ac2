"""The ranks' meeting: the same code everywhere, and nobody in a collective before everybody is ready."""

import os
import signal
import socket
import threading

import pytest

from dpo_ds.cluster import rendezvous
from dpo_ds.cluster.launch import Launch, free_port
from dpo_ds.errors import CutOff

HOST = socket.gethostname()


def meet(forks, folder, case) -> tuple[list[int], list[str]]:
    codes, output = forks.run([case], 2, folder, module="tests.workers.meeting", timeout=60)
    return codes, [line for line in output.splitlines() if line.startswith("rank ")]


def test_the_first_collective_waits_for_the_longest_preparation(forks, tmp_path):
    """Rank 1 comes 5 s after rank 0; collectives may take 3 s."""
    assert meet(forks, tmp_path, "long") == ([0, 0], ["rank 0: 2 ranks", "rank 1: 2 ranks"])


def test_rank_0_tells_of_a_mistake_that_only_another_node_could_find(forks, tmp_path):
    codes, lines = meet(forks, tmp_path, "mistake")
    assert codes == [2, 2]
    mistake = "ConfigError: data.train /local/pairs.jsonl: no such file"
    assert lines[0] == f"rank 0: ConfigError: on {HOST} (rank 1): {mistake.removeprefix('ConfigError: ')}"
    assert lines[1:] == ["rank 1: rank 0 speaks", f"rank 1: {mistake}"]


def test_a_rank_that_dies_while_it_prepares_is_named(forks, tmp_path):
    codes, lines = meet(forks, tmp_path, "dies")
    assert codes == [2, 9]
    assert lines == [f"rank 0: RuntimeError: rank 1 on {HOST} died while it prepared its data"]


def test_a_rank_that_freezes_while_it_prepares_is_named(forks, tmp_path):
    env = {"DPO_DS_PEER_SECONDS": "2"}
    ranks = forks.start(["freezes"], 2, tmp_path, module="tests.workers.meeting", timeout=60, **env)
    threading.Timer(20, os.kill, (ranks.pids[1], signal.SIGKILL)).start()
    assert ranks.codes() == [2, -signal.SIGKILL]
    said = f"rank 1 on {HOST} gave no sign of life for 2 s while it prepared its data"
    assert ranks.output() == f"rank 0: RuntimeError: {said}\n"


def test_ranks_that_were_started_with_other_keys_do_not_begin(forks, tmp_path):
    codes, lines = meet(forks, tmp_path, "different seed")
    assert codes == [2, 2]
    said = f"train.seed is 3 on {HOST} (rank 0), 5 on {HOST} (rank 1); all ranks must be started with the same keys"
    assert lines == [f"rank {rank}: ConfigError: {said}" for rank in (0, 1)]


def test_nodes_that_prepared_other_content_do_not_begin(forks, tmp_path):
    codes, lines = meet(forks, tmp_path, "different weights")
    assert codes == [2, 2]
    said = f"the weights in /m is abc on {HOST} (rank 0), def on {HOST} (rank 1); all nodes must have the same content"
    assert lines == [f"rank {rank}: ConfigError: {said}" for rank in (0, 1)]


def test_a_rank_that_found_less_agrees():
    """Only the first rank of a node reads every byte: rank 1 of 2 nodes with 2 ranks has nothing to say."""
    ready = {0: {"data": "a", "weights": "b"}, 1: {}, 2: {"data": "a", "weights": "c"}, 3: {}}
    hosts = dict(enumerate(["alpha", "alpha", "beta", "beta"]))
    said = "weights is b on alpha (rank 0), c on beta (rank 2); all nodes must have the same content"
    assert rendezvous.different_content(ready, hosts) == said
    assert rendezvous.different_content(ready | {2: ready[0]}, hosts) == ""
    said = "weights is b on alpha (rank 0), missing on beta (rank 2); all nodes must have the same content"
    assert rendezvous.different_content(ready | {2: {"data": "a"}}, hosts) == said


def test_two_processes_that_call_themselves_rank_1(forks, tmp_path):
    codes, output = forks.run(
        ["long"], 3, tmp_path, module="tests.workers.meeting", timeout=60, only={2: {"RANK": 1}}
    )
    assert codes[0] == 2, output
    assert "two processes say that they are rank 1; each needs a RANK of its own" in output


def test_different_code_names_both_sides(forks, tmp_path):
    codes, lines = meet(forks, tmp_path, "different code")
    assert codes == [2, 2]
    ours = rendezvous.code()["dpo_ds"]
    assert lines[0].startswith(f"rank 0: ConfigError: dpo_ds {ours} on {HOST} (rank 0), another on {HOST} (rank 1)")


def test_what_an_editor_leaves_beside_the_code_does_not_count(monkeypatch, tmp_path):
    """Emacs' lock is a link that leads nowhere."""
    (tmp_path / "dpo_ds" / "cluster").mkdir(parents=True)
    monkeypatch.setattr(rendezvous, "__file__", str(tmp_path / "dpo_ds" / "cluster" / "rendezvous.py"))
    (tmp_path / "dpo_ds" / "run.py").write_text("1")
    before = rendezvous.code()
    (tmp_path / "dpo_ds" / ".#run.py").symlink_to("me@host.123")
    assert rendezvous.code() == before
    (tmp_path / "dpo_ds" / "run.py").write_text("2")
    assert rendezvous.code() != before


def test_only_what_differs_is_named():
    first = {"host": "a", "code": {"dpo_ds": "1", "torch": "2.13.0"}}
    other = {"host": "b", "code": {"dpo_ds": "1", "torch": "2.12.0"}}
    assert rendezvous.different_code([first, first]) == ""
    said = "torch 2.13.0 on a (rank 0), 2.12.0 on b (rank 2); all nodes must run the same"
    assert rendezvous.different_code([first, first, other]) == said


@pytest.mark.parametrize("host", ["no-such-host.invalid", "127.0.0.1"])
def test_a_host_that_gives_no_answer(host, monkeypatch):
    """A refusal is an answer: rank 0 may be starting still, so another limit holds."""
    monkeypatch.setattr(rendezvous, "UNREACHABLE_SECONDS", 0.3)
    monkeypatch.setattr(rendezvous, "START_SECONDS", 0.9)
    monkeypatch.setenv("MASTER_ADDR", host)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)  # `meet` would, and no later test is to see them
    said = "rank 0 did not start on 127.0.0.1" if host == "127.0.0.1" else "cannot reach rank 0's host no-such-host"
    with pytest.raises(CutOff, match=said):
        rendezvous.meet(Launch(1, 2, 0, 1))
