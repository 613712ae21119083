"""Invitations: what an owner gives to one device so that it can enrol over a network, as one line of text.

An invitation holds everything that the device pins, so that no first connection has to be trusted, and a secret that
the authority accepts once: the seed of an Ed25519 key, which signs the device's request and is not sent. So nobody can
enrol with what the authority records, and a page need not pin the authority's TLS. An invitation travels like a
password: anyone who has it can enrol instead of its device."""

import base64
import binascii
import hashlib
from typing import Annotated, NamedTuple

from aggregation import wire
from aggregation.entropy import Entropy
from aggregation.errors import ConfigError, ProtocolError, TrustError
from aggregation.pki import DEVICE_ID, MAX_CERTIFICATE, IdentityKey, PublicKey, Root
from aggregation.pki.identity import KEY
from edgeadapt.formats.keyfiles import MAX_PEM

SECRET = 16  # bytes
ENROLMENT = "enrolment"  # what that key signs: the request for a certificate
_CHECK = 4  # bytes of a digest, for mistakes in copying
ADDRESS = r"(\[[0-9a-fA-F:.]{2,45}\]|[A-Za-z0-9._-]{1,253}):[0-9]{1,5}"  # HOST:PORT, to which a device connects
ADDRESSES = rf"{ADDRESS}(,{ADDRESS}){{0,7}}"
_PREFIX = "edgeadapt2."


class Invitation(NamedTuple):
    """Invites one device.

    Attributes:
        secret: The authority accepts it once.
        enrolment: ``HOST:PORT`` of the authority's service, which enrols and renews.
        gateway: ``HOST:PORT`` of the coordinator's gateway; several with commas, to try in turn.
        authority: The authority's certificate, DER.
        coordinator: The coordinator's public key, raw.
    """

    secret: Annotated[bytes, wire.fixed(SECRET)]
    device: Annotated[str, wire.text(DEVICE_ID)]
    enrolment: Annotated[str, wire.text(ADDRESS)]
    gateway: Annotated[str, wire.text(ADDRESSES)]
    authority: Annotated[bytes, wire.blob(MAX_CERTIFICATE)]
    coordinator: Annotated[bytes, wire.fixed(KEY)]

    def __repr__(self) -> str:
        return f"Invitation({self.device})"

    @property
    def key(self) -> IdentityKey:
        """Return the key by whose public half the authority knows it."""
        return key(self.secret)

    def to_text(self) -> str:
        """Write one line without spaces for ``read_invitation``. Raises ConfigError for a bad name or address."""
        try:
            body = _CODEC.encode(self)
        except ConfigError as error:
            text = f"{error}: neither an address, HOST:PORT, nor the name of a device"
            raise ConfigError(text, about="invitation") from None
        return _PREFIX + base64.urlsafe_b64encode(body + _check(body)).rstrip(b"=").decode()

    def to_pem(self) -> tuple[bytes, bytes]:
        """Return what the device pins: the authority's certificate and the coordinator's key."""
        return Root(self.authority).to_pem(), PublicKey(self.coordinator).to_pem()


_CODEC = wire.record(Invitation)


def new_secret(entropy: Entropy) -> bytes:
    return entropy.bytes(SECRET)


def key(secret: bytes) -> IdentityKey:
    """Return the key of an invitation: its seed is SHA-256 of the secret after a tag."""
    return IdentityKey(hashlib.sha256(b"edgeadapt/invitation\x00" + secret).digest())


def read_invitation(text: str) -> Invitation:
    """Read what ``to_text`` wrote. Raises ConfigError if it was not copied as a whole, or is not an invitation."""
    stripped = text.strip()
    try:
        if not stripped.startswith(_PREFIX) or len(stripped) > MAX_PEM:
            raise ValueError
        encoded = stripped.removeprefix(_PREFIX)
        raw = base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True)
        if _check(raw[:-_CHECK]) != raw[-_CHECK:]:
            raise ValueError
        invitation = _CODEC.decode(raw[:-_CHECK])
        invitation.to_pem()
    except (ValueError, binascii.Error, ProtocolError, TrustError):
        reason = "the token is not an invitation: copy the whole line that 'edgeadapt authority invite' prints"
        raise ConfigError(reason, about="--token-file") from None
    return invitation


def _check(body: bytes) -> bytes:
    return hashlib.sha256(body).digest()[:_CHECK]
