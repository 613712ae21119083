"""The coordinator's state directory: its signing key, the authority that it pins, settings, registry and transcripts.

It also holds the authority's revocation list, where there is one. The list is read again for each session, so that a
new one counts without a restart; a list older than that of the last session is refused. One run at a time uses the
directory: Flower itself would start a second one.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Self

from sqlalchemy.engine import URL

from adapters import storage
from adapters.keyfiles import MAX_PEM
from adapters.registryfiles import BLOBS, DATABASE, REGISTRY, SIGNING_KEY, RegistrySettings
from adapters.registrystores import postgresql_url, shown
from aggregation.entropy import Entropy
from aggregation.errors import ConfigError, EdgeAdaptError, of_file
from aggregation.pki import Root
from aggregation.pki.certificates import to_der
from aggregation.pki.identity import IdentityKey
from aggregation.pki.revocation import MAX_REVOCATIONS
from aggregation.pki.tls import TlsRole, verify_tls
from coordinator.registry import Registry
from coordinator.servicesettings import SERVICES, ServiceSettings
from coordinator.settings import SETTINGS, FederationSettings
from coordinator.transcripts import Transcripts

KEY = SIGNING_KEY
PUBLIC_KEY = "coordinator.pem"  # what devices pin
AUTHORITY = "authority.pem"
REVOKED = "revoked.crl"
TRANSCRIPT = "transcript"
LOCK = "run.lock"
PATIENCE = 2.0  # seconds in which a run takes the lock: whoever looks whether it is held has it for a moment
TLS_KEY, TLS_REQUEST, TLS_CERTIFICATE = "tls.key", "tls.csr", "tls.pem"  # of the gateway and the SuperLink
HEADER = b"# The settings of a federation. A run reads them when it starts.\n"
REGISTRY_HEADER = b"# Where the registry is kept. Every command reads them when it starts.\n"
SERVICES_HEADER = b"# What 'edgeadapt coordinator up' runs on this machine. It reads them when it starts.\n"


@dataclass(frozen=True, slots=True)
class CoordinatorStateDir:
    """A coordinator's state directory, opened. Functions take the parts that they use, not this."""

    folder: Path
    key: IdentityKey
    root: Root
    settings: FederationSettings
    registry: Registry
    transcripts: Transcripts

    @classmethod
    def create(
        cls,
        folder: Path,
        authority: bytes,
        settings: FederationSettings,
        entropy: Entropy,
        services: ServiceSettings | None = None,
        stores: RegistrySettings | None = None,
    ) -> Self:
        """Make a new state directory with a new signing key and an empty registry.

        Args:
            folder: Does not exist, or is empty.
            authority: Certificate of the authority to pin, PEM.
            settings: Of the federation.
            entropy: Draws the key.
            services: What this machine runs for the federation; None if that is not by ``edgeadapt coordinator up``.
            stores: Where the registry is kept; None: in the directory.

        Raises:
            ConfigError: The folder holds something, or is the working directory; or the database has a registry.
            TrustError: ``authority`` is not an authority's certificate.
        """
        with of_file("the authority's certificate"):
            root = Root.from_pem(authority)
        key = IdentityKey.generate(entropy)
        with storage.new_folder(folder, mode=storage.PRIVATE_FOLDER) as stage:
            storage.replace(stage / KEY, key.to_pem())
            storage.replace(stage / PUBLIC_KEY, key.public.to_pem(), storage.PUBLIC)
            storage.replace(stage / AUTHORITY, root.to_pem(), storage.PUBLIC)
            storage.replace(stage / SETTINGS, HEADER + settings.to_toml().encode(), storage.PUBLIC)
            if services is not None:
                storage.replace(stage / SERVICES, SERVICES_HEADER + services.to_toml().encode(), storage.PUBLIC)
            if stores is not None:
                storage.replace(stage / REGISTRY, REGISTRY_HEADER + stores.to_toml().encode(), storage.PUBLIC)
            registry = open_registry(stage, key)
            try:
                if not registry.is_empty:
                    text = f"{shown(registry.engine.url)} has a registry already: name a new database"
                    raise ConfigError(text, about="database")
            finally:
                registry.close()
        return cls.open(folder)

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Read the directory.

        Raises:
            ConfigError: A file is missing or a setting is ill-formed.
            TrustError: The key, or the authority's certificate, is damaged.
        """
        stores = RegistrySettings.of(folder)
        for name in (SETTINGS, KEY, AUTHORITY, *(() if stores.database else (DATABASE,))):
            if not (folder / name).is_file():
                raise ConfigError(
                    f"{folder} is not a coordinator's state directory: it has no {name}; "
                    "make one with 'edgeadapt coordinator init'",
                    about=name,
                )
        settings = FederationSettings.read(folder / SETTINGS)
        with of_file(folder / KEY):
            key = IdentityKey.from_pem(storage.read(folder / KEY, MAX_PEM))
        with of_file(folder / AUTHORITY):
            root = Root.from_pem(storage.read(folder / AUTHORITY, MAX_PEM))
        registry = open_registry(folder, key)
        keep = settings.aggregation.keep_masked_inputs
        transcripts = Transcripts(folder / TRANSCRIPT, key, root, keep, registry.head)
        return cls(folder, key, root, settings, registry, transcripts)

    def read_root(self, at: datetime) -> Root:
        """The authority, with the newest of the revocation lists in this directory and in its transcripts.

        Args:
            at: Now.

        Raises:
            TrustError: A list is not the authority's, is older than that of the last session, or has expired.
        """
        root = self.root
        for path in (self.folder / TRANSCRIPT / REVOKED, self.folder / REVOKED):
            if path.exists():
                with of_file(path):
                    root = root.with_revocations(storage.read(path, 2 * MAX_REVOCATIONS))
        if root.revoked is not None:
            root.revoked.require_fresh(at)
        return root

    def read_tls(self, at: datetime) -> tuple[bytes, bytes]:
        """The TLS key of what listens on this machine, and its certificate, both PEM.

        Args:
            at: Now.

        Raises:
            ConfigError: The directory has none.
            TrustError: The certificate is not one of the pinned authority for a gateway.
        """
        for name in (TLS_KEY, TLS_CERTIFICATE):
            if not (self.folder / name).is_file():
                text = f"{self.folder} has no {name}: make a key with 'edgeadapt coordinator tls-request', and let the"
                raise ConfigError(f"{text} authority certify it", about=name)
        key, certificate = (storage.read(self.folder / name, MAX_PEM) for name in (TLS_KEY, TLS_CERTIFICATE))
        with of_file(self.folder / TLS_CERTIFICATE):
            verify_tls(self.read_root(at), to_der(certificate), TlsRole.GATEWAY, at)
        return key, certificate

    @property
    def in_use(self) -> bool:
        """Whether a run holds the directory."""
        try:
            with storage.locked(self.folder / LOCK, timeout=0) if (self.folder / LOCK).exists() else nullcontext():
                return False
        except TimeoutError:
            return True

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory for a run: two runs would write the same logs and registry.

        Raises:
            EdgeAdaptError: Another run holds it.
        """
        with run_lock(self.folder):
            yield


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """As ``CoordinatorStateDir.locked``, for a directory that cannot be opened."""
    with ExitStack() as stack:
        try:
            stack.enter_context(storage.locked(folder / LOCK, timeout=PATIENCE))
        except TimeoutError:
            raise EdgeAdaptError(f"another run is using {folder}: wait until it ends, or end it", about=LOCK) from None
        yield


def open_registry(folder: Path, key: IdentityKey) -> Registry:
    """The registry of a coordinator's state directory.

    Raises:
        ConfigError: As ``RegistrySettings.of`` and ``postgresql_url``.
        EdgeAdaptError: As ``Registry.open``.
    """
    stores = RegistrySettings.of(folder)
    return Registry.open(registry_url(folder), stores.blobs or str(folder / BLOBS), [key.public])


def registry_url(folder: Path) -> URL:
    """The address of the database of a state directory. Raises as ``RegistrySettings.of`` and ``postgresql_url``."""
    stores = RegistrySettings.of(folder)
    return postgresql_url(stores.database) if stores.database else own_database(folder)


def own_database(folder: Path) -> URL:
    """The address of the registry's database that is in a folder. It is not formatted: a folder may have a "?"."""
    return URL.create("sqlite", database=str(folder / DATABASE))
