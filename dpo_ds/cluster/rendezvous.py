"""Lets all ranks meet before the work begins, with the same code and configuration on every node, nobody missing.

Meeting first tells in seconds what would otherwise show after hours of preparing data. Preparing then takes as long as
it takes, on each node for itself: `wait_for_all` lets no rank into the first collective before every rank has come, and
has prepared the same. Rank 0 keeps a store, where DeepSpeed's process group forms too; from there the others learn
where it listens, and the job's secret. One meeting a process, as with torch.distributed's default group.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from dpo_ds import __version__
from dpo_ds.cluster import connection
from dpo_ds.cluster.connection import Foreign
from dpo_ds.cluster.launch import Launch, complete_environment
from dpo_ds.cluster.watchdog import GRACE_SECONDS, PREPARING, WORKING, PeerWatch, Silent
from dpo_ds.errors import ConfigError, CutOff, UserError, first_line

START_SECONDS = 600  # between the first rank's start and the last one's
PREPARE_SECONDS = 24 * 3600  # between the first rank that has prepared its data and the last one
UNREACHABLE_SECONDS = 30  # that rank 0's host gives no answer, not even a refusal, as while rank 0 is starting
ANSWER_SECONDS = 30  # for what listens on rank 0's port to answer as a store does
NOTE_SECONDS = 30  # without a missing rank until a line says so
POLL_SECONDS = 0.2
SHOWN = 60  # characters of a value in a message
EXIT_USER = 2
PACKAGES = ("torch", "deepspeed", "transformers")

_meeting: Meeting | None = None


def meet(launch: Launch) -> Meeting:
    """Returns the meeting of all ranks, who all enter; this one is connected.

    Raises:
        ConfigError: a port in use.
        CutOff: rank 0 cannot be reached from here.
    """
    global _meeting
    complete_environment(launch)
    _meeting = Meeting(launch)
    return _meeting


def peers() -> PeerWatch | Silent:
    """Returns the watch over the other ranks."""
    return SILENT if _meeting is None else _meeting.watch


SILENT = Silent()


def give_up(mistake: UserError) -> NoReturn:
    """Ends this process, from any of its threads, with a mistake that its main thread cannot tell of any more."""
    if _meeting is None or _meeting.speaks(str(mistake)):
        print(f"dpo-ds: error: {mistake}", file=sys.stderr, flush=True)
    os._exit(EXIT_USER)


def found(what: str, digest: str) -> None:
    """Notes what this rank has prepared; `wait_for_all` compares it with what other nodes have."""
    if _meeting is not None:
        _meeting.found[what] = digest


def wait_for_all() -> None:
    """Returns once every rank has come here, however long it prepared. All ranks enter, before the first collective."""
    if _meeting is not None:
        _meeting.wait_for_all()


class Meeting:
    """Brings all ranks together: who each is, whether it is ready, what mistake it found. watch: over the ranks."""

    def __init__(self, launch: Launch):
        self._launch, self._host = launch, socket.gethostname()
        self.found: dict[str, str] = {}
        self._store = _open_store(launch)
        self.watch = self._watch()

    def compare(self, config: dict, lets_code_differ: bool = False) -> None:
        """Waits for every rank. config: this rank's, flat. lets_code_differ: for who tells of that itself.

        Raises:
            ConfigError: ranks that do not come, code or configurations that differ.
        """
        watch = self.watch
        here = {"host": self._host, "code": code(), "config": {key: str(value) for key, value in config.items()}}
        if not self._launch.is_first:
            watch.tell(here=here)
            self._answer("met")
            watch.phase = PREPARING
            return
        remedy = "; did every node start its ranks?"
        self._wait(lambda peer: peer.said is not None, START_SECONDS, "did not come", remedy)
        everyone = [here, *(watch.peers[rank].said for rank in sorted(watch.peers))]
        verdict = ("" if lets_code_differ else different_code(everyone)) or different_config(everyone)
        watch.phase = watch.phase if verdict else PREPARING
        watch.tell(answer="met", text=verdict)
        if verdict:
            raise ConfigError(verdict)

    def wait_for_all(self) -> None:
        """Raises ConfigError for a mistake that only another rank could find or nodes that prepared other content,
        RuntimeError for a rank that died.
        """
        watch = self.watch
        if self._launch.is_first:
            self._wait(lambda peer: peer.ready is not None, PREPARE_SECONDS, "did not prepare its data")
            ready = {0: self.found} | {rank: peer.ready for rank, peer in watch.peers.items()}
            hosts = {0: self._host} | {rank: peer.host for rank, peer in watch.peers.items()}
            verdict = different_content(ready, hosts)
            watch.phase = WORKING
            watch.tell(answer="all ready", text=verdict)
            if verdict:
                raise ConfigError(verdict)
        else:
            watch.tell(ready=self.found)
            self._answer("all ready")
            watch.phase = WORKING

    def speaks(self, mistake: str) -> bool:
        """Tells whether this rank is to print a mistake that ends it: rank 0, as long as it lives.

        Rank 0 has the same mistake, or is at work still and learns of this one.
        """
        if not self._launch.is_first:
            self.watch.tell(mistake=f"on {self._host} (rank {self._launch.rank}): {mistake}")
        return self.let_rank_0_go_first()

    def let_rank_0_go_first(self) -> bool:
        """Waits before an exit code other than 0, on which launchers end the others; False when rank 0 has gone."""
        if self._launch.is_first:
            return True
        watch = self.watch
        with watch.news:
            return not watch.news.wait_for(lambda: watch.peers[0].left or watch.lost is not None, GRACE_SECONDS)

    def stop(self, reason: str) -> None:
        """Tells the others that this rank was told to stop, and leaves."""
        self.watch.tell(stop=reason)
        self.let_rank_0_go_first()

    def close(self, code: int) -> None:
        """Leaves the other ranks with this exit code; the store goes last."""
        global _meeting
        self.watch.close(code)
        self._store = None
        _meeting = None

    def _watch(self) -> PeerWatch:
        """Returns the watch, connected; rank 0 says on the store where, and the secret."""
        master, ranks = os.environ["MASTER_ADDR"], self._launch.world_size
        if self._launch.is_first:
            listener = connection.listen(master, backlog=ranks + connection.STRANGERS)
            secret, address = secrets.token_hex(32), listener.getsockname()
            watch = PeerWatch(0, ranks, secret, listener)
            self._store.set("watch", json.dumps({"secret": secret, "address": address[0], "port": address[1]}))
            return watch
        try:
            start = time.monotonic()
            while not self._store.check(["watch"]):
                if time.monotonic() - start > ANSWER_SECONDS:
                    raise CutOff(f"rank 0 on {master} did not say where it listens; {OTHER_PORT}")
                time.sleep(POLL_SECONDS / 4)
            where = json.loads(self._store.get("watch"))
        except dist.DistError:
            raise ConfigError(ENDED) from None
        try:
            stream = connection.connect(master, where["address"], where["port"], ANSWER_SECONDS)
            return PeerWatch(self._launch.rank, ranks, where["secret"], stream)
        except Foreign as error:
            raise CutOff(f"{self._host}: what listens on {master}:{where['port']} is not rank 0 ({error})") from error
        except OSError as error:
            raise CutOff(
                f"{self._host} cannot reach rank 0's watch on {where['address']} ({master}), port {where['port']} "
                f"({error}); no firewall may be between the nodes"
            ) from error

    def _wait(self, has_come: Callable, seconds: float, what: str, remedy: str = "") -> None:
        """Waits, on rank 0, until `has_come` holds for every peer; raises what another rank found instead."""
        watch, start, noted = self.watch, time.monotonic(), False
        with watch.news:
            while missing := [rank for rank, peer in watch.peers.items() if not has_come(peer)]:
                if watch.mistake is not None:
                    raise ConfigError(watch.mistake)
                if watch.lost is not None:
                    raise watch.lost
                waited, names = time.monotonic() - start, self._names(missing)
                if waited > seconds:
                    raise ConfigError(f"{names} {what} within {seconds} s{remedy}")
                if waited > NOTE_SECONDS and not noted:
                    noted = True
                    print(f"dpo-ds: waiting for {names}", flush=True)
                watch.news.wait(POLL_SECONDS)

    def _names(self, ranks: list[int]) -> str:
        """Returns "rank 1 (node2), 3 of 8"; the host where it is known."""
        peers = self.watch.peers
        named = [f"{rank} ({peers[rank].host})" if peers[rank].said else str(rank) for rank in ranks[:8]]
        return f"rank {', '.join(named)}{', ...' if ranks[8:] else ''} of {self._launch.world_size}"

    def _answer(self, name: str) -> None:
        """Waits for rank 0's verdict of this name; raises ConfigError where it is none to go on."""
        watch = self.watch
        with watch.news:
            watch.news.wait_for(lambda: name in watch.answers or watch.lost is not None)
        if name not in watch.answers:
            raise watch.lost
        if verdict := watch.answers[name]:
            raise ConfigError(verdict)


ENDED = "rank 0 ended before the work began; its own message says why"


def code() -> dict[str, str]:
    """Returns versions of what the ranks must have in common; of dpo_ds also a hash of its files."""
    digest, root = hashlib.sha256(), Path(__file__).parents[1]
    for path in sorted(root.rglob("[!.]*.py")):  # without what editors leave
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return {"dpo_ds": f"{__version__} (code {digest.hexdigest()[:8]})"} | {name: version(name) for name in PACKAGES}


def different_code(everyone: list[dict]) -> str:
    """Returns what differs from rank 0's, or ""."""
    first = everyone[0]
    for rank, other in enumerate(everyone):
        for package, mine in first["code"].items():
            if other["code"][package] != mine:
                here, there = f"{mine} on {first['host']} (rank 0)", f"{other['code'][package]} on {other['host']}"
                return f"{package} {here}, {there} (rank {rank}); all nodes must run the same"
    return ""


def different_config(everyone: list[dict]) -> str:
    """Returns the first key whose value differs from rank 0's, or ""."""
    first = everyone[0]
    for rank, other in enumerate(everyone):
        for key in sorted(first["config"].keys() | other["config"].keys()):
            mine, yours = (rank_s["config"].get(key, "not there") for rank_s in (first, other))
            if mine != yours:
                mine, yours = (value if len(value) <= SHOWN else f"{value[:SHOWN]}..." for value in (mine, yours))
                here, there = f"{mine} on {first['host']} (rank 0)", f"{yours} on {other['host']} (rank {rank})"
                return f"{key} is {here}, {there}; all ranks must be started with the same keys"
    return ""


def different_content(ready: dict[int, dict[str, str]], hosts: dict[int, str]) -> str:
    """Returns what a node prepared otherwise than rank 0's, or ""; ranks that were not first on theirs found less."""
    for rank, found_there in sorted(ready.items()):
        for what in sorted(ready[0].keys() | found_there.keys()) if found_there else ():
            mine, yours = (found.get(what, "missing") for found in (ready[0], found_there))
            if mine != yours:
                here, there = f"{mine} on {hosts[0]} (rank 0)", f"{yours} on {hosts[rank]} (rank {rank})"
                return f"{what} is {here}, {there}; all nodes must have the same content"
    return ""


def _open_store(launch: Launch) -> dist.Store:
    """Returns a store on rank 0's host; torchrun has one there already."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_server = launch.is_first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not is_server:
        _wait_for_port(host, port)
    try:
        store = dist.TCPStore(
            host, port, launch.world_size, is_server, timedelta(seconds=ANSWER_SECONDS), wait_for_workers=False,
            multi_tenant=True,
        )  # fmt: skip
    except dist.DistError as error:
        if not is_server:
            raise CutOff(f"what listens on {host}:{port} is not rank 0 of this job; {OTHER_PORT}") from error
        in_use = "is in use" if "EADDRINUSE" in str(error) else f"cannot be opened ({first_line(error)})"
        raise ConfigError(f"port {port} on {socket.gethostname()} {in_use}; {OTHER_PORT}") from error
    return dist.PrefixStore(f"dpo_ds/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


OTHER_PORT = "choose another with the launcher's --master_port, or MASTER_PORT"


def _wait_for_port(host: str, port: int) -> None:
    """Returns once rank 0 listens; a refusal says that its host is there."""
    start = answered = time.monotonic()
    noted = False
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except ConnectionRefusedError as refusal:
            answered, reason = time.monotonic(), refusal
        except OSError as error:
            reason = error
        now, here = time.monotonic(), socket.gethostname()
        if now - answered > UNREACHABLE_SECONDS:
            raise CutOff(
                f"{here} cannot reach rank 0's host {host}, port {port} ({reason}); MASTER_ADDR must be a name or "
                "address that every node knows, and no firewall may be between them"
            ) from reason
        if now - start > START_SECONDS:
            raise CutOff(f"{here}: rank 0 did not start on {host}, port {port}, within {START_SECONDS} s")
        if now - start > NOTE_SECONDS and not noted:
            noted = True
            print(f"dpo-ds: {here} waits for rank 0 on {host}, port {port}", flush=True)
        time.sleep(POLL_SECONDS)
