"""Peers of an HTTP server that speak in bytes, and the server of a bundle in a thread of this process."""

import asyncio
import json
import logging
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h11

from client.inference import server
from client.inference.library import Library

WAIT = 20.0  # seconds for what should happen at once, on a machine that has other work


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        """The refusal, in OpenAI's form."""
        error: dict[str, Any] = json.loads(self.body)["error"]
        assert set(error) == {"message", "type", "code", "param"}
        assert error["code"] == str(self.status)
        assert "\n" not in error["message"]
        return error


def replies(raw: bytes) -> list[Reply]:
    """The answers in what a server sent until it closed. Fails unless they are whole, and HTTP."""
    found = list[Reply]()
    while raw:
        peer = h11.Connection(h11.CLIENT)
        peer.send(h11.Request(method="GET", target="/", headers=[("Host", "a")]))
        peer.send(h11.EndOfMessage())
        peer.receive_data(raw)
        head, body = peer.next_event(), b""
        if isinstance(head, h11.InformationalResponse):
            head = peer.next_event()
        assert isinstance(head, h11.Response), raw[:200]
        if head.headers and not {b"content-length", b"transfer-encoding"} & {name for name, _ in head.headers}:
            peer.receive_data(b"")  # its body ends with the connection
        while isinstance(event := peer.next_event(), h11.Data):
            body += event.data
        assert isinstance(event, h11.EndOfMessage), raw[:200]
        headers = {name.decode().lower(): value.decode() for name, value in head.headers}
        found.append(Reply(head.status_code, headers, body))
        raw = peer.trailing_data[0]
    return found


class Records(logging.Handler):
    """Keeps what any library logs as a warning or worse."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@dataclass(slots=True)
class Site:
    """A server of a bundle that runs in a thread. ``logged``: each warning, with its traceback."""

    port: int
    service: server.Service
    runner: server.Runner
    loop: asyncio.AbstractEventLoop
    logged: list[str] = field(default_factory=list)

    def connect(self, sent: bytes = b"") -> socket.socket:
        peer = socket.create_connection(("127.0.0.1", self.port), WAIT)
        peer.sendall(sent)
        return peer

    def say(self, *parts: bytes) -> list[Reply]:
        """What the server answers until it closes the connection, which it must by itself."""
        with self.connect() as peer:
            with suppress(ConnectionError):  # it may have closed before the last part
                for part in parts:
                    peer.sendall(part)
            return replies(read(peer))

    def ask(self, path: str, body: Any = None, *headers: str, method: str = "") -> Reply:
        """One good request."""
        sent = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = [f"{method or ('GET' if body is None else 'POST')} {path} HTTP/1.1", "Host: 127.0.0.1", *headers]
        lines += ["Connection: close", f"Content-Length: {len(sent)}", "", ""]
        (reply,) = self.say("\r\n".join(lines).encode() + sent)
        return reply

    @property
    def connections(self) -> int:
        return len(self.runner.server_state.connections)


def read(peer: socket.socket) -> bytes:
    """Read until the server closes. Fails if it does not."""
    raw = b""
    with suppress(ConnectionError):
        while part := peer.recv(2**16):
            raw += part
    return raw


@contextmanager
def site(bundle: Path, tenants: server.Tenants | None = None, **limits: Any) -> Iterator[Site]:
    """Serve a bundle. Fails if the server logs a traceback, or does not end."""
    service = server.Service(Library.open(bundle, None), tenants, 1, 2**28)
    runner = server.server_of(service, ["127.0.0.1"], None)
    records, begun, loops = Records(), threading.Event(), list[asyncio.AbstractEventLoop]()
    listening = socket.create_server(("127.0.0.1", 0))
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # as the command does
    port = listening.getsockname()[1]

    async def run() -> None:
        loops.append(asyncio.get_running_loop())
        begun.set()
        await runner.serve([listening])

    logging.getLogger().addHandler(records)
    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    try:
        assert begun.wait(WAIT)
        yield Site(port, service, runner, loops[0], records.lines)
    finally:
        runner.should_exit = runner.force_exit = True
        thread.join(WAIT)
        logging.getLogger().removeHandler(records)
    assert not thread.is_alive()
    assert not [line for line in records.lines if "Traceback" in line]
