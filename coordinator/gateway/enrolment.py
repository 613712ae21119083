"""The authority's service: a device with an invitation gets a certificate, and one whose certificate ends soon a newer.

Both are conversations of one message and one answer (``coordinator.gateway.carriers``). The messages are signed, so a
peer that passes one on has no other key certified. Calls and refusals are counted after the proof, so nobody without
credentials uses up what those with credentials may do. The service runs where the authority's key is, not where the
coordinator is, which could fill a cohort with its own devices, and has no state besides the authority's record."""

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from aggregation.entropy import SystemEntropy
from aggregation.errors import EdgeAdaptError, ProtocolError, TrustError
from aggregation.pki import Authority, certificates
from aggregation.pki.tls import TlsKey, read_tls_request
from coordinator.gateway.carriers import BrowserSettings, Carrier, Conversations, ConversationServer
from coordinator.gateway.hub import ComeBack
from coordinator.gateway.pace import TokenBucket
from coordinator.gateway.places import RefusalRates, Turns
from coordinator.servertls import ServerTls
from edgeadapt.authority import AuthorityStore
from edgeadapt.authority.record import AuthorityRecord
from edgeadapt.authority.store import NOT_REDEEMABLE, RECORD
from edgeadapt.formats.gateway import messages

NAME = "enrolment"  # in the service's own certificate
OWN_DAYS = 30  # days of that certificate; a restart makes another one
THREADS = 4  # threads of each of the two conversations
ATTEMPTS, PERIOD = 6, 3600.0  # calls of a device or an invitation in a row, and seconds in which they are regained
LARGEST = 2**14  # bytes of a message
log = logging.getLogger("edgeadapt.enrolment")


def too_many(wait: float, who: str = "") -> ComeBack:
    return ComeBack("calls", f"too many calls{who and f' of {who}'}: try again in {math.ceil(wait / 60)} min")


@dataclass(slots=True)
class EnrolmentService:
    store: AuthorityStore
    authority: Authority
    days: float
    _proved: dict[str, TokenBucket] = field(default_factory=dict)  # by device or invitation
    _refusals: RefusalRates = field(default_factory=RefusalRates)
    _invitations: tuple[tuple[int, int], frozenset[str]] = (0, 0), frozenset()  # state of the record, and those in it
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def enrol(self, raw: bytes) -> bytes:
        """Certify a device that has an invitation. Returns DER. Raises ProtocolError: the bytes are not a
        ``DeviceEnrolment``; ComeBack: the invitation was presented too often."""
        asked = messages.ENROLMENT.decode(raw)
        certificate = self.store.redeem(
            self.authority, asked.invited, asked.signature, asked.request, days=self.days, admit=self._admit_invited
        )
        _log(certificate, "is enrolled")
        return certificate

    def renew(self, raw: bytes) -> bytes:
        """Certify a device again. Returns DER. Raises ProtocolError: the bytes are not a ``DeviceRenewal``; ComeBack:
        it has renewed too often."""
        asked = messages.RENEWAL.decode(raw)
        certificate = self.store.renew(
            self.authority, asked.certificate, asked.signature, days=self.days, admit=self._admit
        )
        _log(certificate, "is certified again")
        return certificate

    def attempt(self, host: str, certify: Callable[[bytes], bytes], raw: bytes) -> bytes:
        """Call one of the above for a peer at ``host``, and count a refusal. Raises ComeBack: the network of ``host``
        was refused too often; what is not refused passes anyway; ProtocolError: the bytes are not a message;
        TrustError: the authority refuses."""
        try:
            return certify(raw)
        except ComeBack:
            raise
        except EdgeAdaptError as error:
            with self._lock:
                wait = self._refusals.wait(host, time.monotonic())
            if wait:
                raise too_many(wait) from None
            if isinstance(error, ProtocolError):
                raise
            raise TrustError(str(error), about=error.about) from error

    def _admit(self, name: str) -> None:
        """Count a call of a device, which has proved its name: nobody else uses up what it may."""
        with self._lock:
            wait = self._proved.setdefault(name, TokenBucket(ATTEMPTS, PERIOD)).wait(time.monotonic())
        if wait:
            raise too_many(wait, name)

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
class _Certifying:
    """Have a conversation of one message, which ``certify`` answers in threads of its own, one of a network at once."""

    service: EnrolmentService
    certify: Callable[[bytes], bytes]
    threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(THREADS))
    turns: Turns = field(default_factory=Turns)

    async def __call__(self, carrier: Carrier) -> None:
        raw, loop = await carrier.receive(), asyncio.get_running_loop()
        async with self.turns.proving(carrier.host):
            call = loop.run_in_executor(self.threads, self.service.attempt, carrier.host, self.certify, raw)
            certificate = await call
        await carrier.send(certificate)


def _log(certificate: bytes, what: str) -> None:
    loaded = certificates.load(certificate)
    name, key = certificates.subject(loaded), certificates.identity(loaded)
    log.info("%s %s with the key %s", name, what, key.key_id, extra={"device": name})


class EnrolmentServer(ConversationServer):
    """A running service, with a TLS certificate that its authority signs for it."""

    def __init__(
        self, service: EnrolmentService, address: str, hosts: Sequence[str], browsers: BrowserSettings | None = None
    ) -> None:
        """Start listening at ``address`` (``HOST:PORT``; port 0 takes any free one), which devices reach as ``hosts``.
        Raises ConfigError: as ``ConversationServer``; or a host is neither a name nor an address."""
        self.service, key = service, TlsKey.generate(SystemEntropy())
        _, public = read_tls_request(key.request(NAME))
        der = service.store.issue_tls(service.authority, NAME, public, hosts, OWN_DAYS)
        calls = {
            messages.ENROL: _Certifying(service, service.enrol),
            messages.RENEW: _Certifying(service, service.renew),
        }
        conversations = Conversations(calls, ServerTls(key.pem, certificates.to_pem(der)))
        super().__init__(conversations, address, browsers, about="--listen", largest=LARGEST)
