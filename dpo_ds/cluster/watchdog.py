"""Ranks that watch each other, so that one that dies or hangs ends the job with its name instead of a silent wait.

A thread of every rank holds a TCP connection to rank 0's: a process that ends closes it at once, a machine or process
that freezes stops sending, and every message says how far the rank's main thread is. Rank 0 decides; its verdict ends
all ranks. The thread needs nothing of the main thread, which may sit in a collective for ever.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from dpo_ds.cluster import collectives

PEER_SECONDS, HANG_SECONDS = "DPO_DS_PEER_SECONDS", "DPO_DS_HANG_SECONDS"  # environment variables
DEFAULT_PEER_SECONDS = 60  # without a sign of life from a rank's process
DEFAULT_HANG_SECONDS = 1800  # without any rank getting on
LOST_PEER = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe", "Socket")  # in their errors


@dataclass
class _Peer:
    """What is known of a rank."""

    heard: float = field(default_factory=time.monotonic)
    step: str = "0"
    waits: bool = False  # its main thread is inside a collective
    ticks: str = ""
    moved: float = field(default_factory=time.monotonic)  # when its ticks last changed


@dataclass
class _Connection:
    """To rank 0, from a rank that has perhaps not said which one it is."""

    rank: int | None = None
    rest: bytes = b""  # of a line that has not arrived whole

    def lines(self, data: bytes) -> list[str]:
        *whole, self.rest = (self.rest + data).split(b"\n")
        return [line.decode(errors="replace") for line in whole]


def _listen(backlog: int) -> socket.socket:
    """On all addresses of this host, IPv6 among them where it has any."""
    if not socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), backlog=backlog)
    return socket.create_server(("", 0), backlog=backlog, family=socket.AF_INET6, dualstack_ipv6=True)


class Silent:
    """What stands in where there is nobody to watch: one rank."""

    def progress(self, step: int) -> None: ...
    def fault(self, error: BaseException) -> None: ...
    def close(self) -> None: ...


class PeerWatch:
    """Starts watching; all ranks enter. `on_end(reason)` is called once before this process ends with exit code 1."""

    def __init__(self, on_end: Callable[[str], None]):
        self.rank, self.ranks = collectives.rank(), collectives.world_size()
        self.peer_seconds = float(os.environ.get(PEER_SECONDS, DEFAULT_PEER_SECONDS))
        self.hang_seconds = float(os.environ.get(HANG_SECONDS, DEFAULT_HANG_SECONDS))
        self._beat = min(5.0, self.peer_seconds / 4, self.hang_seconds / 4)
        self._on_end, self._main = on_end, threading.main_thread().ident
        self._step, self._ticks = 0, 0
        self._last_words = ""
        listener = _listen(self.ranks) if self.rank == 0 else None
        port = collectives.from_rank_0(listener.getsockname()[1] if listener else None)
        if listener:
            self._peers = {rank: _Peer() for rank in range(1, self.ranks)}
            self._connections: list[socket.socket] = []
            self._thread = threading.Thread(target=self._lead, args=(listener,), daemon=True)
        else:
            self._peers = {0: _Peer()}
            self._socket = socket.create_connection((os.environ["MASTER_ADDR"], port), timeout=self.peer_seconds)
            self._socket.sendall(f"hello {self.rank}\n".encode())
            self._thread = threading.Thread(target=self._follow, daemon=True)
        self._wake, self._waker = socket.socketpair()
        self._thread.start()

    def progress(self, step: int) -> None:
        """The main thread is getting on, in this step."""
        self._step, self._ticks = step, self._ticks + 1

    def fault(self, error: BaseException) -> None:
        """This rank cannot go on: tells the others; where a collective broke, waits for the verdict on who broke it."""
        text = str(error)
        if isinstance(error, RuntimeError) and any(word in text for word in LOST_PEER):
            self._thread.join(self.peer_seconds + 2 * self._beat)
            return
        first_line = (text.strip().splitlines() or [""])[0]
        self._leave(f"fault rank {self.rank} failed at step {self._step}: {type(error).__name__}: {first_line}")

    def close(self) -> None:
        """The end that all ranks come to."""
        self._leave("bye")

    def _leave(self, message: str) -> None:
        if self._last_words:
            return
        self._last_words = message
        self._waker.send(b"!")
        self._thread.join()

    # Rank 0's thread.

    def _lead(self, listener: socket.socket) -> None:
        selector = selectors.DefaultSelector()
        selector.register(listener, selectors.EVENT_READ)
        selector.register(self._wake, selectors.EVENT_READ)
        own, ticks = _Peer(), -1
        due = time.monotonic()
        while True:
            for key, _ in selector.select(max(0.0, due - time.monotonic())):
                if key.fileobj is self._wake:
                    self._tell_all(self._last_words.replace("fault ", "end ", 1))
                    return
                if key.fileobj is listener:
                    connection, _ = listener.accept()
                    self._connections.append(connection)
                    selector.register(connection, selectors.EVENT_READ, _Connection())
                elif not self._hear(key.fileobj, key.data):
                    selector.unregister(key.fileobj)
                    key.fileobj.close()
            now = time.monotonic()
            if now < due:
                continue
            due = now + self._beat
            self._tell_all(".")
            if self._ticks != ticks:
                ticks, own.moved = self._ticks, now
            own.step, own.waits = str(self._step), self._in_collective()
            for rank, peer in self._peers.items():
                if now - peer.heard > self.peer_seconds:
                    self._end(f"rank {rank} gave no sign of life for {self.peer_seconds:.0f} s at step {peer.step}")
            everyone = {0: own, **self._peers}
            # Before the first step models and checkpoints are read, which takes as long as it takes.
            if self._ticks and now - max(peer.moved for peer in everyone.values()) > self.hang_seconds:
                at = max(int(peer.step) for peer in everyone.values())
                stuck = [str(rank) for rank, peer in everyone.items() if not peer.waits or int(peer.step) < at]
                who = f"rank {', '.join(stuck)} hangs" if stuck else "all ranks hang in collectives"
                self._end(f"{who} at step {at}: no rank got on for {self.hang_seconds:.0f} s ({HANG_SECONDS})")

    def _hear(self, stream: socket.socket, connection: _Connection) -> bool:
        """Takes what a rank sent; False once it has left in good order, or is none: clusters scan their ports."""
        try:
            data = stream.recv(4096)
        except OSError:
            data = b""
        if not data and connection.rank in self._peers:
            peer = self._peers[connection.rank]
            self._end(f"rank {connection.rank} died at step {peer.step}: its process ended without a word")
        for line in connection.lines(data):
            word, _, rest = line.partition(" ")
            if word == "hello" and rest in map(str, self._peers):
                connection.rank = int(rest)
            elif connection.rank is None:
                return False
            elif word == "fault":
                self._end(rest)
            elif word == "bye":
                del self._peers[connection.rank]
                return False
            else:
                peer = self._peers[connection.rank]
                peer.heard = time.monotonic()
                ticks, peer.step, waits = rest.split()
                peer.waits = waits == "1"
                if ticks != peer.ticks:
                    peer.ticks, peer.moved = ticks, peer.heard
        return bool(data)

    def _tell_all(self, message: str) -> None:
        for connection in self._connections:
            with contextlib.suppress(OSError):  # the rank is gone or leaving; its closed connection is heard in _lead
                connection.sendall(f"{message}\n".encode())

    # Every other rank's thread.

    def _follow(self) -> None:
        leader, connection = self._peers[0], _Connection(rank=0)
        selector = selectors.DefaultSelector()
        selector.register(self._socket, selectors.EVENT_READ)
        selector.register(self._wake, selectors.EVENT_READ)
        due = time.monotonic()
        while True:
            for key, _ in selector.select(max(0.0, due - time.monotonic())):
                if key.fileobj is self._wake:
                    with contextlib.suppress(OSError):  # rank 0 may be gone already
                        self._socket.sendall(f"{self._last_words}\n".encode())
                    return
                try:
                    data = self._socket.recv(4096)
                except OSError:
                    data = b""
                if not data:
                    self._end(f"rank 0 died at step {self._step}: its process ended without a word")
                leader.heard = time.monotonic()
                for line in connection.lines(data):
                    word, _, reason = line.partition(" ")
                    if word == "bye":
                        return
                    if word == "end":
                        self._end(reason)
            now = time.monotonic()
            if now < due:
                continue
            due = now + self._beat
            if now - leader.heard > self.peer_seconds:
                self._end(f"rank 0 gave no sign of life for {self.peer_seconds:.0f} s at step {self._step}")
            with contextlib.suppress(OSError):  # rank 0 is gone: the next recv says so
                self._socket.sendall(f"at {self._ticks} {self._step} {int(self._in_collective())}\n".encode())

    def _in_collective(self) -> bool:
        """Whether the main thread is inside torch.distributed; on a GPU it may wait elsewhere, for the stream."""
        frame = sys._current_frames().get(self._main)
        while frame is not None:
            if "torch/distributed" in frame.f_code.co_filename:
                return True
            frame = frame.f_back
        return False

    def _end(self, reason: str) -> None:
        if self.rank == 0:
            self._tell_all(f"end {reason}")
        print(f"dpo-ds: error: {reason}; this job ends", file=sys.stderr, flush=True)
        self._on_end(reason)
        os._exit(1)
