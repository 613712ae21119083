"""A dashboard on this machine's loopback, in a thread, and what peers of it send."""

import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from threading import Thread
from typing import Any

import pytest

from coordinator.dashboard import server
from coordinator.dashboard.server import DashboardServer, serve
from coordinator.gateway.places import Entrance
from tests.support.gateway import HOST, free_port, wait_until

TOKEN = "a" * 64
WAIT = 20.0  # seconds for an answer, on a machine that has other work


@dataclass
class Dashboard:
    """Where it listens, and its socket."""

    port: int
    entrance: Entrance

    def connect(self, sent: bytes = b"", source: str = HOST) -> socket.socket:
        """A connection from an address of loopback, on which something was sent."""
        peer = socket.create_connection((HOST, self.port), WAIT, (source, 0))
        peer.sendall(sent)
        return peer

    def ask(self, path: str, *, source: str = HOST, method: str = "GET", body: str = "", **headers: str) -> Any:
        """Status, text and headers of an answer."""
        connection = HTTPConnection(HOST, self.port, timeout=WAIT, source_address=(source, 0))
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read().decode(), answer.headers
        finally:
            connection.close()


@contextmanager
def dashboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[Dashboard]:
    """Serve an empty fleet while the block runs."""
    port, made, run = free_port(), list[tuple[DashboardServer, Entrance]](), DashboardServer.run
    with monkeypatch.context() as patch:
        patch.setattr(server, "STOPPING", 1)
        patch.setattr(DashboardServer, "run", lambda self, sockets: made.append((self, *sockets)) or run(self, sockets))
        serving = Thread(target=serve, args=(dict, TOKEN, f"{HOST}:{port}", None), daemon=True)
        serving.start()
        wait_until(lambda: made and made[0][0].started)
    running, entrance = made[0]
    try:
        yield Dashboard(port, entrance)
    finally:
        running.handle_exit(signal.SIGTERM, None)
        serving.join(WAIT)
