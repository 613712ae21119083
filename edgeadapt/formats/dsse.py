"""Signed documents as DSSE envelopes (github.com/secure-systems-lab/dsse, version 1.0.2) with Ed25519.

    {"payload": BASE64, "payloadType": TYPE, "signatures": [{"keyid": ID, "sig": BASE64}]}

A signature covers the payload's type and its own bytes (``pae``). Nothing of a payload is parsed before its signature
is verified. A signature with a ``keyid`` is one of the key with this id only: no byte that ``sign`` writes is without
meaning. Without one, every trusted key is tried."""

import base64
from collections.abc import Iterable
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from aggregation.errors import DataError, TrustError
from aggregation.pki.identity import IdentityKey, PublicKey
from edgeadapt.formats import jsontext

MAX_ENVELOPE = 2**22  # bytes; the record of a round in which 10 000 devices survived and dropped out takes half
MAX_SIGNATURES = 8


def pae(payload_type: str, payload: bytes) -> bytes:
    """Return the bytes that are signed: DSSE's pre-authentication encoding.

    >>> pae("http://example.com/HelloWorld", b"hello world")
    b'DSSEv1 29 http://example.com/HelloWorld 11 hello world'
    """
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def sign(payload: bytes, payload_type: str, key: IdentityKey) -> bytes:
    """Make the envelope of ``payload`` with one signature. Equal arguments give equal bytes. Law:
    ``verify(sign(payload, kind, key), kind, [key.public]) == payload``. Raises DataError: the envelope would be larger
    than ``verify`` accepts."""
    signature = Ed25519PrivateKey.from_private_bytes(key.raw).sign(pae(payload_type, payload))
    envelope = {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": payload_type,
        "signatures": [{"keyid": key.public.key_id, "sig": base64.b64encode(signature).decode()}],
    }
    if (size := len(raw := jsontext.encode(envelope))) > MAX_ENVELOPE:
        reason = f"a signed document of {size} bytes is above the limit of {MAX_ENVELOPE}"
        raise DataError(reason, about=payload_type)
    return raw


def verify(raw: bytes, payload_type: str, trusted: Iterable[PublicKey]) -> bytes:
    """Return the payload of an envelope that one of the trusted keys signed as a document of this type.

    Only ``payload_type`` is accepted, so that no document passes for one of another type. Raises TrustError: not an
    envelope (about ``envelope``), of another type (``payloadType``), by none of the trusted keys (``keyid``), or
    altered (``signature``)."""
    payload, signatures = _parse(raw, payload_type)
    signed, keys = pae(payload_type, payload), list(trusted)
    for keyid, signature in signatures:
        if any(_holds(key, signature, signed) for key in keys if keyid in ("", key.key_id)):
            return payload
    signers = [keyid for keyid, _ in signatures]
    if not {key.key_id for key in keys}.intersection(signers):
        raise TrustError(f"signed by {signers[0][:40]!r}, which is not a trusted key", about="keyid")
    raise TrustError("the signature does not match: the document was altered", about="signature")


def unverified(raw: bytes, payload_type: str) -> bytes:
    """Return the payload of an envelope by any signer. Raises as ``verify``, apart from the signature."""
    return _parse(raw, payload_type)[0]


def _holds(key: PublicKey, signature: bytes, signed: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(key.raw).verify(signature, signed)
    except (InvalidSignature, ValueError):
        return False
    return True


def _parse(raw: bytes, payload_type: str) -> tuple[bytes, list[tuple[str, bytes]]]:
    """Return the payload, and the key id and the bytes of each signature; nothing is verified."""
    if len(raw) > MAX_ENVELOPE:
        reason = f"a signed document of {len(raw)} bytes is above the limit of {MAX_ENVELOPE}"
        raise TrustError(reason, about="envelope")
    try:
        payload, stated, signatures = _values(jsontext.decode(raw), "payload", "payloadType", "signatures")
        if not isinstance(signatures, list) or not 1 <= len(signatures) <= MAX_SIGNATURES:
            raise ValueError(f"1 to {MAX_SIGNATURES} signatures are needed")
        pairs = [_values(signature, "keyid", "sig", keyid="") for signature in signatures]
        if not all(isinstance(text, str) for text in (stated, *(keyid for keyid, _ in pairs))):
            raise ValueError("payloadType and keyid are texts")
        decoded = _from_base64(payload), [(keyid, _from_base64(sig)) for keyid, sig in pairs]
    except ValueError as error:
        raise TrustError(f"not a signed document (DSSE): {error}", about="envelope") from None
    if stated != payload_type:
        reason = f"a document of type {stated[:80]!r}, where {payload_type!r} is needed"
        raise TrustError(reason, about="payloadType")
    return decoded


def _values(value: Any, *names: str, **defaults: Any) -> list[Any]:
    if not isinstance(value, dict) or set(members := defaults | value) != set(names):
        raise ValueError(f"an object with exactly the keys {', '.join(names)} is needed")
    return [members[name] for name in names]


def _from_base64(text: Any) -> bytes:
    # Re-encoded, so that no two texts stand for the same bytes: b64decode ignores the unused bits of the last letter.
    raw = base64.b64decode(text, validate=True) if isinstance(text, str) and text.isascii() else b""
    if base64.b64encode(raw).decode() != text:
        raise ValueError("payload and sig are base64 texts of the standard alphabet")
    return raw
