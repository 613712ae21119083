"""Until when the TLS certificate and the revocation list in a coordinator's state directory are valid.

Both are to be replaced in the last third of their validity, as an agent has the certificates of its device renewed.
Nothing is verified here: what uses the files does that.
"""

from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509

from adapters import storage
from adapters.keyfiles import MAX_PEM, TLS_CERTIFICATE
from aggregation.errors import EdgeAdaptError, TrustError
from aggregation.pki.certificates import load, to_der
from aggregation.pki.revocation import MAX_REVOCATIONS
from coordinator.statedir import REVOKED

LEFT = 1 / 3  # of its validity: what has less left is to be replaced
REMEDY = {
    TLS_CERTIFICATE: "renew it with 'edgeadapt coordinator tls-request' and 'edgeadapt authority issue-tls'",
    REVOKED: "let the authority sign a new list ('edgeadapt authority crl'), and copy it",
}
Validity = tuple[datetime, datetime]


def expiries(folder: Path, now: datetime) -> dict[str, dict[str, Any]]:
    """Of the files in a state directory that end: name → ``until``, and ``warning``, None if there is nothing to do."""
    found = {}
    for name, limit, read in ((TLS_CERTIFICATE, MAX_PEM, _of_certificate), (REVOKED, 2 * MAX_REVOCATIONS, _of_list)):
        if (folder / name).exists():
            try:
                span = read(storage.read(folder / name, limit))
                until, text = span[1].isoformat(), warning(name, *span, now)
            except (EdgeAdaptError, OSError) as error:
                until, text = None, f"{name} cannot be read: {error}"
            found[name] = {"until": until, "warning": text or None}
    return found


def warning(name: str, begin: datetime, end: datetime, now: datetime) -> str:
    """What to do about a file, in one line; empty before the last third of its validity.

    >>> from datetime import UTC
    >>> begin, end = datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 4, 1, tzinfo=UTC)
    >>> warning("tls.pem", begin, end, datetime(2026, 2, 15, tzinfo=UTC))
    ''
    >>> warning("tls.pem", begin, end, datetime(2026, 3, 20, tzinfo=UTC)).partition(":")[0]
    'tls.pem ends on 2026-04-01, in 12 days'
    >>> warning("tls.pem", begin, end, datetime(2026, 4, 2, tzinfo=UTC)).partition(":")[0]
    'tls.pem ended on 2026-04-01'
    """
    if end - now >= LEFT * (end - begin):
        return ""
    left = f"ended on {end:%Y-%m-%d}" if now > end else f"ends on {end:%Y-%m-%d}, in {(end - now) // timedelta(1)} days"
    return f"{name} {left}: {REMEDY[name]}"


def validity(der: bytes) -> Validity:
    """From when and until when a certificate is valid. Raises TrustError: not a certificate."""
    certificate = load(der)
    return certificate.not_valid_before_utc, certificate.not_valid_after_utc


def _of_certificate(raw: bytes) -> Validity:
    return validity(to_der(raw))


def _of_list(raw: bytes) -> Validity:
    try:
        listed = x509.load_pem_x509_crl(raw) if raw.lstrip().startswith(b"-----") else x509.load_der_x509_crl(raw)
        end = listed.next_update_utc
    except (ValueError, x509.InvalidVersion):
        end = None
    if end is None:
        raise TrustError("not a revocation list that says until when it is valid", about="revocations")
    return listed.last_update_utc, end
