"""A device's certificates are renewed before they end: the identity stays, and the TLS key is a new one each time.

The authority's service asks for the device's TLS certificate, and for the identity's signature on the request. The next
TLS key is in a file of its own until the certificate for it has replaced the old one (``keyfiles.tls_pair``).
"""

import logging
import secrets
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import grpc

from adapters import keyfiles, storage
from adapters.gateway import frames
from adapters.gateway import gateway_pb2 as pb
from adapters.keyfiles import NEXT_TLS_KEY, TLS_CERTIFICATE, TLS_KEY
from aggregation.entropy import Entropy, SystemEntropy
from aggregation.errors import EdgeAdaptError, TrustError, of_file
from aggregation.pki.certificates import load, subject, to_der, to_pem
from aggregation.pki.tls import RENEWAL, TlsKey, TlsRole, verify_tls
from client.gateway.calls import PASSING, refusal
from client.node.enrolment import install_certificate
from client.node.statedir import AUTHORITY, LONGEST, DeviceStateDir

ENROL_AGAIN = "enrol this device again, with a token ('edgeadapt device enrol')"
LEFT = 1 / 3  # of its validity: a certificate that has less left is renewed
PATIENCE = 10.0  # seconds for the call
FIRST_PAUSE, LONGEST_PAUSE = 60.0, 3600.0  # seconds before another attempt
log = logging.getLogger("edgeadapt.agent")


def tls_pair(folder: Path) -> tuple[TlsKey, bytes]:
    """The TLS key of a device and its certificate, PEM, which belong to each other.

    Raises:
        TrustError: A file is missing or damaged, or they do not belong to each other.
    """
    for name in (TLS_KEY, TLS_CERTIFICATE):
        if not (folder / name).is_file():
            text = f"{folder} has no {name}: certify this device's TLS key first ('edgeadapt device enrol')"
            raise TrustError(text, about=name)
    return keyfiles.tls_pair(folder, ENROL_AGAIN)


def validity(state_dir: DeviceStateDir, now: datetime) -> tuple[bool, datetime]:
    """Whether the certificates of a device are to be renewed, and the end of the one that ends first.

    Raises:
        TrustError: One has expired, or a file is missing or damaged.
    """
    _, tls_certificate = tls_pair(state_dir.folder)
    found = [load(der) for der in (state_dir.certificate, to_der(tls_certificate))]
    end = min(each.not_valid_after_utc for each in found)
    if now > end:
        name = subject(found[0])
        text = f"the certificate of {name} expired on {end:%Y-%m-%d %H:%M} UTC: {ENROL_AGAIN}"
        raise TrustError(text, about="certificate.validity", value=name)
    return any(_is_due(each.not_valid_before_utc, each.not_valid_after_utc, now) for each in found), end


def _is_due(begin: datetime, end: datetime, now: datetime) -> bool:
    return end - now < LEFT * (end - begin)


def renew(state_dir: DeviceStateDir, address: str, entropy: Entropy) -> datetime:
    """Have the identity certified again, and a new TLS key; until when.

    Args:
        state_dir: Of the device.
        address: ``HOST:PORT`` at which the authority's service renews certificates.
        entropy: Draws the key.

    Raises:
        TrustError: The authority refuses, or answers with something else than certificates of the keys.
        EdgeAdaptError: It cannot be reached, or is busy; the same may be asked again.
        OSError: The disk is full. The old key and certificates are as before.
    """
    folder, now, device = state_dir.folder, datetime.now(UTC), subject(load(state_dir.certificate))
    tls_key, tls_certificate = tls_pair(folder)
    following = _next_key(folder, entropy)
    request = following.request(device)
    asked = pb.RenewRequest(
        certificate=state_dir.certificate,
        signature=state_dir.identity.sign(RENEWAL, request),
        tls_request=request,
    )
    credentials = grpc.ssl_channel_credentials(
        storage.read(folder / AUTHORITY, LONGEST), private_key=tls_key.pem, certificate_chain=tls_certificate
    )
    found = frames.enrolled(_call(address, credentials, asked.SerializeToString()))
    with of_file("the authority's answer"):
        if load(found.tls_certificate).public_key() != following.public():
            raise TrustError("the TLS certificate is for another key", about="tls.key")
        named = verify_tls(state_dir.root(), found.tls_certificate, TlsRole.DEVICE, now)
        if not named == device == state_dir.root().verify(found.certificate, now)[0]:
            raise TrustError(f"the authority certified {named}, not {device}", about="certificate.common-name")
        _, end = install_certificate(state_dir, found.certificate, now)
        storage.replace(folder / TLS_CERTIFICATE, to_pem(found.tls_certificate))
    tls_pair(folder)  # the next key becomes the one in use
    return end


def _next_key(folder: Path, entropy: Entropy) -> TlsKey:
    """The next TLS key: that of an earlier attempt, whose answer may not have arrived, or a new one."""
    path = folder / NEXT_TLS_KEY
    with suppress(FileNotFoundError, EdgeAdaptError):  # a damaged one is replaced
        return TlsKey(storage.read(path, LONGEST))
    key = TlsKey.generate(entropy)
    storage.replace(path, key.pem)
    return key


def _call(address: str, credentials: grpc.ChannelCredentials, asked: bytes) -> bytes:
    with grpc.secure_channel(address, credentials, options=frames.DEVICE_OPTIONS) as channel:
        try:
            return bytes(channel.unary_unary(frames.RENEW)(asked, timeout=PATIENCE))
        except grpc.RpcError as error:
            if error.code() not in PASSING:
                raise refusal(error, "the authority") from error
            reason = " ".join(str(error.details()).split())[:200]
            raise EdgeAdaptError(f"the authority at {address} cannot be reached: {reason}", about="renewal") from error


@dataclass(slots=True)
class Renewal:
    """When an agent renews the certificates of its device. What fails is tried again later, with the old ones.

    Threads may attempt it at once: one renews, and the others then find nothing due.

    Args:
        folder: The device's state directory. ``renewal`` in its settings names the authority's service.
        entropy: Draws the TLS keys.
    """

    folder: Path
    entropy: Entropy = field(default_factory=SystemEntropy)
    _failed: int = 0
    _next: float = 0.0  # by the monotonic clock
    _lock: threading.Lock = field(default_factory=threading.Lock)  # two renewals would overwrite each other's next key

    def attempt(self) -> bool:
        """Renew the certificates if that is due. Returns whether there are new ones.

        Raises:
            TrustError: A certificate has expired, or a file is missing or damaged.
            OSError: A file cannot be read.
        """
        with self._lock:
            return self._attempt()

    def _attempt(self) -> bool:
        try:
            state_dir = DeviceStateDir.open(self.folder)
        except EdgeAdaptError:  # its owner is changing device.toml; the agent's conditions say so
            return False
        due, end = validity(state_dir, datetime.now(UTC))
        if not due or not state_dir.settings.renewal or time.monotonic() < self._next:
            return False
        try:
            until = renew(state_dir, state_dir.settings.renewal, self.entropy)
        except (EdgeAdaptError, OSError) as error:
            seconds = min(FIRST_PAUSE * 2**self._failed, LONGEST_PAUSE) * (0.5 + secrets.randbelow(2**20) / 2**20)
            self._failed, self._next = min(self._failed + 1, 16), time.monotonic() + seconds
            log.warning("certificates valid until %s not renewed, again in %.0f s: %s", f"{end:%F %R}", seconds, error)
            return False
        self._failed, self._next = 0, time.monotonic() + FIRST_PAUSE
        log.info("certificates renewed, valid until %s", f"{until:%Y-%m-%d}")
        return True
