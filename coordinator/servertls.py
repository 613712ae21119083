"""The TLS of what listens on the coordinator's machine, through a renewal without a restart.

``tls-request`` writes the next key, and the authority's certificate for it replaces the old one whenever it arrives.
Servers check the files as a connection begins. Connections that exist stay as they are; files that cannot be used are
reported once, and the previous pair stays in use."""

import logging
import ssl
import tempfile
import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

import grpc

from aggregation.errors import EdgeAdaptError
from aggregation.pki.certificates import to_der
from aggregation.pki.tls import hosts_of
from coordinator.statedir import CoordinatorStateDir
from edgeadapt.formats.keyfiles import NEXT_TLS_KEY, TLS_CERTIFICATE, TLS_KEY

LOOK = 1.0  # seconds between two polls of the files
log = logging.getLogger("edgeadapt.coordinator")


@dataclass(frozen=True, slots=True)
class ServerTls:
    """A P-256 key and its certificate for a gateway, both PEM."""

    key: bytes = field(repr=False)
    certificate: bytes

    @property
    def hosts(self) -> frozenset[str]:
        return _hosts(self.certificate)

    def newest(self) -> "ServerTls":
        """Return itself, as ``TlsFiles`` returns what a connection that begins now gets: in any thread, at any time."""
        return self


@lru_cache(maxsize=8)
def _hosts(certificate: bytes) -> frozenset[str]:
    """Keep the names, as each request of a browser asks."""
    return frozenset(name.lower() for name in hosts_of(to_der(certificate)))


class TlsFiles:
    """TLS files of a coordinator's state directory, read again when they have changed."""

    def __init__(self, state_dir: CoordinatorStateDir) -> None:
        """Read the files. Raises as ``CoordinatorStateDir.read_tls``."""
        self._state_dir = state_dir
        self._lock = threading.Lock()
        self._seen = self._stamp()
        self._tls = self._read()
        self._next = time.monotonic() + LOOK
        self._problem = ""

    def newest(self) -> ServerTls:
        with self._lock:
            if time.monotonic() >= self._next:
                self._look()
                self._next = time.monotonic() + LOOK
            return self._tls

    def _look(self) -> None:
        try:
            if (stamp := self._stamp()) != self._seen:
                tls = self._read()
                if tls != self._tls:
                    log.info("%s was replaced: connections that begin now have the new one", TLS_CERTIFICATE)
                    self._tls = tls
                self._seen, self._problem = stamp, ""
        except (EdgeAdaptError, OSError) as error:  # it may be half copied: it is looked at again
            if str(error) != self._problem:
                self._problem = str(error)
                log.warning("the new TLS files are not used: %s", self._problem)

    def _read(self) -> ServerTls:
        return ServerTls(*self._state_dir.read_tls(datetime.now(UTC)))

    def _stamp(self) -> tuple[tuple[int, int, int] | None, ...]:
        return tuple(_stamp(self._state_dir.folder / name) for name in (TLS_CERTIFICATE, TLS_KEY, NEXT_TLS_KEY))


TlsSource = ServerTls | TlsFiles


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def credentials(source: TlsSource) -> grpc.ServerCredentials:
    last = source.newest()

    def configuration() -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration([(last.key, last.certificate)])

    def changed() -> grpc.ServerCertificateConfiguration | None:
        """None: nothing has changed."""
        nonlocal last
        if (newest := source.newest()) == last:
            return None
        last = newest
        return configuration()

    return grpc.dynamic_ssl_server_credentials(configuration(), changed, require_client_authentication=False)


def context(source: TlsSource) -> ssl.SSLContext:
    last = source.newest()
    listening = current = _context(last)

    def follow(connection: ssl.SSLObject, host: str | None, given: ssl.SSLContext) -> None:
        """Answer OpenSSL in each handshake, whether a name is asked for or not."""
        nonlocal last, current
        if (newest := source.newest()) != last:
            last, current = newest, _context(newest)
        connection.context = current

    listening.sni_callback = follow
    return listening


def _context(tls: ServerTls) -> ssl.SSLContext:
    result = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    result.minimum_version = ssl.TLSVersion.TLSv1_2
    with tempfile.NamedTemporaryFile() as file:  # the standard library reads keys from files only; this one is private
        file.write(tls.key + b"\n" + tls.certificate)
        file.flush()
        result.load_cert_chain(Path(file.name))
    return result
