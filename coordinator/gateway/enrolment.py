"""The authority's enrolment service: a device with an invitation gets its two certificates, a page its one.

A device whose certificates end soon has them renewed, on a port of its own with mutual TLS: gRPC asks for certificates
on all connections of a port or on none. A call or a page holds one of the places of its address until it is answered
(``coordinator.gateway.places``). What is counted is counted after the proof: the calls of an invitation, of a device,
and the refusals of a network. So nobody without credentials uses up what those with credentials may do.

It runs where the authority's key is, not where the coordinator is: a coordinator that could enrol devices could fill a
cohort with its own. It has no state besides the authority's record.
"""

import asyncio
import logging
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeAlias, TypeVar
from urllib.parse import unquote, urlsplit

import grpc
from grpc import StatusCode, aio
from websockets.asyncio.server import Server, ServerConnection
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode

from adapters.gateway import frames, websocket
from adapters.gateway import gateway_pb2 as pb
from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError, EdgeAdaptError, ProtocolError, TrustError
from aggregation.pki import Authority, certificates
from aggregation.pki.tls import TlsKey, TlsRole, read_tls_request
from coordinator.authority import AuthorityStore
from coordinator.authority.record import AuthorityRecord
from coordinator.authority.rules import NOT_REDEEMABLE
from coordinator.authority.store import RECORD
from coordinator.gateway.pace import TokenBucket
from coordinator.gateway.places import Places, RefusalRates
from coordinator.gateway.websocket import BrowserSettings, Endpoint, reason_of, received, url_of
from coordinator.servertls import ServerTls, credentials

NAME = "enrolment"  # in the service's own certificate
OWN_DAYS = 30  # of that certificate; a restart makes another one
THREADS = 4  # of an address of gRPC
ATTEMPTS, PERIOD = 6, 3600.0  # of a device or an invitation in a row, and seconds in which they are regained
LARGEST = 2**14  # bytes of a page's message; a device sends two requests
PAGES = websocket.ENROLMENT_PATH, websocket.RENEWAL_PATH
T = TypeVar("T")
Context: TypeAlias = Any  # grpc.aio.ServicerContext, which has no types
log = logging.getLogger("edgeadapt.enrolment")


class Address(Enum):
    """Where the service listens for gRPC. The value is the option of ``edgeadapt authority serve``."""

    ENROLMENT = "--listen"
    RENEWAL = "--renewal"


class TooManyCallsError(EdgeAdaptError):
    """The same call may succeed after ``wait`` seconds."""

    def __init__(self, wait: float, who: str = "") -> None:
        minutes = math.ceil(wait / 60)
        super().__init__(f"too many calls{who and f' of {who}'}: try again in {minutes} min", about="calls")
        self.wait = wait


@dataclass(slots=True)
class EnrolmentService:
    """The calls.

    Args:
        store: The authority's folder.
        authority: Unlocked.
        days: For which certificates are valid.
    """

    store: AuthorityStore
    authority: Authority
    days: float
    _proved: dict[str, TokenBucket] = field(default_factory=dict)  # by device or invitation
    _refusals: RefusalRates = field(default_factory=RefusalRates)
    _invitations: tuple[tuple[int, int], frozenset[str]] = (0, 0), frozenset()  # state of the record, and those in it
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def enrol(self, raw: bytes) -> bytes:
        """The certificates of a device that has an invitation, as ``Enrolled``.

        Raises:
            ProtocolError: The bytes are no ``EnrolRequest``.
            TooManyCallsError: The invitation was presented too often.
            EdgeAdaptError: As ``AuthorityStore.redeem``.
        """
        asked = frames.enrol_request(raw)
        identity, tls = self.store.redeem(
            self.authority, asked.token, asked.request, asked.tls_request, days=self.days, admit=self._admit_invited
        )
        _log(identity, "is enrolled")
        return bytes(pb.Enrolled(certificate=identity, tls_certificate=tls).SerializeToString())

    def renew(self, raw: bytes, pem: bytes) -> bytes:
        """The next certificates of a device, as ``Enrolled``. ``pem``: the certificate of its connection.

        Raises:
            ProtocolError: The bytes are no ``RenewRequest``.
            TooManyCallsError: The device has renewed too often.
            EdgeAdaptError: As ``AuthorityStore.renew``.
        """
        asked, presented = frames.renew_request(raw), certificates.to_der(pem)
        identity, tls = self.store.renew(
            self.authority,
            presented,
            asked.certificate,
            asked.signature,
            asked.tls_request,
            days=self.days,
            admit=self._admit,
        )
        _log(identity, "is certified again")
        return bytes(pb.Enrolled(certificate=identity, tls_certificate=tls).SerializeToString())

    def enrol_page(self, raw: bytes) -> bytes:
        """The certificate of a page that has an invitation, DER.

        Raises:
            ProtocolError: The bytes are no ``SocketEnrolment``.
            TooManyCallsError: As ``enrol``.
            EdgeAdaptError: As ``AuthorityStore.redeem_signed``.
        """
        asked = websocket.ENROLMENT.decode(raw)
        identity = self.store.redeem_signed(
            self.authority, asked.invited, asked.signature, asked.request, days=self.days, admit=self._admit_invited
        )
        _log(identity, "is enrolled")
        return identity

    def renew_page(self, raw: bytes) -> bytes:
        """The newer certificate of a page, DER.

        Raises:
            ProtocolError: The bytes are no ``SocketRenewal``.
            TooManyCallsError: The page has renewed too often.
            EdgeAdaptError: As ``AuthorityStore.renew_page``.
        """
        asked = websocket.RENEWAL.decode(raw)
        identity = self.store.renew_page(
            self.authority, asked.certificate, asked.signature, days=self.days, admit=self._admit
        )
        _log(identity, "is certified again")
        return identity

    def attempt(self, host: str, certify: Callable[[bytes], bytes], raw: bytes) -> bytes:
        """Call one of the above for a peer at ``host``, and count a refusal.

        Raises:
            TooManyCallsError: The network of ``host`` was refused too often; what is not refused passes anyway.
            EdgeAdaptError: As ``certify``.
        """
        try:
            return certify(raw)
        except TooManyCallsError:
            raise
        except EdgeAdaptError:
            with self._lock:
                wait = self._refusals.wait(host, time.monotonic())
            if wait:
                raise TooManyCallsError(wait) from None
            raise

    def _admit(self, name: str) -> None:
        """Count a call of a device, which has proved its name: nobody else uses up what it may."""
        with self._lock:
            wait = self._proved.setdefault(name, TokenBucket(ATTEMPTS, PERIOD)).wait(time.monotonic())
        if wait:
            raise TooManyCallsError(wait, name)

    def _admit_invited(self, token: str) -> None:
        """Count a call with an invitation. One that does not exist is refused before the record is locked and read."""
        record = AuthorityRecord(self.store.folder / RECORD)
        with self._lock:
            if (state := record.state) != self._invitations[0]:
                self._invitations = state, record.invitations()
        if token not in self._invitations[1]:
            raise TrustError(NOT_REDEEMABLE, about="invitation")
        self._admit(f"the invitation {token[:8]}")


@dataclass(slots=True)
class _Calls:
    """gRPC's calls at an address, with places and threads of its own."""

    service: EnrolmentService
    places: Places = field(default_factory=Places)
    threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(THREADS))

    def handlers(self, address: Address) -> grpc.GenericRpcHandler:
        """A renewal is refused at the address for enrolments, and says where to call.

        On the wire a call with one message is one with a stream of them. gRPC would wait for the message by itself, and
        without an end.
        """
        calls = {"Renew": grpc.stream_unary_rpc_method_handler(self.renew)}
        if address is Address.ENROLMENT:
            calls["Enrol"] = grpc.stream_unary_rpc_method_handler(self.enrol)
        return grpc.method_handlers_generic_handler(frames.ENROLMENT, calls)

    async def enrol(self, parts: AsyncIterator[bytes], context: Context) -> bytes:
        """Certify the keys of a device that has an invitation."""
        return await self._answer(parts, context, self.service.enrol)

    async def renew(self, parts: AsyncIterator[bytes], context: Context) -> bytes:
        """Certify a device again, by the name that the certificate of its connection has."""
        (pem,) = context.auth_context().get("x509_pem_cert", [b""])
        if not pem:
            text = "a renewal takes the device's certificate: call at the address for renewals"
            await context.abort(StatusCode.UNAUTHENTICATED, text)
        return await self._answer(parts, context, lambda raw: self.service.renew(raw, pem))

    async def _answer(self, parts: AsyncIterator[bytes], context: Context, certify: Callable[[bytes], bytes]) -> bytes:
        """Answer, or end the call with the status code that an error means."""
        host = _host_of(context.peer())
        try:
            async with self.places.held(host):
                raw = await anext(parts, b"")
                loop = asyncio.get_running_loop()
                return await loop.run_in_executor(self.threads, self.service.attempt, host, certify, raw)
        except TimeoutError:
            await context.abort(StatusCode.UNAVAILABLE, "the message came too late, or there are too many calls")
        except ProtocolError as error:
            await context.abort(StatusCode.INVALID_ARGUMENT, str(error))
        except TooManyCallsError as error:
            context.set_trailing_metadata(((frames.RETRY_AFTER, str(int(1000 * error.wait) + 1)),))
            await context.abort(StatusCode.RESOURCE_EXHAUSTED, str(error))
        except EdgeAdaptError as error:
            log.warning("a device is refused: %s", error)
            await context.abort(StatusCode.PERMISSION_DENIED, str(error))
        raise AssertionError


def _host_of(peer: str) -> str:
    """The host in what gRPC calls a peer.

    >>> _host_of("ipv4:192.0.2.7:55012"), _host_of("ipv6:%5B2001:db8::1%5D:55012")
    ('192.0.2.7', '2001:db8::1')
    """
    return urlsplit(f"//{unquote(peer.partition(':')[2])}").hostname or peer


def _log(certificate: bytes, what: str) -> None:
    loaded = certificates.load(certificate)
    name, key = certificates.subject(loaded), certificates.identity(loaded)
    log.info("%s %s with the key %s", name, what, key.key_id)


class EnrolmentServer:
    """A running service.

    Args:
        service: The calls.
        address: ``HOST:PORT`` for gRPC; port 0 takes any free one.
        hosts: Names and addresses at which devices reach it.
        browsers: Where to listen for pages, if anywhere.
        renewal: ``HOST:PORT`` at which devices renew their certificates, if anywhere.

    Raises:
        ConfigError: An address is in use or not valid, or a host is neither a name nor an address.
    """

    def __init__(
        self,
        service: EnrolmentService,
        address: str,
        hosts: Sequence[str],
        browsers: BrowserSettings | None = None,
        renewal: str = "",
    ) -> None:
        self.pages: PageEnrolment | None = None
        key = TlsKey.generate(SystemEntropy())
        _, public = read_tls_request(key.request(NAME))
        store, authority = service.store, service.authority
        der = store.issue_tls(authority, NAME, public, TlsRole.GATEWAY, hosts, OWN_DAYS)
        tls = ServerTls(key.pem, certificates.to_pem(der), authority.root.to_pem())
        self._servers: list[aio.Server] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=NAME, daemon=True)
        self._thread.start()
        try:
            self.port = self._call(self._listen(service, Address.ENROLMENT, address, tls))
            self.renewal_port = self._call(self._listen(service, Address.RENEWAL, renewal, tls)) if renewal else 0
            self.pages = PageEnrolment(service, Endpoint(PAGES, browsers, tls)) if browsers else None
            if self.pages:
                self._call(self.pages.listen())
        except ConfigError:
            self.close()
            raise

    async def _listen(self, service: EnrolmentService, at: Address, address: str, tls: ServerTls) -> int:
        own = {"grpc.max_connection_idle_ms": 10_000, "grpc.max_receive_message_length": 2 * LARGEST}
        server = aio.server(options=[*{**dict(frames.GATEWAY_OPTIONS), **own}.items()])
        server.add_generic_rpc_handlers((_Calls(service).handlers(at),))
        try:
            port = int(server.add_secure_port(address, credentials(tls, certified_only=at is Address.RENEWAL)))
        except RuntimeError as error:
            text = f"the enrolment service cannot listen at {address}: the port is in use, or the address not valid"
            raise ConfigError(text, about=at.value, value=address) from error
        await server.start()
        self._servers.append(server)
        return port

    def close(self) -> None:
        """End all calls and connections, and stop listening."""
        self._call(self._closed())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _closed(self) -> None:
        if self.pages:
            await self.pages.close()
        await asyncio.gather(*(server.stop(0.2) for server in self._servers))

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()


@dataclass(slots=True)
class PageEnrolment:
    """The WebSocket of a running service, for pages in a browser: one message each way.

    A close code says what became of it: 1000 the certificate was sent; others as those of the gateway
    (``coordinator.gateway.websocket``).
    """

    service: EnrolmentService
    endpoint: Endpoint
    url: str = ""
    _server: Server | None = None

    async def listen(self) -> None:
        """Start listening.

        Raises:
            ConfigError: The address is in use or not valid.
        """
        self._server = await self.endpoint.listen(self._attend, LARGEST)
        self.url = url_of(self._server, websocket.ENROLMENT_PATH)

    async def _attend(self, connection: ServerConnection) -> None:
        renews = connection.request is not None and connection.request.path == websocket.RENEWAL_PATH
        certify = self.service.renew_page if renews else self.service.enrol_page
        try:
            raw = await received(connection)
            host = connection.remote_address[0]
            await connection.send(await asyncio.to_thread(self.service.attempt, host, certify, raw))
        except ConnectionClosed:
            pass
        except ProtocolError as error:
            await connection.close(CloseCode.INVALID_DATA, reason_of(error))
        except TooManyCallsError as error:
            await connection.close(CloseCode.TRY_AGAIN_LATER, reason_of(error))
        except EdgeAdaptError as error:
            log.warning("a page is refused: %s", error)
            await connection.close(CloseCode.POLICY_VIOLATION, reason_of(error))

    async def close(self) -> None:
        """End all connections, and stop listening."""
        if self._server:
            self._server.close()
            await self._server.wait_closed()
