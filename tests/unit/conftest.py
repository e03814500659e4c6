"""Servers that unit tests read shards from: one that can be told to fail, and one that speaks S3."""

from __future__ import annotations

import socket
import struct
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest


class FaultServer(ThreadingHTTPServer):
    """Serves bytes by path; each request for a path first takes the next fault that is planned for it.

    Faults: a status such as "503", "short" (half of what Content-Length says), "half" (half, and no Content-Length),
    "wrong" (one byte differs), "long" (more than there was), "hang" (nothing is ever sent), "reset" (connection reset).
    """

    daemon_threads = True
    # What shutdown waits for: a request that hangs ends by `released`.
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.faults: defaultdict[str, deque[str]] = defaultdict(deque)
        self.head_faults: defaultdict[str, deque[str]] = defaultdict(deque)
        self.gets: Counter[str] = Counter()
        self.heads: Counter[str] = Counter()
        self.etags: dict[str, str] = {}
        self.released = threading.Event()
        self.gate: threading.Event | None = None
        self.arrived = threading.Event()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}{path}"

    def add(self, path: str, content: bytes, *faults: str) -> str:
        self.files[path] = content
        self.faults[path].extend(faults)
        return self.url(path)

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of clients that go away."""


class _Handler(BaseHTTPRequestHandler):
    server: FaultServer

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        path = urlsplit(self.path).path
        self.server.heads[path] += 1
        faults = self.server.head_faults[path]
        self.answer(path, faults.popleft() if faults else "", has_body=False)

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.server.gets[path] += 1
        self.server.arrived.set()
        if self.server.gate is not None:
            self.server.gate.wait(60)
        faults = self.server.faults[path]
        self.answer(path, faults.popleft() if faults else "", has_body=True)

    def answer(self, path: str, fault: str, *, has_body: bool) -> None:
        if fault.isdecimal() or path not in self.server.files:
            self.send_error(int(fault or 404))
            return
        if fault == "hang":
            self.server.released.wait(60)
            return
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            return
        content = self.server.files[path]
        self.send_response(200)
        body = {"wrong": content[:-1] + b"x", "long": content + b"more", "half": content[: len(content) // 2]}
        body = body.get(fault, content)
        if fault != "half":
            self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", self.server.etags.get(path, '"1"'))
        self.end_headers()
        if has_body:
            self.wfile.write(body[: len(body) // 2] if fault == "short" else body)


@pytest.fixture
def fault_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("distill.data.stores.FIRST_DELAY_S", 0.01)
    server = FaultServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    thread.join()
    server.server_close()
