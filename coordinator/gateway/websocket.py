"""The gateway for devices in a browser: a WebSocket on an address of its own, for the same hub as gRPC's streams.

A page presents no TLS certificate. It signs a challenge together with the name of the host that its browser connected
to; the gateway accepts only its own names. So a host that passes a challenge of this gateway on to a page cannot use
the signature here (docs/decisions/0061-websocket-for-browsers.md).

Close codes (RFC 6455, section 7.4.1, and IANA's registry): 1001 the gateway needs the device no longer; 1007 the bytes
are no message; 1008 refused; 1013 try again later. The reason has the window in which a device comes back.
"""

import asyncio
import ipaddress
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http import HTTPStatus
from urllib.parse import urlsplit

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode
from websockets.http11 import Request, Response

from adapters.gateway import frames, websocket
from adapters.gateway.frames import RetryWindow
from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError, EdgeAdaptError, ProtocolError, TrustError
from coordinator import traces
from coordinator.gateway.hub import Channel, Credentials, NoAnswer, Released, Stream
from coordinator.gateway.places import PROOF, Entrance, RefusalRates
from coordinator.gateway.server import CLOSING, Gateway, Service, require_version
from coordinator.servertls import TlsSource, context

WAITING = 8  # messages of a device that are kept while one is handled
LOOPBACK = ("127.0.0.1", "localhost", "::1")
log = logging.getLogger("edgeadapt.gateway")


@dataclass(frozen=True, slots=True)
class BrowserSettings:
    """Where to listen for browsers.

    Attributes:
        address: ``HOST:PORT``; without TLS on loopback, else with the gateway's own certificate. Port 0: any free one.
        origins: Of pages that are not on loopback.
    """

    address: str
    origins: frozenset[str] = frozenset()

    @property
    def place(self) -> tuple[str, str]:
        host, _, port = self.address.rpartition(":")
        return host.strip("[]"), port

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches the address."""
        return _is_loopback(self.place[0])


@dataclass(slots=True)
class Endpoint:
    """Which connections of pages are opened.

    Args:
        paths: The only ones.
        settings: The address, and the origins of pages elsewhere.
        tls: Its certificate has the names of this host; on loopback, its names are added.
    """

    paths: tuple[str, ...]
    settings: BrowserSettings
    tls: TlsSource
    entrance: Entrance = field(init=False)

    def check(self, connection: ServerConnection, request: Request) -> Response | None:
        """Refuse a request for another path or host, or of a page of another origin, before it is a WebSocket."""
        origin = request.headers.get("Origin", "")
        if request.path not in self.paths:
            return connection.respond(HTTPStatus.NOT_FOUND, "not found\n")
        if host_of(f"//{request.headers.get('Host', '')}") not in self._hosts():
            return connection.respond(HTTPStatus.MISDIRECTED_REQUEST, "another host\n")
        if origin not in self.settings.origins and host_of(origin) not in LOOPBACK:
            return connection.respond(HTTPStatus.FORBIDDEN, "another origin\n")
        return None

    def _hosts(self) -> frozenset[str]:
        return self.tls.newest().hosts | frozenset(LOOPBACK if self.settings.is_loopback else ())

    async def listen(self, attend: Callable[[ServerConnection], Awaitable[None]], largest: int) -> Server:
        """A server whose connections ``attend`` serves. Each holds a place of ``entrance`` until it is proved.

        Args:
            attend: Serves a connection until it ends.
            largest: Size of a message that is received, in bytes.

        Raises:
            ConfigError: The address is in use or not valid.
        """
        host, port = self.settings.place
        try:
            self.entrance = Entrance.listening(host, int(port))
            return await serve(
                attend,
                sock=self.entrance,
                process_request=self.check,
                ssl=None if self.settings.is_loopback else context(self.tls),
                compression=None,
                open_timeout=PROOF,
                ping_interval=30,
                ping_timeout=20,
                close_timeout=5,
                max_size=largest,
                max_queue=WAITING,
                server_header=None,
            )
        except (OSError, ValueError, OverflowError) as error:
            text = (
                f"cannot listen for browsers at {self.settings.address}: the port is in use, or the address not valid"
            )
            raise ConfigError(text, about="websocket", value=self.settings.address) from error


@dataclass(slots=True)
class BrowserService:
    """What a connection of a page may do."""

    service: Service
    endpoint: Endpoint
    _refusals: RefusalRates = field(default_factory=RefusalRates)

    async def attend(self, connection: ServerConnection) -> None:
        """Send requests to a device, and take its answers, until the connection ends."""
        call = traces.begin(f"{frames.SERVICE}/Attend", protocol=Channel.WEBSOCKET.value)

        async def refuse(code: CloseCode, reason: str) -> None:
            call.fail(code.name)
            await connection.close(code, reason)

        try:
            credentials = await self._identified(connection)
            if (window := self._too_early(credentials.device)) is not None:
                await refuse(CloseCode.TRY_AGAIN_LATER, _text(window))
                return
            await self._exchange(connection, credentials, call)
        except ConnectionClosed as error:
            if (failure := failure_of(error)) is not None:
                call.fail(failure)
        except TimeoutError:
            await refuse(CloseCode.POLICY_VIOLATION, "too slow")
        except (ProtocolError, TrustError) as error:
            if not self._refusals.wait(connection.remote_address[0], time.monotonic()):  # else it would fill the log
                log.warning("a browser is refused: %s", error)
            code = CloseCode.INVALID_DATA if isinstance(error, ProtocolError) else CloseCode.POLICY_VIOLATION
            await refuse(code, reason_of(error))
        except EdgeAdaptError as error:
            log.error("browsers cannot be served: %s", error)
            await refuse(CloseCode.TRY_AGAIN_LATER, "the gateway cannot serve this connection now")
        finally:
            call.end()

    async def _identified(self, connection: ServerConnection) -> Credentials:
        nonce = SystemEntropy().bytes(websocket.NONCE)
        await connection.send(websocket.CHALLENGE.encode(websocket.SocketChallenge(nonce)))
        hello = websocket.HELLO.decode(await received(connection))
        require_version(hello.version, self.service.limits.client_version)
        host = host_of(f"//{connection.request.headers['Host']}") if connection.request else ""
        at = datetime.now(UTC)
        device = self.service.root(at).verify(hello.certificate, at)[0]
        proof = nonce + host.encode(), hello.certificate, hello.binding
        found = Credentials(device, *proof, hello.version, Channel.WEBSOCKET)
        self.service.verify(found, at)
        self.endpoint.entrance.prove(connection.remote_address)
        return found

    def _too_early(self, device: str) -> RetryWindow | None:
        if wait := self.service.count_call(device):
            return RetryWindow(wait, wait)
        rejected = self.service.rejected(device)
        return None if rejected is None else rejected[1]

    async def _exchange(self, connection: ServerConnection, credentials: Credentials, call: traces.Span) -> None:
        stream = self.service.hub.open(credentials)
        log.info("%s is connected by a browser", credentials.device)
        sending = asyncio.create_task(self._send(connection, stream))
        try:
            await connection.send(websocket.ADMITTED)
            call.end()  # for how long a device stays is not measured
            while True:
                await self._answer(connection, stream)
        finally:
            sending.cancel()
            self.service.hub.closed(stream)
            log.info("%s is disconnected", credentials.device)

    async def _send(self, connection: ServerConnection, stream: Stream) -> None:
        """Requests, until the gateway ends the stream."""
        try:
            while True:
                asked = await self.service.hub.next(stream)
                request = websocket.SocketRequest(asked.id, asked.step, asked.fields)
                async with asyncio.timeout(self.service.limits.transfer):
                    await connection.send(websocket.REQUEST.encode(request))
        except ConnectionClosed:
            pass
        except TimeoutError:
            await connection.close(CloseCode.POLICY_VIOLATION, "too slow")
        except Released:
            window = self.service.accepted(stream.credentials.device)
            await connection.close(CloseCode.GOING_AWAY, _text(window))
        except EdgeAdaptError as error:
            await connection.close(CloseCode.POLICY_VIOLATION, reason_of(error))

    async def _answer(self, connection: ServerConnection, stream: Stream) -> None:
        """Take one answer. One that is void is received and dropped."""
        raw = await received(connection)
        name = f"{frames.SERVICE}/Answer"
        with traces.span(name, within=self.service.asked_by, protocol=Channel.WEBSOCKET.value) as call:
            answer = websocket.ANSWER.decode(raw)
            device = stream.credentials.device
            if self.service.count_call(device) or not self.service.has_room(device, answer.size):
                raise EdgeAdaptError("too many calls, or too many answers at once", about="gateway.busy", value=device)
            found: bytes | NoAnswer = NoAnswer(answer.code, answer.reason.decode(errors="replace"))
            if answer.size:
                async with asyncio.timeout(self.service.limits.transfer) as patience:
                    with self.service.receiving(device, answer.size, patience):
                        found = await _body(connection, answer.size)
            try:
                self.service.hub.answer(stream, answer.id, found)
            except ProtocolError as error:
                call.fail(type(error).__name__)
                log.warning("an answer of %s is dropped: %s", device, error)


async def _body(connection: ServerConnection, size: int) -> bytes:
    body = bytearray()
    while len(body) < size:
        part = await received(connection)
        if not 0 < len(part) <= frames.CHUNK or len(body) + len(part) > size:
            raise ProtocolError(f"the answer has not the {size} bytes that it began with", about="answer.size")
        body += part
    return bytes(body)


async def received(connection: ServerConnection) -> bytes:
    """The next message. Raises ProtocolError: it is a text."""
    raw = await connection.recv()
    if isinstance(raw, str):
        raise ProtocolError("a text message, and not a binary one", about="message.encoding")
    return raw


def failure_of(error: ConnectionClosed) -> str | None:
    """The name of the code with which a peer closed a connection; None if it did so in order."""
    code = CloseCode.ABNORMAL_CLOSURE if error.rcvd is None else error.rcvd.code
    if code in (CloseCode.NORMAL_CLOSURE, CloseCode.GOING_AWAY):
        return None
    return CloseCode(code).name if code in set(CloseCode) else "OTHER"  # private codes are many


def host_of(url: str) -> str:
    """The host in a URL, in lower case; empty if it has none, or is no URL."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _text(window: RetryWindow) -> str:
    ((_, text),) = window.metadata()
    return text


def reason_of(error: EdgeAdaptError) -> str:
    """An error as a close reason."""
    return str(error).encode()[:120].decode(errors="ignore")  # a close reason has at most 123 bytes (RFC 6455)


class BrowserServer:
    """The WebSockets of a running gateway, which must be closed before it."""

    def __init__(self, gateway: Gateway, settings: BrowserSettings, tls: TlsSource) -> None:
        """Start listening.

        Raises:
            ConfigError: The address is in use or not valid.
        """
        self._gateway = gateway
        browsers = BrowserService(gateway.service, Endpoint((websocket.PATH,), settings, tls))
        self._server = gateway.call(browsers.endpoint.listen(browsers.attend, frames.MAX_MESSAGE))
        self.url = url_of(self._server, websocket.PATH)

    def close(self) -> None:
        """End all connections and stop listening. The devices that are there come back within their windows."""
        self._gateway.call(self._closed())

    async def _closed(self) -> None:
        self._server.close(close_connections=False)
        self._gateway.service.release()
        try:
            async with asyncio.timeout(CLOSING):
                await self._server.wait_closed()
        except TimeoutError:
            for connection in self._server.connections:
                connection.transport.abort()


def url_of(server: Server, path: str) -> str:
    """At which a server that listens is reached."""
    host, port = server.sockets[0].getsockname()[:2]
    scheme = "ws" if _is_loopback(host) else "wss"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}{path}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
