"""Enrolment over a network: keys are made on the device, and an invitation brings their certificates.

The state directory is complete before anything is sent, except for the certificates. So a connection that breaks loses
nothing: the same call again sends the same keys, and the authority answers with the same certificates.
"""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import grpc

from adapters import storage
from adapters.gateway import frames
from adapters.gateway import gateway_pb2 as pb
from adapters.gateway.invitation import Invitation
from adapters.keyfiles import TLS_CERTIFICATE, TLS_KEY
from aggregation.entropy import Entropy
from aggregation.errors import ConfigError, EdgeAdaptError, TrustError, of_file
from aggregation.pki.certificates import load, to_pem
from aggregation.pki.tls import TlsKey, TlsRole, verify_tls
from client.gateway.calls import PASSING, pause, refusal
from client.node.enrolment import REQUEST, TrustAnchors, enrol, install_certificate
from client.node.statedir import CERTIFICATE, LONGEST, DeviceSettings, DeviceStateDir

ATTEMPTS = 4
PATIENCE = 30.0  # seconds for a call


def enrol_with(
    invitation: Invitation,
    folder: Path,
    settings: DeviceSettings,
    entropy: Entropy,
    wait: Callable[[float], None] = time.sleep,
) -> tuple[str, datetime]:
    """Make a state directory and have its keys certified, or go on where an earlier call broke off.

    Args:
        invitation: For this device.
        folder: New, empty, or left by an earlier call.
        settings: The owner's; an earlier call's stay.
        entropy: Draws the keys.
        wait: Pauses between attempts.

    Returns:
        The device's name, and until when its certificates are valid.

    Raises:
        ConfigError: The folder is in use for something else, or the device is enrolled already.
        TrustError: The authority refuses the invitation, or answers with something else than certificates of the keys.
        EdgeAdaptError: The authority cannot be reached.
    """
    authority, coordinator = invitation.to_pem()
    if not (folder / TLS_KEY).is_file():
        addresses = {
            "gateway": settings.gateway or invitation.gateway,
            "renewal": settings.renewal or invitation.renewal,
        }
        settings = settings.model_copy(update=addresses)
        enrol(
            folder, invitation.device, settings, TrustAnchors(authority, coordinator), entropy, TlsKey.generate(entropy)
        )
    elif (folder / CERTIFICATE).exists():
        raise ConfigError(f"{folder} is enrolled already: choose another --state", about="--state", value=str(folder))
    state_dir, now = DeviceStateDir.open(folder), datetime.now(UTC)
    if (state_dir.root().der, state_dir.coordinator.raw) != (invitation.authority, invitation.coordinator):
        raise ConfigError(f"{folder} was made for another invitation: choose another --state", about="--token-file")
    tls_key = TlsKey(storage.read(folder / TLS_KEY, LONGEST))
    asked = pb.EnrolRequest(
        token=invitation.secret,
        request=storage.read(folder / REQUEST, LONGEST),
        tls_request=tls_key.request(invitation.device),
    )
    found = frames.enrolled(_call(invitation, asked.SerializeToString(), wait))
    with of_file("the authority's answer"):
        if load(found.tls_certificate).public_key() != tls_key.public():
            raise TrustError("the TLS certificate is for another key", about="tls.key")
        name = verify_tls(state_dir.root(), found.tls_certificate, TlsRole.DEVICE, now)
        storage.replace(folder / TLS_CERTIFICATE, to_pem(found.tls_certificate))
        certified, end = install_certificate(state_dir, found.certificate, now)  # last: it says that all is there
    if not certified == name == invitation.device:
        raise TrustError(
            f"the authority certified {certified}, not {invitation.device}", about="certificate.common-name"
        )
    return certified, end


def _call(invitation: Invitation, asked: bytes, wait: Callable[[float], None]) -> bytes:
    credentials = grpc.ssl_channel_credentials(invitation.to_pem()[0])
    with grpc.secure_channel(invitation.enrolment, credentials, options=frames.DEVICE_OPTIONS) as channel:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return bytes(channel.unary_unary(frames.ENROL)(asked, timeout=PATIENCE))
            except grpc.RpcError as error:
                if error.code() not in PASSING:
                    raise refusal(error, "the authority") from error
                if attempt == ATTEMPTS:
                    reason = " ".join(str(error.details()).split())[:200]
                    text = f"the authority at {invitation.enrolment} cannot be reached: {reason}; repeat the call"
                    raise EdgeAdaptError(text, about="enrolment") from error
                wait(pause(attempt, error))
    raise AssertionError
