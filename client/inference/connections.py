"""The connections of ``server``: HTTP/1.1 that has one meaning, within bounds of time.

What is not HTTP, or says in two ways where its body ends (RFC 9112, section 6.3), is refused in one line, and its
connection closed: a proxy could read what follows as another request. Nothing of it is logged. ``server`` decides what
is answered; uvicorn and h11 read and write.
"""

import asyncio
import json
import logging
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_HEAD = 2**14  # bytes of a request before its body
PATIENCE = 30.0  # seconds to send a body, or to read a piece of an answer
IDLE = 15  # seconds between two requests, and before the first; clients of OpenAI close after 5
SPARE = 5.0  # seconds more for a whole request: the application refuses a slow body by itself before
LINGER = 2.0  # seconds in which a peer that still sends can read why it is refused
QUIET = logging.Logger("edgeadapt.device.gone", logging.CRITICAL + 1)


def error_body(status: int, message: str, about: str | None = None) -> bytes:
    """Write a refusal in OpenAI's form."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    error = {"message": message, "type": kind, "code": str(status), "param": about}
    return json.dumps({"error": error}, ensure_ascii=False).encode()


class _Reader(h11.Connection):
    """Refuses what h11 lets pass: another version, a body with a length and chunks, and chunks of HTTP/1.0 (RFC 9112,
    section 6.1)."""

    def __init__(self, size: int, refuse: Callable[[int, str], None]) -> None:
        super().__init__(h11.SERVER, size)
        self._say = refuse

    def next_event(self) -> Any:
        try:
            event = super().next_event()
            if isinstance(event, h11.Request):
                if event.http_version not in (b"1.0", b"1.1"):
                    raise h11.RemoteProtocolError("another version", error_status_hint=505)
                names = {name for name, _ in event.headers}
                if b"transfer-encoding" in names and (b"content-length" in names or event.http_version < b"1.1"):
                    raise h11.RemoteProtocolError("Transfer-Encoding with Content-Length, or before HTTP/1.1")
        except h11.RemoteProtocolError as error:  # of which uvicorn would log each
            self._say(error.error_status_hint, f"this is not a request of HTTP/1.1: {str(error).partition(':')[0]}")
            return h11.NEED_DATA
        return event


class Connection(H11Protocol):
    """A connection, which ends ``IDLE`` seconds after an answer, or if a request or the reading of its answer takes too
    long."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn = _Reader(MAX_HEAD, self._refuse)
        self._slow: asyncio.TimerHandle | None = None  # of the request that is being read
        self._unread: asyncio.TimerHandle | None = None  # of the answer
        self._ending: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.abandon()
        self._unset_keepalive_if_required()
        for timer in (self._slow, self._unread, self._ending):
            if timer:
                timer.cancel()

    def data_received(self, data: bytes) -> None:
        if not self._ending:
            super().data_received(data)

    def handle_events(self) -> None:
        super().handle_events()
        state = self.conn.their_state
        reads = state is h11.SEND_BODY or (state is h11.IDLE and self.conn.trailing_data[0])
        if self._slow and not reads:
            self._slow.cancel()
            self._slow = None
        elif reads and not self._slow:
            reason = f"the request did not come within {PATIENCE:.0f} s"
            self._slow = self.loop.call_later(PATIENCE + SPARE, self._refuse, 408, reason)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(PATIENCE, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread:
            self._unread.cancel()

    def abandon(self) -> None:
        """Leave an answer without a reader: what cancels it is no error."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            self.cycle.logger = QUIET

    def _should_upgrade(self) -> bool:
        return False  # a server need not, and uvicorn would log each one

    def _refuse(self, status: int, reason: str) -> None:
        """Say why, if an answer was not begun, and close."""
        if self.transport.is_closing() or self._ending:
            return
        self.abandon()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = error_body(status, reason)
            headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
            for event in (
                h11.Response(status_code=status, headers=list(headers.items())),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self._ending = self.loop.call_later(LINGER, self.transport.abort)
        if self.transport.can_write_eof():  # TLS cannot
            self.transport.write_eof()
        else:
            self.transport.close()
