"""The enrolment authority: who is a device of this fleet (X.509 with Ed25519, RFC 5280 and RFC 8410).

One level: the authority's self-signed certificate is pinned on every device and signs device certificates. A
device certificate binds one device id (its common name) to one identity key and can sign nothing itself.
Times come from the caller; nothing here reads a clock. Every time must carry a time zone.
"""

from aggregation.pki.authority import Authority
from aggregation.pki.certificates import DEVICE_ID, MAX_CERTIFICATE, Root

__all__ = ["DEVICE_ID", "MAX_CERTIFICATE", "Authority", "Root"]
