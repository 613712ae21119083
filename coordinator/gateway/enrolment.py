"""The authority's enrolment service: a device with an invitation gets its two certificates, a page its one.

A device whose certificates end soon has them renewed, on a port of its own with mutual TLS: gRPC asks for certificates
on all connections of a port or on none.

It runs where the authority's key is, not where the coordinator is: a coordinator that could enrol devices could fill a
cohort with its own. It has no state besides the authority's record.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Coroutine, Iterator, Sequence
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field
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
from coordinator.gateway.server import ServerTls
from coordinator.gateway.websocket import BrowserSettings, Endpoint, reason_of, received, url_of

NAME = "enrolment"  # in the service's own certificate
OWN_DAYS = 30  # of that certificate; a restart makes another one
THREADS, CALLS = 4, 64
RENEWALS, PERIOD = 6, 3600.0  # of one device in a row, and seconds in which it regains them
LARGEST = 2**14  # bytes of a page's message
T = TypeVar("T")
log = logging.getLogger("edgeadapt.enrolment")


@dataclass(slots=True)
class EnrolmentService:
    """The calls.

    Args:
        store: The authority's folder.
        authority: Unlocked.
        days: For which certificates are valid.
        bucket: Limits the calls of all devices together.
    """

    store: AuthorityStore
    authority: Authority
    days: float
    bucket: TokenBucket = field(default_factory=lambda: TokenBucket(CALLS, 30.0))
    _renewals: dict[str, TokenBucket] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def handlers(self) -> grpc.GenericRpcHandler:
        """For gRPC's server."""
        calls = {
            "Enrol": grpc.unary_unary_rpc_method_handler(self.enrol),
            "Renew": grpc.unary_unary_rpc_method_handler(self.renew),
        }
        return grpc.method_handlers_generic_handler(frames.ENROLMENT, calls)

    def enrol(self, raw: bytes, context: grpc.ServicerContext) -> bytes:
        """Certify the keys of a device that has an invitation."""
        self._limit(context, self.wait())
        with _refusing(context, "an enrolment"):
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
        self._limit(context, self.wait())
        with _refusing(context, "a renewal"):
            asked, presented = frames.renew_request(raw), certificates.to_der(pem)
            self._limit(context, self._renewal_wait(certificates.subject(certificates.load(presented))))
            identity, tls = self.store.renew(
                self.authority, presented, asked.certificate, asked.signature, asked.tls_request, days=self.days
            )
        _log(identity, "is certified again")
        return bytes(pb.Enrolled(certificate=identity, tls_certificate=tls).SerializeToString())

    def _limit(self, context: grpc.ServicerContext, wait: float) -> None:
        if wait:
            context.set_trailing_metadata(((frames.RETRY_AFTER, str(int(1000 * wait) + 1)),))
            context.abort(StatusCode.RESOURCE_EXHAUSTED, "too many calls")

    def _renewal_wait(self, name: str) -> float:
        """Take a renewal of a device's bucket; as ``wait``. Only certified devices have one."""
        with self._lock:
            return self._renewals.setdefault(name, TokenBucket(RENEWALS, PERIOD)).wait(time.monotonic())

    def enrol_page(self, raw: bytes) -> bytes:
        """The certificate of a page that has an invitation, DER.

        Raises:
            ProtocolError: The bytes are no ``SocketEnrolment``.
            EdgeAdaptError: As ``AuthorityStore.redeem_signed``.
        """
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
            EdgeAdaptError: The page has renewed too often; or as ``AuthorityStore.renew_page``.
        """
        asked = websocket.RENEWAL.decode(raw)
        identity = self.store.renew_page(
            self.authority, asked.certificate, asked.signature, days=self.days, admit=self._admit
        )
        _log(identity, "is certified again")
        return identity

    def _admit(self, name: str) -> None:
        if self._renewal_wait(name):
            raise EdgeAdaptError(f"{name} has renewed its certificate too often: try again in an hour", about="renewal")

    def wait(self) -> float:
        """Take a call of the bucket; 0, or the seconds until there is one."""
        with self._lock:
            return self.bucket.wait(time.monotonic())


@contextmanager
def _refusing(context: grpc.ServicerContext, what: str) -> Iterator[None]:
    """End a call with the status code that an error means."""
    try:
        yield
    except ProtocolError as error:
        context.abort(StatusCode.INVALID_ARGUMENT, str(error))
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
        options = [*frames.GATEWAY_OPTIONS, ("grpc.max_connection_idle_ms", 10_000)]
        self._server = grpc.server(futures.ThreadPoolExecutor(THREADS), options=options, maximum_concurrent_rpcs=CALLS)
        self._server.add_generic_rpc_handlers((service.handlers(),))
        self.port = self._listen("--listen", address, tls.credentials(certified_only=False))
        self.renewal_port = self._listen("--renewal", renewal, tls.credentials(certified_only=True)) if renewal else 0
        self.pages = PageEnrolmentServer(service, browsers, tls) if browsers else None
        self._server.start()

    def _listen(self, option: str, address: str, credentials: grpc.ServerCredentials) -> int:
        try:
            return int(self._server.add_secure_port(address, credentials))
        except RuntimeError as error:
            text = f"the enrolment service cannot listen at {address}: the port is in use, or the address not valid"
            raise ConfigError(text, about=option, value=address) from error

    def close(self) -> None:
        """Stop listening."""
        if self.pages:
            self.pages.close()
        self._server.stop(0.2).wait()


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
            async with self._endpoint.stranger():
                raw = await received(connection)
            if self._service.wait():
                await connection.close(CloseCode.TRY_AGAIN_LATER, "too many calls: try again in a minute")
                return
            renews = connection.request is not None and connection.request.path == websocket.RENEWAL_PATH
            certify = self._service.renew_page if renews else self._service.enrol_page
            await connection.send(await asyncio.to_thread(certify, raw))
        except ConnectionClosed:
            pass
        except TimeoutError:
            await connection.close(CloseCode.POLICY_VIOLATION, "too slow")
        except ProtocolError as error:
            await connection.close(CloseCode.INVALID_DATA, reason_of(error))
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
