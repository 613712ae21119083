"""The authority's enrolment service: a device with an invitation gets its two certificates.

It runs where the authority's key is, not where the coordinator is: a coordinator that could enrol devices could fill a
cohort with its own. It has no state besides the authority's record.
"""

import logging
import threading
import time
from collections.abc import Sequence
from concurrent import futures
from dataclasses import dataclass, field

import grpc
from grpc import StatusCode

from adapters.gateway import frames
from adapters.gateway import gateway_pb2 as pb
from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError, EdgeAdaptError, ProtocolError
from aggregation.pki import Authority, certificates
from aggregation.pki.tls import TlsKey, TlsRole, read_tls_request
from coordinator.authority import AuthorityStore
from coordinator.gateway.pace import TokenBucket
from coordinator.gateway.server import ServerTls

NAME = "enrolment"  # in the service's own certificate
OWN_DAYS = 30  # of that certificate; a restart makes another one
THREADS, CALLS = 4, 64
log = logging.getLogger("edgeadapt.enrolment")


@dataclass(slots=True)
class EnrolmentService:
    """The call.

    Args:
        store: The authority's folder.
        authority: Unlocked.
        days: For which certificates are valid.
        bucket: Limits the calls of all devices together.
    """

    store: AuthorityStore
    authority: Authority
    days: int
    bucket: TokenBucket = field(default_factory=lambda: TokenBucket(CALLS, 30.0))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def handlers(self) -> grpc.GenericRpcHandler:
        """For gRPC's server."""
        calls = {"Enrol": grpc.unary_unary_rpc_method_handler(self.enrol)}
        return grpc.method_handlers_generic_handler(frames.ENROLMENT, calls)

    def enrol(self, raw: bytes, context: grpc.ServicerContext) -> bytes:
        """Certify the keys of a device that has an invitation."""
        with self._lock:
            wait = self.bucket.wait(time.monotonic())
        if wait:
            context.set_trailing_metadata(((frames.RETRY_AFTER, str(int(1000 * wait) + 1)),))
            context.abort(StatusCode.RESOURCE_EXHAUSTED, "too many calls")
        try:
            asked = frames.enrol_request(raw)
            identity, tls = self.store.redeem(
                self.authority, asked.token, asked.request, asked.tls_request, days=self.days
            )
        except ProtocolError as error:
            context.abort(StatusCode.INVALID_ARGUMENT, str(error))
        except EdgeAdaptError as error:
            log.warning("an enrolment is refused: %s", error)
            context.abort(StatusCode.PERMISSION_DENIED, str(error))
        log.info("%s is enrolled", certificates.subject(certificates.load(identity)))
        return bytes(pb.Enrolled(certificate=identity, tls_certificate=tls).SerializeToString())


class EnrolmentServer:
    """A running service.

    Args:
        service: The call.
        address: ``HOST:PORT``; port 0 takes any free one.
        hosts: Names and addresses at which devices reach it.

    Raises:
        ConfigError: The address is in use or not valid, or a host is neither a name nor an address.
    """

    def __init__(self, service: EnrolmentService, address: str, hosts: Sequence[str]) -> None:
        key = TlsKey.generate(SystemEntropy())
        _, public = read_tls_request(key.request(NAME))
        store, authority = service.store, service.authority
        der = store.issue_tls(authority, NAME, public, TlsRole.GATEWAY, hosts, OWN_DAYS)
        tls = ServerTls(key.pem, certificates.to_pem(der), authority.root.to_pem())
        options = [*frames.GATEWAY_OPTIONS, ("grpc.max_connection_idle_ms", 10_000)]
        self._server = grpc.server(futures.ThreadPoolExecutor(THREADS), options=options, maximum_concurrent_rpcs=CALLS)
        self._server.add_generic_rpc_handlers((service.handlers(),))
        try:
            self.port: int = self._server.add_secure_port(address, tls.credentials(certified_only=False))
        except RuntimeError as error:
            text = f"the enrolment service cannot listen at {address}: the port is in use, or the address not valid"
            raise ConfigError(text, about="--listen", value=address) from error
        self._server.start()

    def close(self) -> None:
        """Stop listening."""
        self._server.stop(0.2).wait()
