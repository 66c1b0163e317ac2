"""Lines of JSON over TCP between a rank and rank 0, once each has proved to the other that it knows the job's secret.

Ports are scanned, and other people's programs err: who proves nothing is sent away and changes nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import ipaddress
import json
import os
import secrets
import socket
import threading
import time

LONGEST_LINE = 1 << 20  # bytes; a member's description of its configuration is the longest
LONGEST_PROOF = 1 << 10  # bytes that somebody unknown may say
PROOF_SECONDS = 10.0  # for somebody unknown to prove that it is a rank
STRANGERS = 64  # connections without a proof at a time
SEND_SECONDS = 10.0


class Foreign(ValueError):
    """Says what no rank says."""


class Connection:
    """One end of a connection. rank: who is at the other end, None until it has proved it. opened: monotonic time."""

    def __init__(self, stream: socket.socket):
        stream.settimeout(SEND_SECONDS)
        self.stream, self.opened = stream, time.monotonic()
        self.rank: int | None = None
        self.nonce = secrets.token_hex(16)
        self._rest, self._sending = b"", threading.Lock()

    def fileno(self) -> int:
        return self.stream.fileno()

    def send(self, **message) -> None:
        """Sends what it can: where the other end is gone or going, which reading from it tells, the rest is lost."""
        with contextlib.suppress(OSError), self._sending:
            self.stream.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict] | None:
        """Returns the messages that have come whole; None once the other end has closed.

        Raises:
            Foreign: what came is no message, or longer than one may be.
        """
        try:
            data = self.stream.recv(1 << 16)
        except OSError:
            return None
        if not data:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        longest = LONGEST_PROOF if self.rank is None else LONGEST_LINE
        if max(map(len, [*lines, self._rest])) > longest:
            raise Foreign(f"a line longer than {longest} bytes")
        try:
            messages = [json.loads(line) for line in lines]
        except (ValueError, RecursionError) as error:  # no UTF-8, no JSON
            raise Foreign("no JSON") from error
        if not all(isinstance(message, dict) for message in messages):
            raise Foreign("no object")
        return messages

    def close(self) -> None:
        self.stream.close()


def proof(secret: str, *said: str | int) -> str:
    """Returns what only those who know the secret can say of these words."""
    return hmac.new(secret.encode(), json.dumps(said).encode(), hashlib.sha256).hexdigest()


def member(connection: Connection, message: dict, secret: str, ranks: int) -> int | None:
    """Returns the rank that a first message, {rank, nonce, proof}, proves to be at the other end; None if none."""
    rank, nonce, shown = (message.get(key) for key in ("rank", "nonce", "proof"))
    if type(rank) is not int or not 1 <= rank < ranks or not isinstance(nonce, str) or not isinstance(shown, str):
        return None
    if not hmac.compare_digest(shown.encode(), proof(secret, "rank", rank, connection.nonce).encode()):
        return None
    connection.send(proof=proof(secret, "rank 0", nonce))
    return rank


def introduce(connection: Connection, rank: int, secret: str) -> None:
    """Proves to rank 0 who this is, and has it prove itself.

    Raises:
        Foreign: the other end is not rank 0 of this job.
    """
    challenge = _answer(connection).get("nonce")
    if not isinstance(challenge, str):
        raise Foreign("no challenge")
    connection.send(rank=rank, nonce=connection.nonce, proof=proof(secret, "rank", rank, challenge))
    shown = _answer(connection).get("proof")
    if not isinstance(shown, str) or shown != proof(secret, "rank 0", connection.nonce):
        raise Foreign("no proof")
    connection.rank = 0


def _answer(connection: Connection) -> dict:
    while True:
        messages = connection.receive()
        if messages is None:
            raise Foreign("it closed the connection")
        if messages:
            return messages[0]


def listen(master: str, backlog: int) -> socket.socket:
    """Returns a socket that listens on a free port of the address that `master` is on this host, and on no other.

    Where the name leads to no address of this host's, or a host of several nodes calls itself 127.0.1.1 as Debian has
    it, on all of them.
    """
    with contextlib.suppress(OSError):
        family, _, _, _, address = socket.getaddrinfo(master, 0, type=socket.SOCK_STREAM)[0]
        if not ipaddress.ip_address(address[0].split("%")[0]).is_loopback or master in ("localhost", address[0]):
            return socket.create_server(address[:2], family=family, backlog=backlog)
    if not socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), backlog=backlog)
    return socket.create_server(("", 0), backlog=backlog, family=socket.AF_INET6, dualstack_ipv6=True)


def connect(master: str, address: str, port: int, seconds: float) -> socket.socket:
    """Returns a connection to where rank 0 listens, `address`, or to `master`, as this host knows it."""
    wild = ipaddress.ip_address(address.split("%")[0]).is_unspecified
    try:
        return socket.create_connection((master if wild else address, port), timeout=seconds)
    except OSError:
        if wild or os.environ.get("MASTER_ADDR") == address:
            raise
        return socket.create_connection((master, port), timeout=seconds)
