"""Servers on loopback that speak as much of a service's HTTP as its client needs."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NoReturn


class Died(Exception):
    """A server that ends before it has answered."""


class Handler(BaseHTTPRequestHandler):
    """Takes the body, and answers JSON; what is asked goes to `answer` of a subclass."""

    protocol_version = "HTTP/1.1"

    def answer(self, path: str, body: bytes) -> tuple[int, Any]:
        """Returns status and what is sent as JSON; bytes are sent as they are."""
        raise NotImplementedError

    def _serve(self) -> None:
        length = self.headers.get("Content-Length")
        body = self.rfile.read(int(length)) if length else b""
        try:
            status, content = self.answer(self.path.split("?")[0], body)
        except Died:
            self.close_connection = True
            return
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def die(self) -> NoReturn:
        """Cuts the line, and refuses whoever comes from now on."""
        self.server.shutdown()
        self.server.server_close()
        raise Died

    do_GET = do_POST = do_PUT = do_PATCH = do_HEAD = _serve

    def log_message(self, *_) -> None:
        """Says nothing."""


@contextlib.contextmanager
def serving(handler: type[Handler]) -> Iterator[ThreadingHTTPServer]:
    """Gives a server at work."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()


def address(server: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"
