"""Copy a coordinator to an archive while it runs, and make a state directory from one (docs/decisions/0074).

The registry is read first, in one transaction, and the logs after it: a log is ahead of the registry by what its
session did meanwhile, and is cut before the first ending of a round that the copied registry does not know. That is the
state in which a ``kill -9`` right after the last copied round leaves a coordinator, and a start goes on from there.

An archive for a standby, which shares the database and the place of the adapters, has what is in neither.

An archive is a tar (POSIX ustar) whose manifest the coordinator signs:

    coordinator.pem   the public key, which devices pin
    backup.json       a signed document: what the registry holds, and the digest of SHA256SUMS
    SHA256SUMS        a line for each file that follows, in order, as ``sha256sum`` writes it
    …                 the files

Equal files give equal bytes: no archive has a time or a user. The reader accepts no header but the one that the writer
makes for that name and size, so it meets no link, no device, no name outside of the archive and no extension."""

import hashlib
import os
import re
import shutil
import sqlite3
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Self

from sqlalchemy import Engine, Table

from aggregation import envelope
from aggregation.errors import ConfigError, DataError, EdgeAdaptError, TrustError, of_file
from aggregation.pki.identity import IdentityKey, PublicKey
from aggregation.pki.revocation import MAX_REVOCATIONS
from aggregation.transcript.entries import Abort, Checkpoint, Entry, Result, write
from coordinator.registry import Blobs, Head, Registry, database, transcripttable
from coordinator.settings import SERVICES, SETTINGS
from coordinator.statedir import (
    KEY,
    REGISTRY_HEADER,
    TLS_REQUEST,
    CoordinatorStateDir,
    open_registry,
    own_database,
    registry_url,
)
from coordinator.transcripts import StoredLog, require_agreement
from edgeadapt.auditing import transcripts
from edgeadapt.formats import registryfiles, storage
from edgeadapt.formats.blobs import OBJECT_STORES
from edgeadapt.formats.dsse import MAX_ENVELOPE
from edgeadapt.formats.keyfiles import MAX_PEM, NEXT_TLS_KEY, TLS_CERTIFICATE, TLS_KEY
from edgeadapt.formats.manifest import INTERRUPTED, Count, Manifest, Sha256
from edgeadapt.formats.registryreader import open_registry_files
from edgeadapt.formats.registrystores import shown
from edgeadapt.formats.storage import WorkFolder

MANIFEST, SUMS = "backup.json", "SHA256SUMS"
LARGEST_LIST = 2**28  # bytes of SHA256SUMS: two million files
BLOCK = tarfile.BLOCKSIZE
END = bytes(2 * BLOCK)
_LINE = re.compile(r"([0-9a-f]{64})  ([!-~]{1,99})")

Report = Callable[[int, int], object]  # bytes done since the last call, of how many in all


@dataclass(frozen=True, slots=True)
class BackupManifest(Manifest):
    """What a backup holds. ``version`` and ``round`` are the newest. ``registry``: ``RegistrySnapshot.digest``; None
    for a standby, whose registry stays where ``registry.toml`` says."""

    NAME: ClassVar[str] = "coordinator-backup"

    files: Sha256  # digest of SHA256SUMS
    registry: Sha256 | None
    version: Count | None
    round: Count  # 0 before the first


@dataclass(frozen=True, slots=True)
class ArchiveFile:
    """A file to put into an archive. ``read`` returns the same bytes each time: it is called twice."""

    name: str
    size: int
    read: Callable[[], bytes]
    mode: int = storage.PUBLIC


def write_archive(
    out: Path, files: Sequence[ArchiveFile], manifest: Callable[[str], BackupManifest], key: IdentityKey, report: Report
) -> BackupManifest:
    """Write an archive, readable by its owner only, and return its manifest. ``out``: does not exist; a part of it is
    left where the disk is full. ``manifest``: digest of SHA256SUMS → the manifest. ``report``: called for each file
    when it was hashed, and when it was written. Raises EdgeAdaptError: a file changed meanwhile."""
    digests, total = list[str](), 2 * sum(entry.size for entry in files)
    for entry in files:
        digests.append(hashlib.sha256(entry.read()).hexdigest())
        report(entry.size, total)
    sums = "".join(f"{digest}  {entry.name}\n" for digest, entry in zip(digests, files, strict=True)).encode()
    made = manifest(hashlib.sha256(sums).hexdigest())
    with os.fdopen(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, storage.PRIVATE), "wb") as file:
        for name, content in (
            (registryfiles.PUBLIC_KEY, key.public.to_pem()),
            (MANIFEST, made.sign(key)),
            (SUMS, sums),
        ):
            _append(file, name, content, storage.PUBLIC)
        for entry, digest in zip(files, digests, strict=True):
            content = entry.read()
            if hashlib.sha256(content).hexdigest() != digest:
                raise EdgeAdaptError(f"{entry.name} changed while it was copied: repeat the backup", about=entry.name)
            _append(file, entry.name, content, entry.mode)
            report(entry.size, total)
        file.write(END)
        storage.flush(file)
    return made


def extract(
    archive: Path, folder: Path, trusted: PublicKey | None, modes: Mapping[str, int], report: Report
) -> BackupManifest:
    """Write the files of an archive to an empty folder, each after its digest was found to be the one that was signed.

    ``trusted``: the coordinator's key; None: the one in the archive, which then proves only that nothing is damaged.
    ``modes``: regular expression of a name → permissions. A file with another name is refused. Raises DataError: it is
    not an archive of a coordinator, or it is truncated; TrustError: it is of another coordinator, or was altered."""
    with storage.opened(archive, 2**63) as (file, total):
        reader = _ArchiveReader(archive, file)
        public = PublicKey.from_pem(reader.next(registryfiles.PUBLIC_KEY, MAX_PEM))
        if trusted not in (None, public):
            text = f"{archive} is of the coordinator {public.key_id}, and not of the one that was named"
            raise TrustError(text, about=registryfiles.PUBLIC_KEY)
        storage.create(folder / registryfiles.PUBLIC_KEY, public.to_pem(), storage.PUBLIC)
        manifest = BackupManifest.accept(reader.next(MANIFEST, MAX_ENVELOPE), [public])
        sums = reader.next(SUMS, LARGEST_LIST)
        if hashlib.sha256(sums).hexdigest() != manifest.files:
            raise reader.altered(SUMS)
        for digest, name in _listed(reader, sums):
            mode = next((mode for pattern, mode in modes.items() if re.fullmatch(pattern, name)), None)
            if mode is None:
                raise DataError(f"{archive} has a file {name}, which no coordinator has", about=name)
            content = reader.next(name, storage.LARGEST, mode)
            if hashlib.sha256(content).hexdigest() != digest:
                raise reader.altered(name)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            storage.create(folder / name, content, mode)
            report(len(content), total)
        reader.end()
    return manifest


def _listed(reader: "_ArchiveReader", sums: bytes) -> Iterator[tuple[str, str]]:
    for line in sums.decode("ascii", "replace").splitlines():
        if (match := _LINE.fullmatch(line)) is None:
            raise reader.altered(SUMS)
        yield match[1], match[2]


@dataclass(frozen=True, slots=True)
class _ArchiveReader:
    archive: Path
    file: BinaryIO

    def next(self, name: str, limit: int, mode: int = storage.PUBLIC) -> bytes:
        """Read the next file, which has that name and mode and at most ``limit`` bytes."""
        header = self._read(BLOCK)
        try:
            size = tarfile.TarInfo.frombuf(header, "ascii", "strict").size
        except (tarfile.HeaderError, ValueError):
            size = -1
        if not 0 <= size <= limit or header != _header(name, size, mode):
            if name == registryfiles.PUBLIC_KEY:
                raise DataError(f"{self.archive} is not a backup of a coordinator", about=self.archive.name)
            raise self.altered(name)
        content = self._read(size)
        if self._read(-size % BLOCK).strip(b"\0"):
            raise self.altered(name)
        return content

    def end(self) -> None:
        if self._read(len(END)) != END or self.file.read(1):
            raise self.altered("its end")

    def altered(self, name: str) -> TrustError:
        return TrustError(f"{self.archive}: {name} was altered or is missing: take another copy", about=name)

    def _read(self, size: int) -> bytes:
        content = self.file.read(size)
        if len(content) < size:
            raise DataError(f"{self.archive} is truncated: copy it again", about=self.archive.name)
        return content


def _append(file: BinaryIO, name: str, content: bytes, mode: int) -> None:
    file.write(_header(name, len(content), mode))
    file.write(content)
    file.write(bytes(-len(content) % BLOCK))


def _header(name: str, size: int, mode: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, mode
    return info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")


VALUE_LENGTH = 8  # bytes before each value that the digest covers


@dataclass(frozen=True, slots=True)
class RegistrySnapshot:
    rows: dict[str, tuple[dict[str, Any], ...]] = field(repr=False)

    @classmethod
    def read(cls, engine: Engine) -> Self:
        """Read all tables in one transaction, while a coordinator may write. Raises as ``database.explained``."""
        with database.explained(engine), engine.connect() as connection:
            if engine.dialect.name == "postgresql":  # by default each statement would see a moment of its own
                connection = connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
            with connection.begin():
                queries = {table.name: table.select().order_by(*table.primary_key) for table in _tables()}
                found = {name: connection.execute(query).mappings() for name, query in queries.items()}
                rows = {name: tuple(map(dict, each)) for name, each in found.items()}
        return cls(rows)

    def insert(self, engine: Engine, transcript: Path | None = None) -> None:
        """Put all rows, all or none, into a registry without any; the logs in ``transcript`` too, if it takes logs.
        Raises ConfigError: it has some."""
        with database.explained(engine), engine.begin() as connection:
            for table in _tables():
                if connection.execute(table.select().limit(1)).first() is not None:
                    text = f"{shown(engine.url)} has a registry already: name a new database"
                    raise ConfigError(text, about="database")
                if rows := self.rows[table.name]:
                    connection.execute(table.insert(), list(rows))
            if transcript is not None:
                transcripttable.insert(connection, transcript)

    def digest(self) -> str:
        """SHA-256 (hex) of every value, each after its length, and of the number of rows of each table."""
        state = hashlib.sha256()
        for table in _tables():
            rows = self.rows[table.name]
            state.update(len(rows).to_bytes(VALUE_LENGTH, "big"))
            for value in (row[column.name] for row in rows for column in table.columns):
                raw = value if isinstance(value, bytes) else str(value).encode()
                state.update(len(raw).to_bytes(VALUE_LENGTH, "big") + raw)
        return state.hexdigest()


def _tables() -> tuple[Table, ...]:
    return database.versions, database.rounds, database.optimizer


SUPERLINK = "superlink.db"  # Flower's SuperLink keeps the public keys of the SuperNodes there
SECRETS = (KEY, TLS_KEY, NEXT_TLS_KEY)
SETTLED = (registryfiles.AUTHORITY, SETTINGS, SERVICES, TLS_CERTIFICATE, TLS_REQUEST)  # files that no run writes
MAX_FILE = 2 * MAX_REVOCATIONS  # bytes of a key, certificate, list or file of settings
_SESSION = (registryfiles.AUTHORITY, registryfiles.PUBLIC_KEY, registryfiles.REVOKED)  # in TRANSCRIPT
_NAMED = (
    rf"{registryfiles.BLOBS}/[0-9a-f]{{64}}\.safetensors",
    rf"{registryfiles.TRANSCRIPT}/session-\d{{6,9}}\.log",
    rf"{registryfiles.TRANSCRIPT}/{transcripts.VECTORS}/[0-9a-f]{{64}}\.bin",
)
_PUBLIC = (
    *SETTLED,
    registryfiles.REVOKED,
    registryfiles.REGISTRY,
    registryfiles.DATABASE,
    *(f"{registryfiles.TRANSCRIPT}/{name}" for name in _SESSION),
)
MODES = {
    "|".join(map(re.escape, (*SECRETS, SUPERLINK))): storage.PRIVATE,
    "|".join((*map(re.escape, _PUBLIC), *_NAMED)): storage.PUBLIC,
}  # names in an archive → permissions
EMPTY = Head((0, ""), None, None)


@dataclass(frozen=True, slots=True)
class Backup:
    """``files``: how many the archive has."""

    manifest: BackupManifest
    files: int
    size: int
    key_id: str


def back_up(
    state_dir: CoordinatorStateDir,
    out: Path,
    *,
    keys: bool,
    standby: bool = False,
    report: Report = lambda done, total: None,
) -> Backup:
    """Write an archive of a coordinator, which may run meanwhile.

    Args:
        out: Must not exist; its owner alone can read it. Nothing is left of it after an error.
        standby: For a second machine that shares the registry: settings, certificates, and keys if asked for.

    Raises:
        ConfigError: ``out`` exists; or, of a standby, the registry is where no other machine reaches it.
        DataError: A log, a blob or the database cannot be read.
        TrustError: A log, a version, a record or a blob was altered; or logs and registry contradict each other.
    """
    if out.exists():
        raise ConfigError(f"{out} exists: name a new file", about=out.name)
    secrets = SECRETS if keys else ()
    with closing(WorkFolder(out.parent)) as work:
        if standby:
            _require_shared(registryfiles.RegistrySettings.of(state_dir.folder), state_dir.folder)
            head, digest = _verified(state_dir.registry), None
            files = _small(state_dir.folder, *SETTLED, registryfiles.REGISTRY, registryfiles.REVOKED, *secrets)
        else:
            snapshot = RegistrySnapshot.read(state_dir.registry.engine)
            with _stored(snapshot, work.path, state_dir.registry) as registry:
                head, digest = _verified(registry), snapshot.digest()
                files = [*_files(state_dir, registry, head, work.path)]
            # The list in the directory is the newer of the two.
            files += _small(
                state_dir.folder,
                *(f"{registryfiles.TRANSCRIPT}/{name}" for name in _SESSION),
                *SETTLED,
                registryfiles.REVOKED,
                *secrets,
            )
        unique = sorted({each.name: each for each in files}.values(), key=lambda each: each.name)
        version, number = None if head is EMPTY else head.newest[0], head.round.round if head.round else 0
        manifest_of = partial(BackupManifest, registry=digest, version=version, round=number)
        part = work.path / out.name
        with storage.naming(out):
            manifest = write_archive(part, unique, manifest_of, state_dir.key, report)
        part.rename(out)
        storage.sync(out.parent)
    return Backup(manifest, len(unique), sum(each.size for each in unique), state_dir.key.public.key_id)


def _files(state_dir: CoordinatorStateDir, registry: Registry, head: Head, work: Path) -> Iterator[ArchiveFile]:
    """Yield what rounds write: logs, the ``registry`` that was copied to ``work``, and the SuperLink's database."""
    folder = source = state_dir.folder
    if state_dir.transcripts.table is not None:  # the copy of a machine that does not lead may be older
        source = work
        state_dir.transcripts.table.copy_to(source / registryfiles.TRANSCRIPT)
    yield from _logs(source / registryfiles.TRANSCRIPT, head, state_dir.key)
    yield _file(work, registryfiles.DATABASE)
    for manifest in (version.manifest for version in registry.versions()):
        read = partial(registry.blobs.get, manifest.sha256)
        yield ArchiveFile(f"{registryfiles.BLOBS}/{registryfiles.blob_name(manifest.sha256)}", manifest.size, read)
    for path in (folder / registryfiles.TRANSCRIPT / transcripts.VECTORS).glob("*.bin"):
        yield _file(folder, str(path.relative_to(folder)))
    if (folder / SUPERLINK).is_file():
        _copy_sqlite(folder / SUPERLINK, work / SUPERLINK)
        yield _file(work, SUPERLINK, storage.PRIVATE)


def _require_shared(stores: registryfiles.RegistrySettings, folder: Path) -> None:
    if not stores.database:
        text = f"the registry of {folder} is SQLite, which machines cannot share: move it to PostgreSQL, with"
        reason = f"{text} 'edgeadapt coordinator backup' and 'restore --database'"
        raise ConfigError(reason, about=registryfiles.REGISTRY)
    scheme, named, _ = stores.blobs.partition("://")
    if not (named and scheme in OBJECT_STORES) and not Path(stores.blobs).is_absolute():
        place = stores.blobs or registryfiles.BLOBS
        text = f"the adapters are in {place}, of this machine alone: move them to a bucket or a folder that both mount"
        raise ConfigError(f"{text}, named in {registryfiles.REGISTRY} with its whole path", about="blobs")


def restore(
    source: Path,
    folder: Path,
    *,
    key: bytes | None = None,
    trusted: PublicKey | None = None,
    stores: registryfiles.RegistrySettings | None = None,
    report: Report = lambda done, total: None,
) -> Backup:
    """Make a state directory from an archive. All of it is verified before the directory exists.

    An archive for a standby names a database, to which this machine's password goes: only the key that devices pin, or
    the signing key, tells whose database that is.

    Args:
        key: The signing key, PEM; None: the archive has it.
        trusted: The coordinator's public key, as devices pin it; None: that of ``key``, or else the archive's own.
        stores: Where the registry is to be kept; None: in the directory. The database must be empty.

    Raises:
        ConfigError: The folder or the database holds something; there is no signing key; or the archive is for a
            standby, and ``stores`` is given, or neither ``key`` nor ``trusted``.
        DataError: It is not a backup, or a truncated one; or the database of a standby is not the one that it was for.
        TrustError: It was altered, or is of another coordinator.
        EdgeAdaptError: A store cannot be reached.
    """
    sizes = list[int]()

    def done(size: int, total: int) -> None:
        sizes.append(size)
        report(size, total)

    with storage.new_folder(folder, mode=storage.PRIVATE_FOLDER) as stage:
        signer = IdentityKey.from_pem(key) if key is not None else None
        manifest = extract(source, stage, trusted or (signer.public if signer else None), MODES, done)
        if key is not None:
            storage.replace(stage / KEY, key)
        public = PublicKey.from_pem((stage / registryfiles.PUBLIC_KEY).read_bytes())
        if not (stage / KEY).is_file():
            raise ConfigError(f"{source} has no signing key: name it with --key", about=KEY)
        with of_file(KEY):
            signing = IdentityKey.from_pem(storage.read(stage / KEY, MAX_PEM))
        if signing.public != public:
            raise TrustError(f"the signing key is not the one of {registryfiles.PUBLIC_KEY}", about=KEY)
        if (stage / registryfiles.REGISTRY).exists() != (manifest.registry is None):
            raise DataError(f"{source} is neither a backup nor for a standby", about=registryfiles.REGISTRY)
        if manifest.registry is not None:
            _restore_registry(source, stage, signing, manifest, stores)
        elif trusted is None and signer is None:
            text = f"{source} names a database: name the coordinator's public key with --coordinator"
            raise ConfigError(f"{text}, so that no other one gets this machine's password", about="--coordinator")
        elif stores is not None:
            text = f"{source} is for a standby, whose registry stays where it is: leave out --database and --blobs"
            raise ConfigError(text, about="--database")
        else:
            _require_registry(stage, signing, manifest)
    return Backup(manifest, len(sizes), sum(sizes), public.key_id)


def _restore_registry(
    source: Path, stage: Path, key: IdentityKey, manifest: BackupManifest, stores: registryfiles.RegistrySettings | None
) -> None:
    """Verify the registry and the logs of an archive, and put the registry where ``stores`` say."""
    (stage / registryfiles.BLOBS).mkdir(exist_ok=True)  # a registry without a version has none
    # The database is not trusted: read it within limits, and nothing but tables, as an auditor does.
    registryfiles.RegistryFiles(registryfiles.LocalFiles(stage), (key.public,)).rounds()
    with closing(open_registry(stage, key)) as registry:
        head = _verified(registry)
        snapshot = RegistrySnapshot.read(registry.engine)
        if snapshot.digest() != manifest.registry:
            raise TrustError(f"{source}: the registry is not the one that was copied", about=registryfiles.DATABASE)
        for version in registry.versions():
            registry.blobs.get(version.manifest.sha256)
        _require_logs(stage / registryfiles.TRANSCRIPT, head, key)
        if stores is not None:
            _move(stage, registry, snapshot, key, stores)


def _require_registry(stage: Path, key: IdentityKey, manifest: BackupManifest) -> None:
    """Check that a standby reaches the registry that its archive is for, and the newest adapter. Creates nothing."""
    stores = registryfiles.RegistrySettings.of(stage)
    _require_shared(stores, stage)
    open_registry_files(stage, (key.public,)).rounds()  # within limits; a database without tables stays without
    engine, blobs = database.engine_of(registry_url(stage)), Blobs.at(stores.blobs)
    with closing(Registry(engine, blobs, (key.public,))) as registry:
        _verified(registry)
        latest = registry.latest()
        if manifest.version is not None and (latest is None or latest.manifest.version < manifest.version):
            place = shown(registry.engine.url)
            text = f"{place} has no version {manifest.version}: it is not the database that the archive is for"
            raise DataError(text, about="database")
        if latest is not None:
            try:
                blobs.get(latest.manifest.sha256)
            except DataError:
                text = f"{blobs.name} does not have the newest adapter"
                reason = f"{text}: is the folder mounted, or the bucket another one?"
                raise DataError(reason, about="blobs") from None


def _move(
    stage: Path,
    registry: Registry,
    snapshot: RegistrySnapshot,
    key: IdentityKey,
    stores: registryfiles.RegistrySettings,
) -> None:
    storage.replace(stage / registryfiles.REGISTRY, REGISTRY_HEADER + stores.to_toml().encode(), storage.PUBLIC)
    with closing(open_registry(stage, key)) as elsewhere:
        if stores.blobs:
            for version in registry.versions():
                elsewhere.blobs.put(registry.blobs.get(version.manifest.sha256))
            shutil.rmtree(stage / registryfiles.BLOBS)
        if stores.database:  # last: the database takes a registry only once
            registry.close()
            (stage / registryfiles.DATABASE).unlink()
            snapshot.insert(elsewhere.engine, stage / registryfiles.TRANSCRIPT)


@contextmanager
def _stored(snapshot: RegistrySnapshot, work: Path, source: Registry) -> Iterator[Registry]:
    """Make a registry in SQLite with the rows of a snapshot, and the blobs of the registry that it is from."""
    engine = database.connect(own_database(work))
    with closing(Registry(engine, source.blobs, source.trusted)) as registry:
        snapshot.insert(engine)
        yield registry


def _verified(registry: Registry) -> Head:
    """Verify all of a registry but its blobs, and return its head; ``EMPTY`` for one without a version."""
    if not registry.versions() and not registry.rounds():
        return EMPTY
    registry.optimizer_state()
    return registry.head()


def _require_logs(folder: Path, head: Head, key: IdentityKey) -> None:
    logs = [log for _, log in _read(transcripts.logs(folder), head, key.public) if log is not None and log.entries]
    require_agreement(logs, head, key)


def _logs(folder: Path, head: Head, key: IdentityKey) -> Iterator[ArchiveFile]:
    kept = list[StoredLog]()
    ended = False
    for path, log in _read(transcripts.logs(folder), head, key.public):
        if log is None:  # its session is before the last recorded round, so nothing is written to it any more
            yield _file(folder.parent, f"{registryfiles.TRANSCRIPT}/{path.name}")
        elif not ended:
            cut = _cut(log, head)
            ended = cut.end < log.end
            if cut.entries:
                kept.append(cut)
                name = f"{registryfiles.TRANSCRIPT}/{path.name}"
                yield ArchiveFile(name, cut.end, partial(_beginning, path, cut.end))
    require_agreement(kept, head, key)


def _read(paths: Sequence[Path], head: Head, coordinator: PublicKey) -> list[tuple[Path, StoredLog | None]]:
    """Read the logs, in order; None for those before the session of the last recorded round."""
    logs = list[tuple[Path, StoredLog | None]]()
    reached = False
    for path in reversed(paths):
        log = None if reached else StoredLog.read(path, coordinator)
        reached = reached or (log is not None and head.round is not None and log.offer.hex() == head.round.offer)
        logs.insert(0, (path, log))
    return logs


def _cut(log: StoredLog, head: Head) -> StoredLog:
    """Cut a log before the first ending of a round that is not recorded. One that was interrupted never is."""
    after = head.round.entries if head.round is not None and log.offer.hex() == head.round.offer else -1
    unknown = (entry.index for entry in log.endings if entry.index > after and not _interrupted(entry))
    entries = log.entries[: next(unknown, len(log.entries))]
    signed = sum(entry.kind == Checkpoint.TAG for entry in entries)
    return replace(log, entries=entries, checkpoints=log.checkpoints[:signed], end=len(write(entries)), rest=b"")


def _interrupted(ending: Entry) -> bool:
    return ending.kind != Result.TAG and Abort.decode(envelope.unverified_body(ending.message)).reason == INTERRUPTED


def _small(folder: Path, *names: str) -> list[ArchiveFile]:
    """Read those small files that are there, once: they may be replaced meanwhile."""
    contents = {name: storage.read(folder / name, MAX_FILE) for name in names if (folder / name).is_file()}
    modes = {name: storage.PRIVATE if name in SECRETS else storage.PUBLIC for name in contents}
    return [ArchiveFile(name, len(raw), partial(bytes, raw), modes[name]) for name, raw in contents.items()]


def _file(folder: Path, name: str, mode: int = storage.PUBLIC) -> ArchiveFile:
    path = folder / name
    return ArchiveFile(name, path.stat().st_size, partial(storage.read, path), mode)


def _beginning(path: Path, size: int) -> bytes:
    with storage.opened(path) as (file, _):
        return file.read(size)


def _copy_sqlite(source: Path, target: Path) -> None:
    """Copy a database that another program may write to (SQLite's backup interface)."""
    try:
        with (
            closing(sqlite3.connect(f"{source.absolute().as_uri()}?mode=ro", uri=True)) as old,
            closing(sqlite3.connect(target)) as new,
        ):
            old.backup(new)
    except sqlite3.Error as error:
        raise DataError(f"{source} cannot be copied ({error})", about=source.name) from None
