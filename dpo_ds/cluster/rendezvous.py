"""All ranks meet before the work begins, on a store at rank 0: the same code on every node, nobody missing.

Meeting first tells in seconds what would otherwise show after hours of preparing data. Preparing then takes as long as
it takes, on each node for itself: `wait_for_all` lets no rank into the first collective, whose time is limited, before
every rank has come. DeepSpeed's process group forms on the same store. One meeting a process, as with
torch.distributed's default group.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import threading
import time
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import torch.distributed as dist

from dpo_ds import __version__
from dpo_ds.cluster.launch import Launch, complete_environment
from dpo_ds.errors import ConfigError, CutOff

START_SECONDS = 600  # between the first rank's start and the last one's
UNREACHABLE_SECONDS = 30  # that rank 0's host gives no answer, not even a refusal, as while rank 0 is starting
ANSWER_SECONDS = 30  # for what listens on rank 0's port to answer as a store does
NOTE_SECONDS = 30  # without a missing rank until a line says so
GRACE_SECONDS = 30  # for rank 0 to say why the job ends, before another rank does or leaves
BEAT_SECONDS, SILENT_SECONDS = 5, 60  # signs of life while data is prepared
POLL_SECONDS = 0.2
PACKAGES = ("torch", "deepspeed", "transformers")

_meeting: Meeting | None = None


def meet(place: Launch) -> Meeting:
    """All ranks enter.

    Raises:
        ConfigError: a port in use, ranks that do not come, code that differs between nodes.
        CutOff: rank 0 cannot be reached from here.
    """
    global _meeting
    complete_environment(place)
    _meeting = Meeting(place)
    return _meeting


def wait_for_all() -> None:
    """Until every rank has come here, however long it prepared. All ranks enter, before the first collective."""
    if _meeting is not None:
        _meeting.wait_for_all()


class Meeting:
    """A place on the store for each rank: who it is, that it lives, whether it is ready, what mistake it found."""

    def __init__(self, place: Launch):
        self._place, self._ranks = place, range(place.world_size)
        self._store = _open_store(place)
        mine = {"host": socket.gethostname(), "code": code()}
        self._store.set(f"here/{place.rank}", json.dumps(mine))
        self._left = threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()
        if place.is_first:
            everyone = self._everyone()
            self._hosts = [rank["host"] for rank in everyone]
            self._store.set("verdict", different_code(everyone))
        if verdict := self._answer("verdict"):
            raise ConfigError(verdict)

    def wait_for_all(self) -> None:
        """Raises ConfigError for a mistake that only another rank could find, RuntimeError for a rank that died."""
        self._store.set(f"ready/{self._place.rank}", "")
        if self._place.is_first:
            waiting, seen = set(self._ranks), {}
            while waiting := {rank for rank in waiting if not self._store.check([f"ready/{rank}"])}:
                if self._store.check(["mistake"]):
                    raise ConfigError(self._get("mistake"))
                for rank in waiting:
                    beats = self._get(f"alive/{rank}") if self._store.check([f"alive/{rank}"]) else ""
                    if seen.get(rank, ("",))[0] != beats or rank not in seen:
                        seen[rank] = beats, time.monotonic()
                    elif time.monotonic() - seen[rank][1] > SILENT_SECONDS:
                        gone = f"rank {rank} on {self._hosts[rank]} gave no sign of life for {SILENT_SECONDS} s"
                        raise RuntimeError(f"{gone} while it prepared its data")
                time.sleep(POLL_SECONDS)
            self._store.set("all ready", "")
        self._answer("all ready")
        self._left.set()

    def speaks(self, mistake: str) -> bool:
        """Whether this rank is to print a mistake that ends it: rank 0, as long as it lives.

        Rank 0 has the same mistake, or is at work still and learns of this one in wait_for_all.
        """
        if not self._place.is_first:
            with contextlib.suppress(dist.DistError):  # rank 0 has ended
                where = f"on {socket.gethostname()} (rank {self._place.rank})"
                self._store.compare_set("mistake", "", f"{where}: {mistake}")
        return self.let_rank_0_go_first()

    def let_rank_0_go_first(self) -> bool:
        """Before an exit code other than 0, on which launchers end the other ranks; False when rank 0 has gone."""
        if self._place.is_first:
            self._store.set("rank 0 ends", "")
            return True
        deadline = time.monotonic() + GRACE_SECONDS
        with contextlib.suppress(dist.DistError):
            while time.monotonic() < deadline:
                if self._store.check(["rank 0 ends"]):
                    return False
                time.sleep(POLL_SECONDS)
            return True
        return False

    def _everyone(self) -> list[dict]:
        start, noted = time.monotonic(), False
        while missing := [rank for rank in self._ranks if not self._store.check([f"here/{rank}"])]:
            waited = time.monotonic() - start
            names = f"rank {', '.join(map(str, missing[:8]))}{', ...' if missing[8:] else ''} of {len(self._ranks)}"
            if waited > START_SECONDS:
                raise ConfigError(f"{names} did not come within {START_SECONDS} s; did every node start its ranks?")
            if waited > NOTE_SECONDS and not noted:
                noted = True
                print(f"dpo-ds: waiting for {names}", flush=True)
            time.sleep(POLL_SECONDS)
        return [json.loads(self._get(f"here/{rank}")) for rank in self._ranks]

    def _answer(self, key: str) -> str:
        """What rank 0 writes there."""
        try:
            while not self._store.check([key]):
                time.sleep(POLL_SECONDS)
            return self._get(key)
        except dist.DistError:
            raise ConfigError("rank 0 ended before the work began; its own message says why") from None

    def _get(self, key: str) -> str:
        return self._store.get(key).decode()

    def _beat(self) -> None:
        beats = 0
        while not self._left.wait(BEAT_SECONDS):
            beats += 1
            try:
                self._store.set(f"alive/{self._place.rank}", str(beats))
            except dist.DistError:  # rank 0 has ended; the main thread finds out, too
                return


def code() -> dict[str, str]:
    """Versions of what the ranks must have in common; of dpo_ds also a hash of its files."""
    digest, root = hashlib.sha256(), Path(__file__).parents[1]
    for path in sorted(root.rglob("[!.]*.py")):  # without what editors leave
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return {"dpo_ds": f"{__version__} (code {digest.hexdigest()[:8]})"} | {name: version(name) for name in PACKAGES}


def different_code(everyone: list[dict]) -> str:
    """What differs from rank 0's, or ""."""
    first = everyone[0]
    for rank, other in enumerate(everyone):
        for package, mine in first["code"].items():
            if other["code"][package] != mine:
                here, there = f"{mine} on {first['host']} (rank 0)", f"{other['code'][package]} on {other['host']}"
                return f"{package} {here}, {there} (rank {rank}); all nodes must run the same"
    return ""


def _open_store(place: Launch) -> dist.Store:
    """On rank 0's host; torchrun has one there already."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_server = place.is_first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not is_server:
        _wait_for_port(host, port)
    try:
        store = dist.TCPStore(
            host, port, place.world_size, is_server, timedelta(seconds=ANSWER_SECONDS), wait_for_workers=False,
            multi_tenant=True,
        )  # fmt: skip
    except dist.DistError as error:
        if not is_server:
            raise CutOff(f"what listens on {host}:{port} is not rank 0 of this job; {OTHER_PORT}") from error
        in_use = "is in use" if "EADDRINUSE" in str(error) else f"cannot be opened ({str(error).splitlines()[0]})"
        raise ConfigError(f"port {port} on {socket.gethostname()} {in_use}; {OTHER_PORT}") from error
    return dist.PrefixStore(f"dpo_ds/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


OTHER_PORT = "choose another with the launcher's --master_port, or MASTER_PORT"


def _wait_for_port(host: str, port: int) -> None:
    """Until rank 0 listens; a refusal says that its host is there."""
    start = answered = time.monotonic()
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
        time.sleep(POLL_SECONDS)
