"""The authority's enrolment service: a device with an invitation gets its two certificates, a page its one.

A device whose certificates end soon has them renewed, on a port of its own with mutual TLS: gRPC asks for certificates
on all connections of a port or on none. Each address of gRPC has its own threads, and each kind of call its own limit:
whoever floods one that takes no certificate does not keep devices and pages from renewing theirs.

It runs where the authority's key is, not where the coordinator is: a coordinator that could enrol devices could fill a
cohort with its own. It has no state besides the authority's record.
"""

import asyncio
import logging
import math
import threading
import time
from collections.abc import Coroutine, Iterator, Sequence
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeVar

import grpc
from grpc import StatusCode
from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode

from adapters.gateway import frames, websocket
from adapters.gateway import gateway_pb2 as pb
from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError, EdgeAdaptError, ProtocolError
from aggregation.pki import Authority, certificates
from aggregation.pki.tls import TlsKey, TlsRole, read_tls_request
from coordinator.authority import AuthorityStore
from coordinator.gateway.pace import TokenBucket
from coordinator.gateway.websocket import BrowserSettings, Endpoint, reason_of, received, url_of
from coordinator.servertls import ServerTls, credentials

NAME = "enrolment"  # in the service's own certificate
OWN_DAYS = 30  # of that certificate; a restart makes another one
THREADS = 4  # of an address
CALLS, REGAINED = 64, 30.0  # of a kind: calls in a row, and seconds in which all are regained
RENEWALS, PERIOD = 6, 3600.0  # of one device in a row, and seconds in which it regains them
LARGEST = 2**14  # bytes of a page's message
T = TypeVar("T")
log = logging.getLogger("edgeadapt.enrolment")


class Address(Enum):
    """Where the service listens for gRPC. The value is the option of ``edgeadapt authority serve``."""

    ENROLMENT = "--listen"
    RENEWAL = "--renewal"


class CallKind(Enum):
    """What is counted apart: a flood of one kind uses up no call of another."""

    ENROLMENT = "enrolment"
    RENEWAL = "renewal"
    PAGE_ENROLMENT = "enrolment of a page"
    PAGE_RENEWAL = "renewal of a page"


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
    _calls: dict[CallKind, TokenBucket] = field(
        default_factory=lambda: {kind: TokenBucket(CALLS, REGAINED) for kind in CallKind}
    )
    _renewals: dict[str, TokenBucket] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def handlers(self, address: Address) -> grpc.GenericRpcHandler:
        """For gRPC's server at an address. A renewal is refused at the one for enrolments, and says where to call."""
        calls = {"Renew": grpc.unary_unary_rpc_method_handler(self.renew)}
        if address is Address.ENROLMENT:
            calls["Enrol"] = grpc.unary_unary_rpc_method_handler(self.enrol)
        return grpc.method_handlers_generic_handler(frames.ENROLMENT, calls)

    def enrol(self, raw: bytes, context: grpc.ServicerContext) -> bytes:
        """Certify the keys of a device that has an invitation."""
        with _refusing(context, "an enrolment"):
            self.count(CallKind.ENROLMENT)
            asked = frames.enrol_request(raw)
            identity, tls = self.store.redeem(
                self.authority, asked.token, asked.request, asked.tls_request, days=self.days
            )
        _log(identity, "is enrolled")
        return bytes(pb.Enrolled(certificate=identity, tls_certificate=tls).SerializeToString())

    def renew(self, raw: bytes, context: grpc.ServicerContext) -> bytes:
        """Certify a device again, by the name that the certificate of its connection has."""
        (pem,) = context.auth_context().get("x509_pem_cert", [b""])
        if not pem:
            text = "a renewal takes the device's certificate: call at the address for renewals"
            context.abort(StatusCode.UNAUTHENTICATED, text)
        with _refusing(context, "a renewal"):
            self.count(CallKind.RENEWAL)
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
            TooManyCallsError: As ``count``.
            EdgeAdaptError: As ``AuthorityStore.redeem_signed``.
        """
        self.count(CallKind.PAGE_ENROLMENT)
        asked = websocket.ENROLMENT.decode(raw)
        identity = self.store.redeem_signed(
            self.authority, asked.invited, asked.signature, asked.request, days=self.days
        )
        _log(identity, "is enrolled")
        return identity

    def renew_page(self, raw: bytes) -> bytes:
        """The newer certificate of a page, DER.

        Raises:
            ProtocolError: The bytes are no ``SocketRenewal``.
            TooManyCallsError: The page has renewed too often, or as ``count``.
            EdgeAdaptError: As ``AuthorityStore.renew_page``.
        """
        self.count(CallKind.PAGE_RENEWAL)
        asked = websocket.RENEWAL.decode(raw)
        identity = self.store.renew_page(
            self.authority, asked.certificate, asked.signature, days=self.days, admit=self._admit
        )
        _log(identity, "is certified again")
        return identity

    def count(self, kind: CallKind) -> None:
        """Count a call.

        Raises:
            TooManyCallsError: There were too many of its kind, of all devices together.
        """
        self._take(self._calls[kind])

    def _admit(self, name: str) -> None:
        """Count a renewal of a device, which has proved its name: nobody else uses up what it may."""
        self._take(self._renewals.setdefault(name, TokenBucket(RENEWALS, PERIOD)), name)

    def _take(self, bucket: TokenBucket, who: str = "") -> None:
        with self._lock:
            wait = bucket.wait(time.monotonic())
        if wait:
            raise TooManyCallsError(wait, who)


@contextmanager
def _refusing(context: grpc.ServicerContext, what: str) -> Iterator[None]:
    """End a call with the status code that an error means."""
    try:
        yield
    except ProtocolError as error:
        context.abort(StatusCode.INVALID_ARGUMENT, str(error))
    except TooManyCallsError as error:
        context.set_trailing_metadata(((frames.RETRY_AFTER, str(int(1000 * error.wait) + 1)),))
        context.abort(StatusCode.RESOURCE_EXHAUSTED, str(error))
    except EdgeAdaptError as error:
        log.warning("%s is refused: %s", what, error)
        context.abort(StatusCode.PERMISSION_DENIED, str(error))


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
        key = TlsKey.generate(SystemEntropy())
        _, public = read_tls_request(key.request(NAME))
        store, authority = service.store, service.authority
        der = store.issue_tls(authority, NAME, public, TlsRole.GATEWAY, hosts, OWN_DAYS)
        tls = ServerTls(key.pem, certificates.to_pem(der), authority.root.to_pem())
        self._servers: list[grpc.Server] = []
        self.port = self._listen(service, Address.ENROLMENT, address, tls)
        self.renewal_port = self._listen(service, Address.RENEWAL, renewal, tls) if renewal else 0
        self.pages = PageEnrolmentServer(service, browsers, tls) if browsers else None
        for server in self._servers:
            server.start()

    def _listen(self, service: EnrolmentService, at: Address, address: str, tls: ServerTls) -> int:
        options = [*frames.GATEWAY_OPTIONS, ("grpc.max_connection_idle_ms", 10_000)]
        server = grpc.server(futures.ThreadPoolExecutor(THREADS), options=options, maximum_concurrent_rpcs=CALLS)
        server.add_generic_rpc_handlers((service.handlers(at),))
        self._servers.append(server)
        try:
            return int(server.add_secure_port(address, credentials(tls, certified_only=at is Address.RENEWAL)))
        except RuntimeError as error:
            text = f"the enrolment service cannot listen at {address}: the port is in use, or the address not valid"
            raise ConfigError(text, about=at.value, value=address) from error

    def close(self) -> None:
        """Stop listening."""
        if self.pages:
            self.pages.close()
        for stopped in [server.stop(0.2) for server in self._servers]:
            stopped.wait()


class PageEnrolmentServer:
    """The WebSocket of a running service, for pages in a browser: one message each way.

    A close code says what became of it: 1000 the certificate was sent; others as those of the gateway
    (``coordinator.gateway.websocket``).
    """

    def __init__(self, service: EnrolmentService, settings: BrowserSettings, tls: ServerTls) -> None:
        """Start listening.

        Raises:
            ConfigError: The address is in use or not valid.
        """
        self._service = service
        self._endpoint = Endpoint((websocket.ENROLMENT_PATH, websocket.RENEWAL_PATH), settings, tls)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=NAME, daemon=True)
        self._thread.start()
        try:
            self._server = self._call(self._endpoint.listen(self._attend, LARGEST))
        except ConfigError:
            self._end()
            raise
        self.url = url_of(self._server, websocket.ENROLMENT_PATH)

    async def _attend(self, connection: ServerConnection) -> None:
        try:
            async with self._endpoint.stranger(connection):
                raw = await received(connection)
            renews = connection.request is not None and connection.request.path == websocket.RENEWAL_PATH
            certify = self._service.renew_page if renews else self._service.enrol_page
            await connection.send(await asyncio.to_thread(certify, raw))
        except ConnectionClosed:
            pass
        except TimeoutError:
            await connection.close(CloseCode.POLICY_VIOLATION, "too slow")
        except ProtocolError as error:
            await connection.close(CloseCode.INVALID_DATA, reason_of(error))
        except TooManyCallsError as error:
            await connection.close(CloseCode.TRY_AGAIN_LATER, reason_of(error))
        except EdgeAdaptError as error:
            log.warning("a page is refused: %s", error)
            await connection.close(CloseCode.POLICY_VIOLATION, reason_of(error))

    def close(self) -> None:
        """End all connections, and stop listening."""
        self._call(self._closed())
        self._end()

    async def _closed(self) -> None:
        self._server.close()
        await self._server.wait_closed()

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
