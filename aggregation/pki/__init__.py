"""The fleet's authority: which devices belong to the fleet (X.509 with Ed25519, RFC 5280 and RFC 8410).

There is one level. The authority's self-signed certificate is pinned on every device and signs device certificates. A
device certificate binds one device id (its common name) to one identity key and can sign nothing itself. Times come
from the caller and carry a time zone; nothing here reads a clock."""

from aggregation.pki.authority import Authority, new_serial
from aggregation.pki.certificates import DEVICE_ID, MAX_CERTIFICATE, Root
from aggregation.pki.identity import IdentityKey, PublicKey
from aggregation.pki.revocation import Reason, Revocation, RevocationList

__all__ = [
    "DEVICE_ID",
    "MAX_CERTIFICATE",
    "Authority",
    "IdentityKey",
    "PublicKey",
    "Reason",
    "Revocation",
    "RevocationList",
    "Root",
    "new_serial",
]
