"""Ranks that watch each other, so that one that dies or hangs ends the job with its name instead of a silent wait.

A thread of every rank holds a TCP connection to rank 0's, from the ranks' meeting to the end of the command: a process
that ends closes it at once, a machine or process that freezes stops sending, and every message says how far the rank's
main thread is. Rank 0 decides; its verdict ends all ranks. The thread needs nothing of the main thread, which may sit
in a collective for ever.

Silence counts only while the listener's own clock runs: a job that is stopped as a whole, by `scontrol suspend` or a
laptop's lid, goes on when it is woken.
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

from dpo_ds.cluster import connection, signals
from dpo_ds.cluster.connection import Connection, Foreign
from dpo_ds.errors import ConfigError

PEER_SECONDS, HANG_SECONDS = "DPO_DS_PEER_SECONDS", "DPO_DS_HANG_SECONDS"  # environment variables
DEFAULT_PEER_SECONDS = 60  # without a sign of life from a rank's process
DEFAULT_HANG_SECONDS = 1800  # without any rank getting on
GRACE_SECONDS = 30  # for a main thread to end by itself what its thread knows has ended
MISTAKE_SECONDS = 10  # for rank 0 to come to a mistake itself that another rank has found
LOST_PEER = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe", "Socket")  # in their errors
MEETING, PREPARING, WORKING = range(3)


@dataclass
class Peer:
    """Holds what is known of a rank. host and said: as it introduced itself; ready: what it found, once it has
    prepared.
    """

    host: str = "its host"
    said: dict | None = None
    ready: dict | None = None
    heard: float = field(default_factory=time.monotonic)
    step: int | None = None
    waits: bool = False  # its main thread is inside a collective
    ticks: int = -1
    moved: float = field(default_factory=time.monotonic)  # when its ticks last changed, or whether it waits
    left: bool = False  # in good order

    def heard_at(self, now: float, ticks: int, step: int | None, waits: bool) -> None:
        if (ticks, waits) != (self.ticks, self.waits):
            self.moved = now
        self.heard, self.ticks, self.step, self.waits = now, ticks, step, waits


class Silent:
    """Stands in where there is nobody to watch: one rank."""

    on_end: Callable[[str, int], None] = staticmethod(lambda reason, code: None)

    def progress(self, step: int | None = None) -> None:
        signals.check()

    def fault(self, error: BaseException) -> None: ...


class PeerWatch:
    """Watches, in a thread, until `close`. on_end(reason, exit code): called once before this process ends with it.

    peers: every other rank's `Peer` on rank 0, rank 0's on the others. news: to be held while they are read.
    """

    def __init__(self, rank: int, ranks: int, secret: str, stream: socket.socket):
        """stream: rank 0's listening socket, or another rank's connection to it.

        Raises:
            Foreign: what answers is not rank 0 of this job.
        """
        self.rank, self.ranks = rank, ranks
        self.peer_seconds = _seconds(PEER_SECONDS, DEFAULT_PEER_SECONDS)
        self.hang_seconds = _seconds(HANG_SECONDS, DEFAULT_HANG_SECONDS)
        self.on_end: Callable[[str, int], None] = lambda reason, code: None
        self.news, self.phase = threading.Condition(), MEETING
        self.peers = {other: Peer() for other in (range(1, ranks) if rank == 0 else [0])}
        self.mistake: str | None = None  # that a rank found alone, on rank 0
        self.answers: dict[str, str] = {}  # rank 0's, on the others
        self.lost: Exception | None = None  # a rank, before the work began
        self._stop: signals.Stopped | None = None  # told by another rank
        self._beat = min(5.0, self.peer_seconds / 4, self.hang_seconds / 4)
        self._main = threading.main_thread().ident
        self._step, self._ticks, self._waits_for_end = None, 0, False
        self._deadline, self._verdict = float("inf"), ("", 1)  # until then the main thread may end by itself
        self._own = Peer(heard=time.monotonic())
        self._leaving, self._has_told = False, False
        self._secret, self._stream = secret, stream
        self._connections: list[Connection] = []
        if rank != 0:
            self._to_rank_0 = Connection(stream)
            connection.introduce(self._to_rank_0, rank, secret)
            self._connections.append(self._to_rank_0)
        self._wake, self._waker = socket.socketpair()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def progress(self, step: int | None = None) -> None:
        """The main thread is getting on, in this step."""
        signals.check()
        self._step, self._ticks = step, self._ticks + 1

    def tell(self, **message) -> None:
        """Sends to rank 0, or from it to all."""
        for other in list(self._connections):
            if other.rank is not None:
                other.send(**message)

    def fault(self, error: BaseException) -> None:
        """This rank cannot go on: tells the others; where a collective broke, waits for the verdict on who broke it.

        Raises:
            Stopped: it broke because the job is being stopped.
        """
        if self._has_told:
            return
        self._has_told, text = True, str(error)
        if isinstance(error, RuntimeError) and any(word in text for word in LOST_PEER):
            with self.news:
                self.news.wait_for(lambda: self._stop, self.peer_seconds + 2 * self._beat)
        if self._stop:
            raise self._stop from error
        first_line = (text.strip().splitlines() or [""])[0]
        reason = f"rank {self.rank} failed{_at(self._step)}: {type(error).__name__}: {first_line}"
        self.tell(**({"end": reason, "code": 1} if self.rank == 0 else {"fault": reason}))

    def close(self, code: int = 0) -> None:
        """The end of this rank's work. Rank 0 waits, if all is well, until every other rank has come to it."""
        if self.rank == 0 and code == 0:
            self._waits_for_end = True
            with self.news:
                while not all(peer.left for peer in self.peers.values()):
                    self.news.wait(1.0)
        self.tell(bye=code)
        self._leaving = True
        with contextlib.suppress(OSError):
            self._waker.send(b"!")
        self._thread.join()
        for other in [*self._connections, self._wake, self._waker, self._stream]:
            other.close()

    # The thread.

    def _watch(self) -> None:
        selector = selectors.DefaultSelector()
        selector.register(self._wake, selectors.EVENT_READ)
        if self.rank == 0:
            selector.register(self._stream, selectors.EVENT_READ, self._admit)
        else:
            selector.register(self._to_rank_0, selectors.EVENT_READ, self._hear)
        due = last = time.monotonic()
        while not self._leaving:
            for key, _ in selector.select(max(0.0, due - time.monotonic())):
                if key.data is not None:
                    key.data(key.fileobj, selector)
            now = time.monotonic()
            if now - last > 2 * self._beat + 1:
                self._pass_over(now - last, now)  # this process itself was stopped so long
            last = now
            if now < due or self._leaving:
                continue
            due = now + self._beat
            self._own.heard_at(now, self._ticks, self._step, self._waits_for_end or self._in_collective())
            if self.rank == 0:
                self.tell(beat=1)
                self._send_strangers_away(now, selector)
            else:
                self.tell(at=[self._own.ticks, self._own.step, self._own.waits])
            if now > self._deadline:
                self._end_late()
            self._judge(now)

    def _admit(self, listener: socket.socket, selector: selectors.BaseSelector) -> None:
        try:
            stream, _ = listener.accept()
        except OSError:
            return
        stranger = Connection(stream)
        strangers = [other for other in self._connections if other.rank is None]
        if len(strangers) >= connection.STRANGERS:
            self._drop(strangers[0], selector)
        self._connections.append(stranger)
        selector.register(stranger, selectors.EVENT_READ, self._hear)
        stranger.send(nonce=stranger.nonce)

    def _send_strangers_away(self, now: float, selector: selectors.BaseSelector) -> None:
        for other in list(self._connections):
            if other.rank is None and now - other.opened > connection.PROOF_SECONDS:
                self._drop(other, selector)

    def _drop(self, other: Connection, selector: selectors.BaseSelector) -> None:
        selector.unregister(other)
        self._connections.remove(other)
        other.close()

    def _hear(self, other: Connection, selector: selectors.BaseSelector) -> None:
        """Takes what came over a connection; one that is no rank's leaves no trace."""
        try:
            messages = other.receive()
        except Foreign:
            messages = None
        if messages is None:
            self._drop(other, selector)
            if other.rank is not None and not self.peers[other.rank].left:
                self._lose(other.rank, "died", ": its process ended without a word")
            return
        for message in messages:
            if other.rank is not None:
                self._take(other.rank, message)
                continue
            rank = connection.member(other, message, self._secret, self.ranks)
            if rank is None:
                self._drop(other, selector)
                return
            if any(known.rank == rank for known in self._connections) or self.peers[rank].left:
                with self.news:
                    self.mistake = f"two processes say that they are rank {rank}; each needs a RANK of its own"
                    self.news.notify_all()
                self._drop(other, selector)
                return
            other.rank = rank
            self.peers[rank].heard = self.peers[rank].moved = time.monotonic()

    def _take(self, rank: int, message: dict) -> None:
        """Acts on what a rank says."""
        peer, now = self.peers[rank], time.monotonic()
        with self.news:
            peer.heard = now
            if "at" in message:
                peer.heard_at(now, *message["at"])
            elif "here" in message:
                peer.host, peer.said = message["here"]["host"], message["here"]
            elif "ready" in message:
                peer.ready = message["ready"]
            elif "answer" in message:
                self.answers[message["answer"]] = message["text"]
            elif "mistake" in message and self.mistake is None:
                self.mistake = message["mistake"]
                self._give_time(MISTAKE_SECONDS, self.mistake, 2)
            elif "bye" in message:
                peer.left = True
            self.news.notify_all()
        if "bye" in message:
            self._ended(rank, message["bye"])
        if "end" in message:
            self._end(message["end"], message["code"])
        if "fault" in message:
            self._fail(message["fault"])
        if "stop" in message:
            self._stopped(message["stop"])

    def _stopped(self, reason: str) -> None:
        """Another rank was told to stop, and leaves; in training, all ranks agree on that by themselves."""
        with self.news:
            self._stop = signals.Stopped(reason)
            self.news.notify_all()
        if self.rank == 0:
            self.tell(stop=reason)
        if signals.interrupt(self._stop):
            self._give_time(GRACE_SECONDS, f"stopped: {reason}", signals.EXIT_STOPPED)

    def _ended(self, rank: int, code: int) -> None:
        """A rank says so before it does. Without rank 0 nobody goes on; others may have nothing left to do."""
        if rank != 0 and code == 0:
            return
        if self.phase != WORKING:
            self._lose(rank, f"ended with exit code {code}", "")
        else:
            self._give_time(GRACE_SECONDS, f"rank {rank} ended with exit code {code}", code or 1)

    def _give_time(self, seconds: float, reason: str, code: int) -> None:
        """Ends this process then, unless its main thread has come to an end by itself."""
        if self._deadline == float("inf"):
            self._deadline, self._verdict = time.monotonic() + seconds, (reason, code)

    def _end_late(self) -> None:
        """The time given is over. A main thread that prepares data still tells of the mistake itself."""
        reason, code = self._verdict
        if self.phase != WORKING and code == 2 and signals.interrupt(ConfigError(reason)):
            self._deadline, self._verdict = time.monotonic() + GRACE_SECONDS, (reason, 1)
        else:
            self._end(reason, code)

    def _pass_over(self, seconds: float, now: float) -> None:
        """Nobody was heard while this process itself stood still."""
        for peer in [self._own, *self.peers.values()]:
            peer.heard, peer.moved = min(now, peer.heard + seconds), min(now, peer.moved + seconds)

    def _judge(self, now: float) -> None:
        """Ends the job where a rank is silent, or where no rank gets on."""
        for rank, peer in self.peers.items():
            is_known = peer.said is not None or self.rank != 0
            if is_known and not peer.left and now - peer.heard > self.peer_seconds:
                self._lose(rank, f"gave no sign of life for {self.peer_seconds:.0f} s", "")
                peer.heard = now
        if self.rank != 0 or self.phase != WORKING:
            return
        everyone = {rank: peer for rank, peer in {0: self._own, **self.peers}.items() if not peer.left}
        # Models and checkpoints are read without a word, which takes as long as it takes: then somebody must wait.
        has_begun = any(peer.ticks > 0 for peer in everyone.values())
        if now - max(peer.moved for peer in everyone.values()) <= self.hang_seconds:
            return
        if not has_begun and not any(peer.waits for peer in everyone.values()):
            return
        at = max((peer.step for peer in everyone.values() if peer.step is not None), default=None)
        stuck = [str(rank) for rank, peer in everyone.items() if not peer.waits or (at and (peer.step or 0) < at)]
        who = f"rank {', '.join(stuck)} hangs" if stuck else "all ranks hang in collectives"
        self._end(f"{who}{_at(at)}: no rank got on for {self.hang_seconds:.0f} s ({HANG_SECONDS})")

    def _lose(self, rank: int, what: str, how: str) -> None:
        """Without this rank the job ends."""
        peer = self.peers[rank]
        if self.phase == WORKING:
            known = [step for step in (self._step, peer.step) if step is not None]
            step = max(known, default=None)  # ranks go in step, and what it told last may be some steps old
            self._end(f"rank {rank} {what}{_at(step)}{how}")
        elif self.rank == 0:
            when = "while the ranks met" if self.phase == MEETING else "while it prepared its data"
            self._fail(f"rank {rank} on {peer.host} {what} {when}")
        else:
            self._tell_main(ConfigError("rank 0 ended before the work began; its own message says why"))

    def _fail(self, reason: str) -> None:
        """The job cannot go on; while data is prepared, rank 0's main thread says so."""
        if self.phase == WORKING:
            self._end(reason)
        else:
            self._tell_main(RuntimeError(reason))

    def _tell_main(self, error: Exception) -> None:
        with self.news:
            self.lost = self.lost or error
            self.news.notify_all()
        if self.phase == PREPARING:
            signals.interrupt(error)

    def _in_collective(self) -> bool:
        """Tells whether the main thread is inside torch.distributed; on a GPU it may wait elsewhere, for the stream."""
        frame = sys._current_frames().get(self._main)
        while frame is not None:
            if "torch/distributed" in frame.f_code.co_filename:
                return True
            frame = frame.f_back
        return False

    def _end(self, reason: str, code: int = 1) -> None:
        if self._leaving:  # the main thread has come to its own end meanwhile
            return
        if self.rank == 0:
            self.tell(end=reason, code=code)
        print(f"dpo-ds: error: {reason}; this job ends", file=sys.stderr, flush=True)
        self.on_end(reason, code)
        sys.stdout.flush()
        os._exit(code)


def _at(step: int | None) -> str:
    return "" if step is None else f" at step {step}"


def _seconds(name: str, default: float) -> float:
    """Returns an environment variable that is a time."""
    text = os.environ.get(name, "")
    try:
        seconds = float(text) if text else default
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e9:
        raise ConfigError(f"{name} is {text!r}, which is no number of seconds above 0")
    return seconds
