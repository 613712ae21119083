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
import ssl
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from urllib.parse import urlsplit

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode
from websockets.http11 import Request, Response

from adapters.gateway import frames, websocket
from adapters.gateway.frames import RetryWindow
from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError, EdgeAdaptError, ProtocolError, TrustError
from aggregation.pki.certificates import to_der
from aggregation.pki.tls import hosts_of
from coordinator.gateway.hub import Channel, Credentials, NoAnswer, Released, Stream
from coordinator.gateway.server import CLOSING, Gateway, ServerTls, Service, require_version

HANDSHAKE = 10.0  # seconds for TLS and HTTP, and again for the answer to the challenge
STRANGERS = 256  # connections that have not answered the challenge yet
WAITING = 8  # messages of a device that are kept while one is handled
LOOPBACK = ("127.0.0.1", "localhost", "::1")
log = logging.getLogger("edgeadapt.gateway")


@dataclass(slots=True)
class BrowserService:
    """What a connection of a page may do. ``hosts``: names of this gateway; ``origins``: of pages elsewhere."""

    service: Service
    hosts: frozenset[str]
    origins: frozenset[str]
    _strangers: int = 0

    def check(self, connection: ServerConnection, request: Request) -> Response | None:
        """Refuse a request for another path or host, or of a page of another origin, before it is a WebSocket."""
        origin = request.headers.get("Origin", "")
        if request.path != websocket.PATH:
            return connection.respond(HTTPStatus.NOT_FOUND, "not found\n")
        if _host(f"//{request.headers.get('Host', '')}") not in self.hosts:
            return connection.respond(HTTPStatus.MISDIRECTED_REQUEST, "another host\n")
        if origin not in self.origins and _host(origin) not in LOOPBACK:
            return connection.respond(HTTPStatus.FORBIDDEN, "another origin\n")
        if self._strangers >= STRANGERS:
            return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, "too many connections\n")
        return None

    async def attend(self, connection: ServerConnection) -> None:
        """Send requests to a device, and take its answers, until the connection ends."""
        try:
            credentials = await self._identified(connection)
            if (window := self._too_early(credentials.device)) is not None:
                await connection.close(CloseCode.TRY_AGAIN_LATER, _text(window))
                return
            await self._exchange(connection, credentials)
        except ConnectionClosed:
            pass
        except TimeoutError:
            await connection.close(CloseCode.POLICY_VIOLATION, "too slow")
        except ProtocolError as error:
            log.warning("a browser is refused: %s", error)
            await connection.close(CloseCode.INVALID_DATA, _reason(error))
        except TrustError as error:
            log.warning("a browser is refused: %s", error)
            await connection.close(CloseCode.POLICY_VIOLATION, _reason(error))
        except EdgeAdaptError as error:
            log.error("browsers cannot be served: %s", error)
            await connection.close(CloseCode.TRY_AGAIN_LATER, "the gateway cannot serve this connection now")

    async def _identified(self, connection: ServerConnection) -> Credentials:
        self._strangers += 1
        try:
            async with asyncio.timeout(HANDSHAKE):
                nonce = SystemEntropy().bytes(websocket.NONCE)
                await connection.send(websocket.CHALLENGE.encode(websocket.SocketChallenge(nonce)))
                hello = websocket.HELLO.decode(await _received(connection))
        finally:
            self._strangers -= 1
        require_version(hello.version, self.service.limits.client_version)
        host = _host(f"//{connection.request.headers['Host']}") if connection.request else ""
        at = datetime.now(UTC)
        device = self.service.root(at).verify(hello.certificate, at)[0]
        proof = nonce + host.encode(), hello.certificate, hello.binding
        found = Credentials(device, *proof, hello.version, Channel.WEBSOCKET)
        self.service.verify(found, at)
        return found

    def _too_early(self, device: str) -> RetryWindow | None:
        if wait := self.service.count_call(device):
            return RetryWindow(wait, wait)
        rejected = self.service.rejected(device)
        return None if rejected is None else rejected[1]

    async def _exchange(self, connection: ServerConnection, credentials: Credentials) -> None:
        stream = self.service.hub.open(credentials)
        log.info("%s is connected by a browser", credentials.device)
        sending = asyncio.create_task(self._send(connection, stream))
        try:
            await connection.send(websocket.ADMITTED)
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
            await connection.close(CloseCode.POLICY_VIOLATION, _reason(error))

    async def _answer(self, connection: ServerConnection, stream: Stream) -> None:
        """Take one answer. One that is void is received and dropped."""
        answer = websocket.ANSWER.decode(await _received(connection))
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
            log.warning("an answer of %s is dropped: %s", device, error)


async def _body(connection: ServerConnection, size: int) -> bytes:
    body = bytearray()
    while len(body) < size:
        part = await _received(connection)
        if not 0 < len(part) <= frames.CHUNK or len(body) + len(part) > size:
            raise ProtocolError(f"the answer has not the {size} bytes that it began with", about="answer.size")
        body += part
    return bytes(body)


async def _received(connection: ServerConnection) -> bytes:
    raw = await connection.recv()
    if isinstance(raw, str):
        raise ProtocolError("a text message, and not a binary one", about="message.encoding")
    return raw


def _host(url: str) -> str:
    """The host in a URL, in lower case; empty if it has none, or is no URL."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _text(window: RetryWindow) -> str:
    ((_, text),) = window.metadata()
    return text


def _reason(error: EdgeAdaptError) -> str:
    return str(error).encode()[:120].decode(errors="ignore")  # a close reason has at most 123 bytes (RFC 6455)


@dataclass(frozen=True, slots=True)
class BrowserSettings:
    """Where to listen for browsers.

    Attributes:
        address: ``HOST:PORT``; without TLS on loopback, else with the gateway's own certificate. Port 0: any free one.
        origins: Of pages that are not on loopback.
    """

    address: str
    origins: frozenset[str] = frozenset()


class BrowserServer:
    """The WebSockets of a running gateway, which must be closed before it."""

    def __init__(self, gateway: Gateway, settings: BrowserSettings, tls: ServerTls) -> None:
        """Start listening.

        Raises:
            ConfigError: The address is in use or not valid.
        """
        self._gateway = gateway
        self._server = gateway.call(_listen(gateway.service, settings, tls))
        host, port = self._server.sockets[0].getsockname()[:2]
        scheme = "ws" if _is_loopback(host) else "wss"
        self.url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}{websocket.PATH}"

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


async def _listen(service: Service, settings: BrowserSettings, tls: ServerTls) -> Server:
    host, _, port = settings.address.rpartition(":")
    host = host.strip("[]")
    local = _is_loopback(host)
    names = frozenset(name.lower() for name in hosts_of(to_der(tls.certificate)))
    browsers = BrowserService(service, names | frozenset(LOOPBACK if local else ()), settings.origins)
    try:
        return await serve(
            browsers.attend,
            host,
            int(port),
            process_request=browsers.check,
            ssl=None if local else _context(tls),
            compression=None,
            open_timeout=HANDSHAKE,
            ping_interval=30,
            ping_timeout=20,
            close_timeout=5,
            max_size=frames.MAX_MESSAGE,
            max_queue=WAITING,
            server_header=None,
        )
    except (OSError, ValueError, OverflowError) as error:
        why = "the port is in use, or the address not valid"
        raise ConfigError(
            f"the gateway cannot listen for browsers at {settings.address}: {why}",
            about="gateway.websocket",
            value=settings.address,
        ) from error


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _context(tls: ServerTls) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    with tempfile.NamedTemporaryFile() as file:  # the standard library reads keys from files only; this one is private
        file.write(tls.key + b"\n" + tls.certificate)
        file.flush()
        context.load_cert_chain(Path(file.name))
    return context
