"""Devices in tabs of a browser as nodes of a Flower grid: their page and WebSockets, on one port of this machine."""

import itertools
import threading
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path
from typing import NamedTuple

from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.sync.server import ServerConnection, serve

from aggregation import wire
from aggregation.steps import RECORD
from client.browser.server import HEADERS, TYPES, Site
from client.node.app import app as client_app
from client.node.step import RefusalCode

PATIENCE = 120  # seconds; the machine of a test run may be busy
NODE = "/node/"  # the path of a node's WebSocket


class Asked(NamedTuple):
    """A request to a device in a tab: a step of the protocol, and the fields of its record."""

    id: int
    step: str
    fields: Mapping[str, bytes]


class Answered(NamedTuple):
    """Its answer, or the reason for its absence."""

    id: int
    body: bytes | None
    reason: bytes


_STEP, _BODY, _ID = wire.text(r"[a-z]{1,16}"), wire.blob(2**29), wire.uint(32)
ASKED = wire.record(Asked, {"id": _ID, "step": _STEP, "fields": wire.mapping(_STEP, _BODY, 8)})
ANSWERED = wire.record(Answered, {"id": _ID, "body": wire.optional(_BODY), "reason": wire.blob(2**10)})


class Bridge:
    """Serves a page, and the WebSockets of nodes. As a client app, it asks a tab if there is one for the node."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.tabs: dict[int, ServerConnection] = {}
        self.asked: list[tuple[int, str]] = []
        self._ids = itertools.count(1)
        self._connected = threading.Condition()
        self._server = serve(
            self._serve, "127.0.0.1", 0, process_request=self._file, compression=None, max_size=None, ping_interval=None
        )
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        """Of the page."""
        return f"http://127.0.0.1:{self._server.socket.getsockname()[1]}/"

    def wait_for(self, *nodes: int) -> None:
        """Return when tabs serve these nodes."""
        with self._connected:
            assert self._connected.wait_for(lambda: self.tabs.keys() >= set(nodes), PATIENCE)

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer a message of the coordinator to a node."""
        node, step = context.node_id, message.metadata.message_type.partition(".")[2]
        if node not in self.tabs:
            return client_app(message, context)
        self.asked.append((node, step))
        record = message.content.config_records[RECORD]
        fields = {name: value for name, value in record.items() if isinstance(value, bytes)}
        try:
            self.tabs[node].send(ASKED.encode(Asked(next(self._ids), step, fields)))
            answer = ANSWERED.decode(bytes(self.tabs[node].recv(PATIENCE)))  # type: ignore[arg-type]
        except ConnectionClosed:
            return Message(Error(RefusalCode.REFUSED, "the tab is closed"), reply_to=message)
        if answer.body is None:
            return Message(Error(RefusalCode.REFUSED, answer.reason.decode()), reply_to=message)
        return Message(RecordDict({RECORD: ConfigRecord({"body": answer.body})}), reply_to=message)

    def close(self) -> None:
        for tab in self.tabs.values():
            tab.close()
        self._server.shutdown()

    def _serve(self, connection: ServerConnection) -> None:
        assert connection.request is not None
        with self._connected:
            self.tabs[int(connection.request.path.removeprefix(NODE))] = connection
            self._connected.notify_all()
        connection.wait_closed()

    def _file(self, _: ServerConnection, request: Request) -> Response | None:
        path = request.path.partition("?")[0].removeprefix("/")
        if request.path.startswith(NODE):
            return None
        found = self.site.find(path)
        if found is None:
            return Response(HTTPStatus.NOT_FOUND, "Not Found", Headers())
        body = found if isinstance(found, bytes) else found.read_bytes()
        kind = TYPES.get(Path(path or "index.html").suffix, "application/octet-stream")
        headers = Headers({**HEADERS, "Content-Type": kind, "Content-Length": str(len(body)), "Connection": "close"})
        return Response(HTTPStatus.OK, "OK", headers, body)
