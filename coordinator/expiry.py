"""Until when the TLS certificate and the revocation list in a coordinator's state directory are valid. Both are to be
replaced in the last third of their validity, as an agent has the certificates of its device renewed. Nothing is
verified here: what uses the files does that."""

import logging
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509

from aggregation.errors import EdgeAdaptError, TrustError, of_file
from aggregation.pki.certificates import load, to_der
from aggregation.pki.revocation import MAX_REVOCATIONS
from coordinator.statedir import TLS_REQUEST
from edgeadapt.formats import storage
from edgeadapt.formats.keyfiles import MAX_PEM, TLS_CERTIFICATE, tls_pair
from edgeadapt.formats.registryfiles import REVOKED, TRANSCRIPT

EVERY = 3600.0  # seconds between two checks of a process that goes on
LEFT = 1 / 3  # share of the validity; what has less left is to be replaced
REMEDY = {
    TLS_CERTIFICATE: "renew it with 'edgeadapt coordinator tls-request' and 'edgeadapt authority issue'",
    REVOKED: "let the authority sign a new list ('edgeadapt authority revoke DIR'), and copy it",
}
Validity = tuple[datetime, datetime]
log = logging.getLogger("edgeadapt.coordinator")


def expiries(folder: Path, now: datetime) -> dict[str, dict[str, Any]]:
    """List the files in a state directory that end: name → ``until`` and ``warning``, None if nothing is to be done."""
    result = {}
    for name, read in ((TLS_CERTIFICATE, _of_certificate), (REVOKED, _of_newest_list)):
        try:
            if (span := read(folder)) is None:
                continue
            until, text = span[1].isoformat(), warning(name, *span, now) or _mismatch(name, folder)
        except (EdgeAdaptError, OSError) as error:
            until, text = None, f"{name} cannot be read: {error}"
        result[name] = {"until": until, "warning": text or None}
    return result


@dataclass(slots=True)
class ExpiryLog:
    """Log the warnings of ``expiries``, each once a day."""

    folder: Path
    _said: dict[str, str | None] = field(default_factory=dict)
    _next: float = 0.0  # by the monotonic clock

    def look(self) -> None:
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + EVERY
        for name, row in expiries(self.folder, datetime.now(UTC)).items():
            if row["warning"] and row["warning"] != self._said.get(name):  # the days left are in it
                log.warning("%s", row["warning"])
            self._said[name] = row["warning"]


def warning(name: str, begin: datetime, end: datetime, now: datetime) -> str:
    """Explain what to do about a file, in one line; empty before the last third of its validity.

    >>> from datetime import UTC
    >>> begin, end = datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 4, 1, tzinfo=UTC)
    >>> warning("tls.pem", begin, end, datetime(2026, 2, 15, tzinfo=UTC))
    ''
    >>> warning("tls.pem", begin, end, datetime(2026, 3, 20, tzinfo=UTC)).partition(":")[0]
    'tls.pem ends on 2026-04-01, in 12 days'
    """
    if end - now >= LEFT * (end - begin):
        return ""
    left = f"ended on {end:%Y-%m-%d}" if now > end else f"ends on {end:%Y-%m-%d}, in {(end - now) // timedelta(1)} days"
    return f"{name} {left}: {REMEDY[name]}"


def validity(der: bytes) -> Validity:
    """Read a certificate's period. Raises TrustError: not a certificate."""
    certificate = load(der)
    return certificate.not_valid_before_utc, certificate.not_valid_after_utc


def _of_certificate(folder: Path) -> Validity | None:
    path = folder / TLS_CERTIFICATE
    return validity(to_der(storage.read(path, MAX_PEM))) if path.exists() else None


def _mismatch(name: str, folder: Path) -> str:
    """Explain why a start would refuse a certificate; empty if its key is there."""
    try:
        if name == TLS_CERTIFICATE:
            tls_pair(folder, f"let the authority certify {TLS_REQUEST}", rename=False)
    except (EdgeAdaptError, OSError) as error:
        return str(error)
    return ""


def _of_newest_list(folder: Path) -> Validity | None:
    """Validity of the list that ``CoordinatorStateDir.read_root`` takes: this directory's, or the last session's."""
    lists = []
    for path in (folder / TRANSCRIPT / REVOKED, folder / REVOKED):
        if path.exists():
            with of_file(path):
                lists.append(_of_list(storage.read(path, 2 * MAX_REVOCATIONS)))
    return max(lists)[1] if lists else None


def _of_list(raw: bytes) -> tuple[int, Validity]:
    try:
        listed = x509.load_pem_x509_crl(raw) if raw.lstrip().startswith(b"-----") else x509.load_der_x509_crl(raw)
        number, end = listed.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number, listed.next_update_utc
    except (ValueError, x509.InvalidVersion, x509.ExtensionNotFound):
        end = None
    if end is None:
        raise TrustError("not a revocation list that says until when it is valid", about="revocations")
    return number, (listed.last_update_utc, end)
