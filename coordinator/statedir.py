"""The coordinator's state directory: its signing key, the authority that it pins, settings, registry and transcripts.

The authority's revocation list, where there is one, is read again for each session, so that a new one counts without a
restart; a list older than that of the last session counts for nothing. One run at a time uses the directory: Flower
itself would start a second one. With a registry in PostgreSQL, one run at a time leads, of all directories with that
registry; the others wait, and keep their copies of the transcript and of the newest revocation list up to date."""

import logging
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Self

from sqlalchemy.engine import URL

from aggregation.entropy import Entropy
from aggregation.errors import ConfigError, EdgeAdaptError, TrustError, of_file
from aggregation.pki import Root
from aggregation.pki.certificates import to_der
from aggregation.pki.identity import IdentityKey
from aggregation.pki.revocation import EXPIRED, MAX_REVOCATIONS
from aggregation.pki.tls import TlsKey, verify_tls
from aggregation.server import Coordinator
from coordinator.registry import Leadership, Lease, Registry, TranscriptTable, database, leadership
from coordinator.registry.lease import LOOK
from coordinator.runstate import Need, RunRecord, Stopped
from coordinator.settings import SERVICES, SETTINGS, FederationSettings, ServiceSettings
from coordinator.transcripts import Transcripts
from edgeadapt.formats import storage
from edgeadapt.formats.keyfiles import MAX_PEM, NEXT_TLS_KEY, TLS_CERTIFICATE, TLS_KEY, next_tls_key, tls_pair
from edgeadapt.formats.registryfiles import (
    AUTHORITY,
    BLOBS,
    DATABASE,
    PUBLIC_KEY,
    REGISTRY,
    REVOKED,
    SIGNING_KEY,
    TRANSCRIPT,
    RegistrySettings,
)
from edgeadapt.formats.registrystores import postgresql_url, shown

KEY = SIGNING_KEY
LOCK = "run.lock"
SERVICES_LOCK = "up.lock"  # held by ``edgeadapt coordinator up``
STOPPING = "stopping"  # there while that stops: a run ends between two steps, and closes its log
RELOAD = "reload"  # there when the next round is to have the settings as they are then
WAITING = "run.waiting"  # touched by a run that waits for the lease
HUNG = 60.0  # seconds without a touch, which comes each second or after a log was copied
PATIENCE = 2.0  # seconds in which a run takes the lock: a check whether it is held has it for a moment
TLS_REQUEST = "tls.csr"  # requests a certificate of the gateway's and the SuperLink's key
HEADER = b"# The settings of a federation. A run reads them when it starts, and some again after SIGHUP to 'up'.\n"
log = logging.getLogger("edgeadapt.coordinator")
REGISTRY_HEADER = b"# Where the registry is kept. Every command reads them when it starts.\n"
SERVICES_HEADER = b"# What 'edgeadapt coordinator up' runs on this machine. It reads them when it starts.\n"


@dataclass(frozen=True, slots=True)
class CoordinatorStateDir:
    """An opened state directory. ``protocol``: the coordinator's side of sessions; ``run``: what a run waits for.
    ``lease``: protects writes to registry and transcripts that machines share."""

    folder: Path
    key: IdentityKey
    root: Root
    settings: FederationSettings
    registry: Registry
    transcripts: Transcripts
    protocol: Coordinator
    run: RunRecord
    lease: Lease | None = None

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

        ``authority``: certificate of the authority to pin, PEM. ``services``: what this machine runs for the
        federation; None if that is not by ``edgeadapt coordinator up``. Raises ConfigError: the folder holds something,
        or is the working directory; or the database has a registry; TrustError: ``authority`` is not an authority's
        certificate."""
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
    def open(cls, folder: Path, *, copied: bool = False) -> Self:
        """Read the directory. ``copied``: to copy it, for which the settings of the federation may be ill-formed; a
        line of the log says so, and ``settings`` are the defaults. Raises ConfigError: a file is missing or a setting
        is ill-formed. Raises TrustError: the key, or the authority's certificate, is damaged."""
        stores = RegistrySettings.of(folder)
        require(folder, SETTINGS, KEY, AUTHORITY, *(() if stores.database else (DATABASE,)))
        try:
            settings = FederationSettings.read(folder / SETTINGS)
        except ConfigError as error:
            if not copied:
                raise
            log.warning("copied as it is: %s; mend it before rounds go on", error)
            settings = FederationSettings()
        with of_file(folder / KEY):
            key = IdentityKey.from_pem(storage.read(folder / KEY, MAX_PEM))
        with of_file(folder / AUTHORITY):
            root = Root.from_pem(storage.read(folder / AUTHORITY, MAX_PEM))
        registry = open_registry(folder, key)
        keep = settings.aggregation.keep_masked_inputs
        table = TranscriptTable(registry.engine) if registry.is_shared else None
        transcripts = Transcripts(folder / TRANSCRIPT, key, root, keep, registry.head, table)
        if table is not None:
            _update_transcript(folder, table)
        return cls(folder, key, root, settings, registry, transcripts, Coordinator(key), RunRecord(folder))

    def read_root(self, at: datetime, *, expired: bool = False) -> Root:
        """Read the authority, with the newest of the revocation lists in this directory and in its transcripts, which
        may have ``expired``. Raises TrustError: a list is not the authority's, there are two with one number, or the
        newest has expired."""
        newest = None
        for path in (self.folder / TRANSCRIPT / REVOKED, self.folder / REVOKED):
            if path.exists():
                with of_file(path):
                    revocations = self.root.revocations(storage.read(path, 2 * MAX_REVOCATIONS))
                    if newest is None or revocations.number >= newest.number:
                        newest = revocations.newer_than(newest)
                    else:
                        _warn_of_older(path, revocations.number, newest.number)
        if newest is not None and not expired:
            newest.require_fresh(at)
        return replace(self.root, revoked=newest)

    def await_root(self, sleep: Callable[[float], None]) -> Root:
        """Read the authority for a round. A service waits while the newest revocation list has expired. Raises as
        ``read_root``, and what ``sleep`` raises."""
        try:
            return self.read_root(datetime.now(UTC))
        except TrustError as error:
            if error.about != EXPIRED or not self.is_service:
                raise
            log.error("no round begins: %s", error)
        with self.run.waiting(Need.REVOCATIONS):
            while True:
                sleep(LOOK)
                try:
                    return self.read_root(datetime.now(UTC))
                except TrustError as error:
                    if error.about != EXPIRED:
                        raise

    def read_tls(self, at: datetime) -> tuple[bytes, bytes]:
        """Read the TLS key of what listens on this machine, and its certificate, both PEM. Raises ConfigError: the
        directory has none. Raises TrustError: the certificate is not one of the pinned authority for a gateway; or as
        ``read_root``."""
        for name, others in ((TLS_KEY, NEXT_TLS_KEY), (TLS_CERTIFICATE, TLS_CERTIFICATE)):
            if not ((self.folder / name).is_file() or (self.folder / others).is_file()):
                text = f"{self.folder} has no {name}: make a key with 'edgeadapt coordinator tls-request', and let the"
                raise ConfigError(f"{text} authority certify it", about=name)
        key, certificate = tls_pair(self.folder, f"let the authority certify {TLS_REQUEST}")
        root = self.read_root(at, expired=True)
        with of_file(self.folder / TLS_CERTIFICATE):
            verify_tls(root, to_der(certificate), at)
        return key.pem, certificate

    def request_tls(self, name: str, entropy: Entropy) -> None:
        """Make the next TLS key, and the request for its certificate; a next key without one is replaced. The key in
        use stays until the certificate of the next one is there, so what runs goes on. Raises ConfigError: no gateway
        can have this name, or the key that would be replaced is in use."""
        key = TlsKey.generate(entropy)
        request = key.request(name)
        with next_tls_key(self.folder) as path:
            storage.replace(path, key.pem)
            storage.replace(self.folder / TLS_REQUEST, request, storage.PUBLIC)

    @property
    def in_use(self) -> bool:
        return storage.is_locked(self.folder / LOCK)

    @property
    def name(self) -> str:
        return f"{socket.gethostname()}:{self.folder.resolve()}"

    @property
    def has_rounds_left(self) -> bool:
        """Whether the settings name more rounds than are recorded, or a schedule. Raises as ``Registry.rounds``."""
        return self.settings.evaluation.every > 0 or len(self.registry.rounds()) < self.settings.rounds

    def leadership(self) -> Leadership | None:
        """Who leads; None if nobody ever did, or the registry is not shared. Raises as ``database.explained``."""
        return leadership(self.registry.engine) if self.registry.is_shared else None

    def waits(self) -> bool:
        """Whether a run of this directory waits for the lease, and does not hang. The database cannot say it: a run
        that hangs does not wait, and two containers may have one host name."""
        try:
            return abs(time.time() - (self.folder / WAITING).stat().st_mtime) < HUNG
        except FileNotFoundError:
            return False

    @contextmanager
    def leading(self) -> Iterator[Self]:
        """Hold the directory and, where the registry is shared, its lease, while the block runs; wait for the lease.

        Yields the directory, with a registry and transcripts that the lease allows to write. Raises EdgeAdaptError:
        another run uses the directory, or the lease cannot be taken. Raises TrustError: the files of the transcript
        have what the database does not have."""
        served = self.is_service
        with self.locked(), self.run.living(self.settings.stuck_after, lambda: served and not self.is_service):
            if not self.registry.is_shared:
                yield self
                return
            try:
                lease = self._await_lease()
            finally:
                (self.folder / WAITING).unlink(missing_ok=True)
                self.run.leads()
            table = TranscriptTable(self.registry.engine, lease.epoch)
            with lease.kept(_sharing(self.folder, self.root, table)):
                _share_revocations(self.folder, self.root, table)
                _copy_transcript(self.folder, table, whole=True)
                registry = replace(self.registry, epoch=lease.epoch)
                transcripts = replace(self.transcripts, table=table)
                yield replace(self, registry=registry, transcripts=transcripts, lease=lease)

    def require_lead(self) -> None:
        """Check that no other coordinator has taken the lease. Raises EdgeAdaptError."""
        if self.lease is not None:
            self.lease.require()

    @property
    def is_service(self) -> bool:
        return storage.is_locked(self.folder / SERVICES_LOCK)

    def require_goes_on(self) -> None:
        """Check that the run is not to stop. Raises Stopped, or EdgeAdaptError as ``require_lead``."""
        if (self.folder / STOPPING).exists() and self.is_service:
            raise Stopped("the services are stopped: rounds are left", about="rounds")
        self.require_lead()

    def reloaded(self) -> Self:
        """Read the settings again, if that was asked for. Those that are not valid, or may not change now, change
        nothing, which a line of the log says."""
        if not (self.folder / RELOAD).exists():
            return self
        (self.folder / RELOAD).unlink(missing_ok=True)
        try:
            settings = FederationSettings.read(self.folder / SETTINGS)
            changed = self.settings.changes(settings)
        except (ConfigError, OSError) as error:
            log.error("the settings stay as they were: %s", error)
            return self
        log.info("settings that are new from this round on: %s", ", ".join(changed) or "none")
        return replace(self, settings=settings)

    def _await_lease(self) -> Lease:
        said: Leadership | None = None
        reachable, copied = True, False
        table = TranscriptTable(self.registry.engine)
        share = _sharing(self.folder, self.root, table)  # a list may be half copied: it is looked at again
        while True:
            try:
                lease = Lease.take(self.registry.engine, self.name)
                if isinstance(lease, Lease):
                    log.info("leads, epoch %d", lease.epoch)
                    return lease
                if said is None or said.epoch != lease.epoch:
                    self.run.waits(Need.LEASE)
                    log.info("waiting: %s leads, epoch %d", lease.leader, lease.epoch)
                said, reachable = lease, True
                (self.folder / WAITING).touch()
                share()
                _copy_transcript(self.folder, table, whole=not copied)
                copied = True
            except EdgeAdaptError as error:
                if type(error) is not EdgeAdaptError:  # a database that is away for a time
                    raise
                if reachable:
                    log.warning("waiting: %s", error)
                reachable = False
                if said is not None:
                    (self.folder / WAITING).touch()
            self.require_goes_on()
            time.sleep(LOOK)

    def locked(self) -> AbstractContextManager[None]:
        """Hold the directory for a run: two runs would write the same logs and registry. Raises EdgeAdaptError: another
        run holds it."""
        return run_lock(self.folder)


@cache
def _warn_of_older(path: Path, number: int, newer: int) -> None:
    """Warn once for each list: a gateway reads the lists every second."""
    log.warning(
        "%s is list %d, and list %d is in force, which was applied before: copy the newest", path, number, newer
    )


def run_lock(folder: Path) -> AbstractContextManager[None]:
    """Lock a directory as ``CoordinatorStateDir.locked`` does, also one that cannot be opened."""
    refusal = EdgeAdaptError(f"another run is using {folder}: wait until it ends, or end it", about=LOCK)
    return storage.locked_or(refusal, folder / LOCK, timeout=PATIENCE)


def update_transcript(folder: Path) -> None:
    """Bring the files of the transcript up to date, where the database of a directory's registry has the logs. Raises
    TrustError: they have what the database does not have."""
    if RegistrySettings.of(folder).database:
        with transcript_table(folder) as table:
            _update_transcript(folder, table)


@contextmanager
def transcript_table(folder: Path) -> Iterator[TranscriptTable]:
    """Open the logs in the database of a directory's registry. Raises EdgeAdaptError as ``database.connect``."""
    engine = database.connect(registry_url(folder))
    try:
        yield TranscriptTable(engine)
    finally:
        engine.dispose()


def _update_transcript(folder: Path, table: TranscriptTable) -> None:
    try:
        with storage.locked(folder / LOCK, timeout=0):
            _copy_transcript(folder, table)
    except TimeoutError:  # a run does it
        table.await_copy(folder / TRANSCRIPT, PATIENCE + LOOK)


def _copy_transcript(folder: Path, table: TranscriptTable, *, whole: bool = False) -> None:
    """Copy the logs, and the public keys with which they are checked."""
    transcript = folder / TRANSCRIPT
    table.copy_to(transcript, whole=whole)
    for name in (AUTHORITY, PUBLIC_KEY) if transcript.exists() else ():
        if not (transcript / name).exists() and (folder / name).exists():
            storage.replace(transcript / name, storage.read(folder / name, MAX_PEM), storage.PUBLIC)


def _share_revocations(folder: Path, root: Root, table: TranscriptTable) -> None:
    """Let a state directory and the database have the newer of their revocation lists. So it is enough to copy a list
    to one of several machines, and none falls back behind another one. Raises TrustError: a list is not the
    authority's."""
    path, stored = folder / REVOKED, table.revocations()
    own = storage.read(path, 2 * MAX_REVOCATIONS) if path.exists() else None
    if own == stored:
        return
    with of_file(path):
        here = root.revocations(own) if own is not None else None
    with of_file("the revocation list in the database"):
        there = root.revocations(stored) if stored is not None else None
    if there is not None and (here is None or there.number > here.number):
        storage.replace(path, there.to_pem(), storage.PUBLIC)
        log.info("revocation list %d came from the database", there.number)
    elif here is not None and (there is None or here.number > there.number):
        table.offer_revocations(here.to_pem(), stored)


def _sharing(folder: Path, root: Root, table: TranscriptTable) -> Callable[[], None]:
    """Make a call of ``_share_revocations`` that warns of errors: a coordinator that leads or waits keeps its list."""
    said = ""

    def share() -> None:
        nonlocal said
        try:
            _share_revocations(folder, root, table)
            said = ""
        except (EdgeAdaptError, OSError) as error:
            if str(error) != said:
                said = str(error)
                log.warning("revocation lists are not shared: %s", said)

    return share


def require(folder: Path, *names: str) -> None:
    """Check that a folder has these files of a coordinator's state directory. Raises ConfigError."""
    for name in names:
        if not (folder / name).is_file():
            text = f"{folder} is not a coordinator's state directory: it has no {name}"
            raise ConfigError(f"{text}; make one with 'edgeadapt coordinator init'", about=name)


def open_registry(folder: Path, key: IdentityKey) -> Registry:
    stores = RegistrySettings.of(folder)
    return Registry.open(registry_url(folder), stores.blobs or str(folder / BLOBS), [key.public])


def registry_url(folder: Path) -> URL:
    """Find the database of a state directory. Raises as ``RegistrySettings.of`` and ``postgresql_url``."""
    stores = RegistrySettings.of(folder)
    return postgresql_url(stores.database) if stores.database else own_database(folder)


def own_database(folder: Path) -> URL:
    """Address of the registry's database that is in a folder. It is not formatted: a folder may have a "?"."""
    return URL.create("sqlite", database=str(folder / DATABASE))
