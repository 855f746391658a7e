"""An OpenAI-compatible endpoint on 127.0.0.1 that does whatever a test asks of it, right or wrong."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

VERDICT = {"verdict": "refused", "reason": "it says no"}


def completion(content: Any = None, **more: Any) -> bytes:
    """A chat completion whose message says this (a dict as JSON)."""
    text = json.dumps(VERDICT if content is None else content) if not isinstance(content, str) else content
    message = {"role": "assistant", "content": text, **more.pop("message", {})}
    return json.dumps(
        {"id": "x", "choices": [{"index": 0, "message": message, "finish_reason": "stop", **more}]}
    ).encode()


class Handler(BaseHTTPRequestHandler):
    """Hands each request to the stub's `act`."""

    protocol_version = "HTTP/1.1"
    body: bytes

    def do_POST(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        stub: Stub = self.server.stub  # type: ignore[attr-defined]
        with stub.lock:
            stub.requests.append((self.path, dict(self.headers), json.loads(self.body)))
            number = len(stub.requests)
        try:
            stub.act(self, number)
        except OSError:
            self.close_connection = True

    def answer(self, data: bytes = b"", status: int = 200, length: int | None = None, **headers: str) -> None:
        """A reply; length: a Content-Length other than the true one."""
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)
        if length is not None:
            self.close_connection = True

    def hang(self) -> None:
        """Say nothing for longer than any test's time-out."""
        time.sleep(1.5)
        self.close_connection = True

    def trickle(self) -> None:
        """A byte now and then: no single read ever times out."""
        self.send_response(200)
        self.send_header("Content-Length", "100000")
        self.end_headers()
        for _ in range(20):
            self.wfile.write(b" ")
            time.sleep(0.1)
        self.close_connection = True

    def reset(self) -> None:
        """Reset the connection instead of answering."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def log_message(self, *args: object) -> None:
        """Quiet."""


class Stub:
    """The server. act: what it does with the n-th request, from 1."""

    def __init__(self, act: Callable[[Handler, int], None]) -> None:
        self.act, self.requests, self.lock = act, [], threading.Lock()  # type: ignore[var-annotated]
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.stub = self  # type: ignore[attr-defined]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}/v1"


@contextmanager
def serving(act: Callable[[Handler, int], None]) -> Iterator[Stub]:
    """A stub while the block runs."""
    stub = Stub(act)
    thread = threading.Thread(target=stub.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        stub.server.shutdown()
        stub.server.server_close()
        thread.join()


def closed_port() -> int:
    """A port of this machine where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
