"""A device's certificate, from the authority's service: the first one with an invitation, then newer ones.

The key is made on the device and stays the same; the messages to the authority are signed with it, or with the
invitation's. The state directory is complete before anything is sent, except for the certificate. So a connection that
breaks loses nothing: the same call again sends the same key, and the authority answers with the same certificate."""

import logging
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import grpc

from aggregation.entropy import Entropy
from aggregation.errors import ConfigError, EdgeAdaptError, TrustError, of_file
from aggregation.pki.certificates import load, subject
from client.gateway.calls import PASSING, ask, clock, one_line, pause, refusal
from client.node.statedir import (
    AUTHORITY,
    CERTIFICATE,
    LONGEST,
    REQUEST,
    DeviceSettings,
    DeviceStateDir,
    TrustAnchors,
    enrol,
    install_certificate,
)
from edgeadapt.formats import storage
from edgeadapt.formats.gateway import invitation as tokens
from edgeadapt.formats.gateway import messages
from edgeadapt.formats.gateway.invitation import Invitation

ATTEMPTS = 4  # at an enrolment
PATIENCE = 30.0  # seconds for a call; a renewal has a third of it
ENROL_AGAIN = "enrol this device again, with a token ('edgeadapt device enrol')"
LEFT = 1 / 3  # share of the validity; a certificate with less left is renewed
FIRST_PAUSE, LONGEST_PAUSE = 60.0, 3600.0  # seconds before another attempt at a renewal
log = logging.getLogger("edgeadapt.agent")


def enrol_with(
    invitation: Invitation,
    folder: Path,
    settings: DeviceSettings,
    entropy: Entropy,
    wait: Callable[[float], None] = time.sleep,
) -> tuple[str, datetime]:
    """Make a state directory and have its key certified, or go on where an earlier call broke off.

    Returns the device's name, and until when its certificate is valid. ``settings``: the owner's; an earlier call's
    stay. ``wait``: pauses between attempts. Raises ConfigError: the folder is in use for something else, or the device
    is enrolled already; TrustError: the authority refuses the invitation, or answers with something else than a
    certificate of the key; EdgeAdaptError: the authority cannot be reached."""
    if not (folder / REQUEST).is_file():
        addresses = {
            "gateway": settings.gateway or invitation.gateway,
            "renewal": settings.renewal or invitation.enrolment,
        }
        anchors = TrustAnchors(*invitation.to_pem())
        enrol(folder, invitation.device, settings.model_copy(update=addresses), anchors, entropy)
    elif (folder / CERTIFICATE).exists():
        raise ConfigError(f"{folder} is enrolled already: choose another --state", about="--state")
    state_dir = DeviceStateDir.open(folder)
    if (state_dir.root().der, state_dir.coordinator.raw) != (invitation.authority, invitation.coordinator):
        raise ConfigError(f"{folder} was made for another invitation: choose another --state", about="--token-file")
    request = storage.read(folder / REQUEST, LONGEST)
    signature = invitation.key.sign(tokens.ENROLMENT, request)
    asked = messages.ENROLMENT.encode(messages.DeviceEnrolment(invitation.key.public.raw, signature, request))
    return _install(state_dir, _enrolled(invitation, asked, wait), invitation.device)


def _enrolled(invitation: Invitation, asked: bytes, wait: Callable[[float], None]) -> bytes:
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return ask(invitation.enrolment, messages.ENROL, invitation.to_pem()[0], asked, PATIENCE)
        except grpc.RpcError as error:
            if error.code() not in PASSING:
                raise refusal(error, "the authority") from error
            if attempt == ATTEMPTS:
                text = f"the authority at {invitation.enrolment} cannot be reached: {one_line(error)}; repeat the call"
                raise EdgeAdaptError(text, about="enrolment") from error
            wait(pause(attempt, error))
    raise AssertionError


def _install(state_dir: DeviceStateDir, certificate: bytes, device: str) -> tuple[str, datetime]:
    now = datetime.now(UTC)
    with of_file("the authority's answer"):
        certified, _ = state_dir.root().verify(certificate, now)
        if certified != device:
            text = f"the authority certified {certified}, not {device}"
            raise TrustError(text, about="certificate.common-name")
        return install_certificate(state_dir, certificate, now)


def validity(state_dir: DeviceStateDir, now: datetime) -> tuple[bool, datetime]:
    """Tell whether the certificate of a device is to be renewed, and its end. Raises TrustError: it has expired, or a
    file is missing or damaged."""
    certificate = load(state_dir.certificate)
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now > end:
        name = subject(certificate)
        text = f"the certificate of {name} expired on {end:%Y-%m-%d %H:%M} UTC: {ENROL_AGAIN}{clock()}"
        raise TrustError(text, about="certificate.validity")
    return end - now < LEFT * (end - begin), end


def renew(state_dir: DeviceStateDir, address: str) -> datetime:
    """Have the authority's service at ``address`` (``HOST:PORT``) certify the identity again. Returns until when.
    Raises TrustError: the authority refuses, or does not answer with a certificate of the key; EdgeAdaptError: it
    cannot be reached, or is busy: ask again; OSError: the disk is full, and the old certificate as before."""
    old = state_dir.certificate
    signature = state_dir.identity.sign(messages.RENEWAL_TAG, old)
    asked = messages.RENEWAL.encode(messages.DeviceRenewal(old, signature))
    authority = storage.read(state_dir.folder / AUTHORITY, LONGEST)
    try:
        certificate = ask(address, messages.RENEW, authority, asked, PATIENCE / 3)
    except grpc.RpcError as error:
        if error.code() not in PASSING:
            raise refusal(error, "the authority") from error
        text = f"the authority at {address} cannot be reached: {one_line(error)}"
        raise EdgeAdaptError(text, about="renewal") from error
    return _install(state_dir, certificate, subject(load(old)))[1]


@dataclass(slots=True)
class Renewal:
    """Renews the certificate of a device when that is due. What fails is tried again later, with the old one. Threads
    may attempt it at once: one renews, and the others then find nothing due. ``renewal`` in the settings of the state
    directory ``folder`` names the authority's service."""

    folder: Path
    _failed: int = 0
    _next: float = 0.0  # by the monotonic clock
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def attempt(self) -> bool:
        """Renew the certificate if that is due. Returns whether there is a new one. Raises TrustError: the certificate
        has expired, or a file is missing or damaged."""
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
            until = renew(state_dir, state_dir.settings.renewal)
        except (EdgeAdaptError, OSError) as error:
            seconds = min(FIRST_PAUSE * 2**self._failed, LONGEST_PAUSE) * (0.5 + secrets.randbelow(2**20) / 2**20)
            self._failed, self._next = min(self._failed + 1, 16), time.monotonic() + seconds
            log.warning("certificate valid until %s not renewed, again in %.0f s: %s", f"{end:%F %R}", seconds, error)
            return False
        self._failed, self._next = 0, time.monotonic() + FIRST_PAUSE
        log.info("certificate renewed, valid until %s", f"{until:%Y-%m-%d}")
        return True
