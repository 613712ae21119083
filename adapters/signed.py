"""A signed JSON document: one byte string for one value, verified before anything in it is believed.

Law: ``accept(sign(kind, body, key), kind, [key.public])`` equals ``body``, and no other bytes do: a document whose
bytes are not the canonical ones is refused, so a flipped byte anywhere is found.
"""

import json
from collections.abc import Iterable
from typing import Any

from aggregation.errors import DataError, EdgeAdaptError, TrustError
from aggregation.pki.identity import IdentityKey, PublicKey

MAX_DOCUMENT = 2**20  # bytes

Body = dict[str, Any]


def canonical(value: object) -> bytes:
    """JSON with sorted keys, no white space, ASCII only; NaN and infinity are refused.

    Raises:
        ValueError: A float is not finite.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def sign(kind: str, body: Body, key: IdentityKey) -> bytes:
    """The document with its signature (Ed25519 over ``kind`` and the canonical body) and the signer's key id.

    Raises:
        DataError: The body holds NaN, infinity or what JSON has no form for, or is longer than a reader accepts.
    """
    try:
        signature = key.sign(kind, canonical(body))
    except (TypeError, ValueError) as error:
        raise DataError(f"{kind}: cannot be signed: {error}") from error
    raw = canonical({"body": body, "kind": kind, "signature": signature.hex(), "signer": key.public.key_id})
    if len(raw) > MAX_DOCUMENT:
        raise DataError(f"{kind}: {len(raw)} bytes are above the limit of {MAX_DOCUMENT}")
    return raw


def accept(raw: bytes, kind: str, trusted: Iterable[PublicKey]) -> Body:
    """Verify a document and return its body.

    Args:
        raw: What ``sign`` returned.
        kind: What the document must be, so that one kind never passes for another.
        trusted: The keys that may have signed it.

    Raises:
        TrustError: Damaged, of another kind, of an unknown signer, or not what the signer signed.
    """
    if len(raw) > MAX_DOCUMENT:
        raise TrustError(f"{kind}: {len(raw)} bytes are above the limit of {MAX_DOCUMENT}")
    try:
        document = json.loads(raw)
        body, signer, found = document["body"], document["signer"], document["kind"]
        signature = bytes.fromhex(document["signature"])
        exact = canonical(document) == raw and len(document) == 4 and isinstance(body, dict)
        # fromhex also reads capitals and spaces, which would be other bytes for the same signature.
        exact = exact and signature.hex() == document["signature"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise TrustError(f"{kind}: not a signed document (damaged or truncated)") from error
    if found != kind or not exact:
        raise TrustError(f"{kind}: not a signed document of this kind (damaged, or {str(found)[:40]!r})")
    key = next((key for key in trusted if key.key_id == signer), None)
    if key is None:
        raise TrustError(f"{kind}: signed by {str(signer)[:40]!r}, whom this device does not trust")
    try:
        key.verify(kind, canonical(body), signature)
    except EdgeAdaptError as error:
        raise TrustError(f"{kind}: the signature does not match; the document was altered") from error
    return dict(body)
