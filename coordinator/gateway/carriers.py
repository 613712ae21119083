"""The two carriers of a conversation (``edgeadapt.formats.gateway.messages``): gRPC for devices, WebSockets for pages.

A service gives its conversations by path, and each runs in the same way over both: one message after the other, until
it returns or raises; ``end_of`` says with which status or close code. A peer presents no TLS certificate, and holds one
of the places of an address from its connection, over gRPC from its call, until the conversation admits it. Pages have a
port of their own: one port for HTTP/2 of gRPC and for HTTP/1.1 of WebSockets takes a reverse proxy."""

import asyncio
import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from typing import Any, ClassVar, NamedTuple, TypeAlias, TypeVar
from urllib.parse import unquote, urlsplit

import grpc
from grpc import StatusCode, aio
from websockets.asyncio.server import Server as SocketServer
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode
from websockets.http11 import Request, Response

from aggregation.errors import ConfigError, EdgeAdaptError, ProtocolError, TrustError
from coordinator.gateway.hub import ComeBack
from coordinator.gateway.pace import TokenBucket
from coordinator.gateway.places import (
    LOOK,
    PROOF,
    Entrance,
    GrpcConnections,
    Places,
    RefusalRates,
    network_of,
    raise_descriptors,
)
from coordinator.servertls import TlsSource, context, credentials
from coordinator.settings import is_loopback
from edgeadapt import traces
from edgeadapt.formats.gateway import messages
from edgeadapt.formats.gateway.messages import RetryWindow

WAITING = 8  # messages of a page that are kept while one is handled
CLOSING = 2.0  # seconds for the end of the conversations
SETTLING = 1.0  # seconds for a message that is being sent when a conversation ends
LOOPBACK = ("127.0.0.1", "localhost", "::1")
HEALTH, SERVING = "grpc.health.v1.Health", b"\x08\x01"  # HealthCheckResponse(status=SERVING)
log = logging.getLogger("edgeadapt.gateway")
T = TypeVar("T")


class HangUp(Exception):  # noqa: N818
    ...


@dataclass(slots=True)
class Carrier(ABC):
    leave: Callable[[], None]
    host: str
    names: frozenset[str]  # names and addresses of this machine that the peer may have connected to
    call: traces.Span  # the span of the conversation until the peer is admitted
    protocol: ClassVar[str]

    @abstractmethod
    async def receive(self) -> bytes:
        """Receive the next message. Raises HangUp, and ProtocolError: it is not one."""

    @abstractmethod
    async def send(self, message: bytes) -> None:
        """Send a message once the peer has room for it. Raises HangUp."""

    def admit(self) -> None:
        self.leave()
        self.call.end()


Conversation: TypeAlias = Callable[[Carrier], Awaitable[None]]


@dataclass(slots=True)
class GrpcCarrier(Carrier):
    protocol = "gRPC"
    parts: AsyncIterator[bytes]
    context: Any  # grpc.aio.ServicerContext, which has no types
    _sending: asyncio.Task[None] | None = None

    async def receive(self) -> bytes:
        try:
            return await anext(self.parts)
        except StopAsyncIteration:
            raise HangUp from None

    async def send(self, message: bytes) -> None:
        self._sending = asyncio.ensure_future(self.context.write(message))
        self._sending.add_done_callback(lambda sent: sent.cancelled() or sent.exception())
        await asyncio.shield(self._sending)  # gRPC can send no status after a message that was cancelled

    async def is_settled(self) -> bool:
        """Whether the last message was sent, which may take a moment. A peer that takes none gets no status either."""
        if self._sending is None:
            return True
        done, _ = await asyncio.wait({self._sending}, timeout=SETTLING)
        return bool(done)


@dataclass(slots=True)
class SocketCarrier(Carrier):
    protocol = "WebSocket"
    connection: ServerConnection

    async def receive(self) -> bytes:
        try:
            raw = await self.connection.recv()
        except ConnectionClosed:
            raise HangUp from None
        if isinstance(raw, str):
            raise ProtocolError("a text message, and not a binary one", about="message.encoding")
        return raw

    async def send(self, message: bytes) -> None:
        try:
            await self.connection.send(message)
        except ConnectionClosed:
            raise HangUp from None


class End(NamedTuple):
    """Status of gRPC, and close code of WebSockets (RFC 6455, section 7.4.1), with which a conversation ends."""

    status: StatusCode
    close: CloseCode
    reason: str
    window: RetryWindow | None = None


def end_of(error: EdgeAdaptError | TimeoutError) -> End:
    """Tell a peer of an error. After the last two the same is refused again; after any other it may succeed."""
    match error:
        case ComeBack(is_over=True):
            return End(StatusCode.OK, CloseCode.GOING_AWAY, str(error), error.window)
        case ComeBack():
            return End(StatusCode.RESOURCE_EXHAUSTED, CloseCode.TRY_AGAIN_LATER, str(error), error.window)
        case TimeoutError():
            return End(StatusCode.DEADLINE_EXCEEDED, CloseCode.TRY_AGAIN_LATER, "too slow, or there are too many peers")
        case ProtocolError():
            return End(StatusCode.INVALID_ARGUMENT, CloseCode.INVALID_DATA, str(error))
        case TrustError():
            return End(StatusCode.PERMISSION_DENIED, CloseCode.POLICY_VIOLATION, str(error))
    return End(StatusCode.UNAVAILABLE, CloseCode.TRY_AGAIN_LATER, "this connection cannot be served now")


@dataclass(slots=True)
class Conversations:
    """What a service says, over either carrier. ``by_path``: path of a call and of a URL → conversation."""

    by_path: Mapping[str, Conversation]
    tls: TlsSource
    _refusals: RefusalRates = field(default_factory=RefusalRates)

    async def run(self, path: str, carrier: Carrier) -> End | None:
        """Have a conversation. Returns how it ends; None if it is over, or the peer is gone."""
        try:
            await self.by_path[path](carrier)
        except HangUp:
            return None
        except (EdgeAdaptError, TimeoutError) as error:
            end = end_of(error)
            if isinstance(error, EdgeAdaptError) and not isinstance(error, ComeBack):
                self._log(error, carrier.host)
            if end.status is not StatusCode.OK:
                carrier.call.fail(end.status.name)
            return end
        finally:
            carrier.call.end()
        return None

    def _log(self, error: EdgeAdaptError, host: str) -> None:
        if self._refusals.wait(host, time.monotonic()):  # it would fill the log
            return
        if isinstance(error, ProtocolError | TrustError):
            log.warning("a device is refused: %s", error)
        else:
            log.error("devices cannot be served: %s", error)


@dataclass(slots=True)
class GrpcCalls:
    """Each call holds a place until it is admitted, and so do health checks."""

    conversations: Conversations
    places: Places = field(default_factory=Places)
    connections: GrpcConnections = field(init=False)

    async def listen(self, address: str, largest: int) -> tuple[aio.Server, int]:
        descriptors = raise_descriptors()
        size, most = "grpc.max_receive_message_length", "grpc.max_allowed_incoming_connections"
        server = aio.server(options=(*messages.GATEWAY_OPTIONS, (size, largest), (most, descriptors // 2)))
        calls = {
            path.rpartition("/")[2]: grpc.stream_stream_rpc_method_handler(partial(self._serve, path))
            for path in self.conversations.by_path
        }
        health = {"Check": grpc.stream_unary_rpc_method_handler(self._check)}  # gRPC waits for no message by itself
        served = {messages.SERVICE: calls, HEALTH: health}
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(*each) for each in served.items()])
        port = server.add_secure_port(address, credentials(self.conversations.tls))
        self.connections = GrpcConnections(port, descriptors * 3 // 8)
        await server.start()
        asyncio.get_running_loop().create_task(self._look())  # ``ConversationServer.close`` ends it
        return server, port

    async def _look(self) -> None:
        ended, lines = 0, TokenBucket(1, 60.0)
        while True:
            await asyncio.sleep(LOOK)
            with suppress(OSError):  # there is no descriptor, but connections have no more than their share
                ended += self.connections.look(time.monotonic())
            if ended and not lines.wait(time.monotonic()):
                log.warning("too many connections: %d that had proved nothing were ended", ended)
                ended = 0

    async def _serve(self, path: str, parts: AsyncIterator[bytes], context: Any) -> None:
        (host, port), call = address_of_peer(context.peer()), traces.begin(path[1:], protocol=GrpcCarrier.protocol)
        peer = network_of(host), port
        try:
            async with self.places.held(host) as place:

                def leave() -> None:
                    self.places.leave(place)
                    self.connections.proved.add(peer)

                carrier = GrpcCarrier(leave, host, self.conversations.tls.newest().hosts, call, parts, context)
                end = await self.conversations.run(path, carrier)
        except TimeoutError as error:
            end = end_of(error)
        finally:
            self.connections.proved.discard(peer)
            call.end()
        if not await carrier.is_settled():
            raise asyncio.CancelledError  # the call is reset
        if end is not None and end.window is not None:
            context.set_trailing_metadata(end.window.metadata())
        if end is not None:
            context.set_details(end.reason)
        if end is not None and end.status is not StatusCode.OK:
            await context.abort(end.status, end.reason)

    async def _check(self, parts: AsyncIterator[bytes], context: Any) -> bytes:
        try:
            async with self.places.held(address_of_peer(context.peer())[0]):
                await anext(parts, b"")
        except TimeoutError:
            await context.abort(StatusCode.DEADLINE_EXCEEDED, "too slow, or there are too many peers")
        return SERVING


@dataclass(frozen=True, slots=True)
class BrowserSettings:
    """Where to listen for browsers. ``address``: ``HOST:PORT``; without TLS on loopback, else with the service's own
    certificate. Port 0: any free one. ``origins``: allowed origins of pages that are not on loopback."""

    address: str
    origins: frozenset[str] = frozenset()

    @property
    def place(self) -> tuple[str, str]:
        host, _, port = self.address.rpartition(":")
        return host.strip("[]"), port


@dataclass(slots=True)
class SocketCalls:
    """Serve the WebSockets of an address. Each holds a place of its entrance until it is admitted."""

    conversations: Conversations
    settings: BrowserSettings
    _entrance: Entrance = field(init=False)

    async def listen(self, largest: int) -> SocketServer:
        host, port = self.settings.place
        try:
            self._entrance = Entrance.listening(host, int(port))
            return await serve(
                self._serve,
                sock=self._entrance,
                process_request=self._check,
                ssl=None if is_loopback(self.settings.address) else context(self.conversations.tls),
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
            text = f"cannot listen for browsers at {self.settings.address}"
            reason = f"{text}: the port is in use, or the address not valid"
            raise ConfigError(reason, about="websocket") from error

    @property
    def _names(self) -> frozenset[str]:
        own = self.conversations.tls.newest().hosts
        return own | frozenset(LOOPBACK) if is_loopback(self.settings.address) else own

    def _check(self, connection: ServerConnection, request: Request) -> Response | None:
        """Refuse a request for another path or host, or of a page of another origin, before it is a WebSocket."""
        origin = request.headers.get("Origin", "")
        if request.path not in self.conversations.by_path:
            return connection.respond(HTTPStatus.NOT_FOUND, "not found\n")
        if host_of(f"//{request.headers.get('Host', '')}") not in self._names:
            return connection.respond(HTTPStatus.MISDIRECTED_REQUEST, "another host\n")
        if origin not in self.settings.origins and host_of(origin) not in LOOPBACK:
            return connection.respond(HTTPStatus.FORBIDDEN, "another origin\n")
        return None

    async def _serve(self, connection: ServerConnection) -> None:
        address, path = connection.remote_address, connection.request.path if connection.request else ""
        call = traces.begin(path[1:], protocol=SocketCarrier.protocol)
        leave = partial(self._entrance.prove, address)
        end = await self.conversations.run(path, SocketCarrier(leave, address[0], self._names, call, connection))
        if end is not None:
            reason = end.reason if end.window is None else f"{end.window.to_text()} {end.reason}"
            # A close reason has at most 123 bytes (RFC 6455, section 5.5).
            await connection.close(end.close, reason.encode()[:120].decode(errors="ignore"))


def host_of(url: str) -> str:
    """In lower case; empty if there is none, or it is not a URL."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def address_of_peer(peer: str) -> tuple[str, int]:
    """Host and port in what gRPC calls a peer.

    >>> address_of_peer("ipv4:192.0.2.7:55012"), address_of_peer("ipv6:%5B2001:db8::1%5D:55012")
    (('192.0.2.7', 55012), ('2001:db8::1', 55012))
    """
    address = f"//{unquote(peer.partition(':')[2])}"
    try:
        return host_of(address) or peer, urlsplit(address).port or 0
    except ValueError:
        return peer, 0


class ConversationServer:
    """A service at its addresses, on an event loop in a thread of its own."""

    def __init__(
        self,
        conversations: Conversations,
        address: str,
        browsers: BrowserSettings | None = None,
        *,
        about: str,
        largest: int = messages.CHUNK,
    ) -> None:
        """Start listening. ``address``: ``HOST:PORT`` for gRPC; port 0 takes any free one. ``browsers``: where to
        listen for pages, if anywhere. Raises ConfigError: an address is in use or not valid, or the TLS files do not
        fit together."""
        self._grpc: aio.Server | None = None
        self._sockets: SocketServer | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=about, daemon=True)
        self._thread.start()
        try:
            self._grpc, self.port = self.call(GrpcCalls(conversations).listen(address, largest))
            if browsers is not None:
                self._sockets = self.call(SocketCalls(conversations, browsers).listen(largest))
        except RuntimeError as error:
            self.close()
            text = f"cannot listen at {address}: the port is in use, or the TLS files do not fit together"
            raise ConfigError(text, about=about) from error
        except ConfigError:
            self.close()
            raise

    def url(self, path: str) -> str:
        """URL at which pages reach the service; empty if it does not listen for them."""
        if self._sockets is None:
            return ""
        host, port = self._sockets.sockets[0].getsockname()[:2]
        address = f"{f'[{host}]' if ':' in host else host}:{port}"
        return f"{'ws' if is_loopback(address) else 'wss'}://{address}{path}"

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def close(self, release: Callable[[], None] = lambda: None) -> None:
        """Stop listening, and end all conversations: ``release`` asks those to end that have begun."""
        if self._loop.is_closed():
            return
        self.call(self._closed(release))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _closed(self, release: Callable[[], None]) -> None:
        if self._sockets is not None:
            self._sockets.close(close_connections=False)
        release()
        if self._grpc is not None:
            await self._grpc.stop(grace=CLOSING)
        if self._sockets is not None:
            try:
                async with asyncio.timeout(CLOSING):
                    await self._sockets.wait_closed()
            except TimeoutError:
                for connection in self._sockets.connections:
                    connection.transport.abort()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
