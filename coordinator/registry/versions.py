"""The registry: every version of the global adapter, signed and content-addressed, and the record of every round.

A round is committed as a unit (docs/decisions/0062): first the blob under its content address, then one database
transaction with the version, the round's record and the optimizer's state. A kill at any instant loses at most the
round under way. Everything that is read is verified: the signature of a manifest or record, the chain of the records,
the digest of a blob or of the optimizer's state. Deleted last rows are found by comparing with the logs
(``coordinator.transcripts``)."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Self

from sqlalchemy import Connection, Engine, Row, func, select
from sqlalchemy.engine import URL

from aggregation.errors import ConfigError, DataError, EdgeAdaptError, TrustError, of_file
from aggregation.pki.identity import IdentityKey, PublicKey
from coordinator.registry import database
from coordinator.registry.lease import fenced
from edgeadapt.formats import files
from edgeadapt.formats.blobs import Blobs
from edgeadapt.formats.layout import Layout, Tensors
from edgeadapt.formats.manifest import RoundRecord, VersionManifest, accept_chain, digest_of
from edgeadapt.formats.registrystores import shown


@dataclass(frozen=True, slots=True)
class Version:
    manifest: VersionManifest
    raw: bytes


@dataclass(frozen=True, slots=True)
class Head:
    newest: tuple[int, str]  # version and digest of the newest adapter
    round: RoundRecord | None  # the record of the last round; None before the first
    digest: str | None  # SHA-256 of that record as signed: the next one names it
    earlier: tuple[tuple[int, str], ...] = ()  # versions before one that no round made, back to one of a round


@dataclass(frozen=True, slots=True)
class StoredAdapter:
    """A version with its file, read and verified once. ``tensors`` are those in ``blob``."""

    manifest: VersionManifest
    blob: bytes = field(repr=False)
    tensors: Tensors = field(repr=False)

    @property
    def layout(self) -> Layout:
        return Layout.of(self.tensors)


@dataclass(frozen=True, slots=True)
class Registry:
    """Versions and records in a database; make it with ``Registry.open``. One coordinator writes; any number read."""

    engine: Engine
    blobs: Blobs  # the adapters' files
    trusted: tuple[PublicKey, ...]  # keys whose manifests are accepted
    epoch: int | None = None  # epoch of the writer's lease; None: nobody has ever led (``coordinator.registry.lease``)

    @classmethod
    def open(cls, database_url: str | URL, blob_url: str, trusted: Sequence[PublicKey]) -> Self:
        """Open a registry, and create an empty one if it is missing. ``database_url``: SQLAlchemy's, for example
        ``sqlite:///registry.db``, or as ``postgresql_url`` returns it. ``blob_url``: a folder, or any address that
        fsspec supports."""
        return cls(database.connect(database_url), Blobs.open(blob_url), tuple(trusted))

    def close(self) -> None:
        self.engine.dispose()

    @property
    def is_empty(self) -> bool:
        """Whether it has neither a version nor a round of any signer. Raises as ``database.connect``."""
        tables = database.versions, database.rounds
        with database.explained(self.engine), self.engine.connect() as connection:
            return not any(connection.scalar(select(func.count()).select_from(table)) for table in tables)

    def publish(self, manifest: VersionManifest, blob: bytes, key: IdentityKey) -> Version:
        """Sign and store a version that no round produced: version 0, or the first on another base. Raises DataError:
        the blob is not what the manifest says, or the version is another one or is stored already; ConfigError: the
        registry does not trust ``key``; EdgeAdaptError: the store failed, and nothing was changed."""
        if manifest.version != 0 and not self._begins(manifest):
            raise DataError(
                f"version {manifest.version} cannot be published: every version after the first on a base is made by a "
                "round",
                about="manifest.version",
            )
        version = self._prepare(manifest, blob, key)
        with fenced(self.engine, self.epoch) as connection:
            self._insert(connection, version)
        return version

    def _begins(self, manifest: VersionManifest) -> bool:
        newest = self.latest()
        return newest is not None and manifest.begins_after(newest.manifest) and manifest.round == len(self.rounds())

    def record_round(self, record: RoundRecord, key: IdentityKey) -> None:
        """Keep the record of a round that produced no version. Raises DataError: the record names a version, or does
        not follow the last one. Raises EdgeAdaptError: the database failed; nothing was changed."""
        if record.version is not None:
            reason = f"round {record.round} names version {record.version}: commit it with its manifest"
            raise DataError(reason, about="record.version")
        with fenced(self.engine, self.epoch) as connection:
            self._append(connection, record, key)

    def commit_round(
        self, record: RoundRecord, manifest: VersionManifest, blob: bytes, optimizer_state: Tensors, key: IdentityKey
    ) -> Version:
        """Keep a round's record, the version that it produced and the optimizer's state, all of them or none.

        ``blob``: the new version's safetensors bytes; ``optimizer_state``: ``optimizer.State``. Raises
        DataError: record, manifest and blob contradict each other or what is stored. Raises ConfigError: the registry
        does not trust ``key``. Raises EdgeAdaptError: the store failed; nothing was changed."""
        record.require_agreement(manifest)
        state, digest = _encoded(optimizer_state), state_digest(optimizer_state)
        if record.optimizer != digest:
            reason = f"the record of round {record.round} names another optimizer state"
            raise DataError(reason, about="record.optimizer")
        version = self._prepare(manifest, blob, key)
        with fenced(self.engine, self.epoch) as connection:
            self._insert(connection, version)
            self._append(connection, record, key)
            connection.execute(database.optimizer.delete())
            connection.execute(database.optimizer.insert().values(id=database.ONLY_ROW, tensors=state))
        return version

    def reserved(self, blob: bytes, optimizer_state: Tensors) -> AbstractContextManager[None]:
        """Hold the space that ``commit_round`` takes for such a blob and such a state, until the block ends. The state
        counts twice: the database keeps the old one until the new one is committed. Raises EdgeAdaptError: the blob
        store is full or cannot be written to."""
        return self.blobs.reserved(blob + 2 * _encoded(optimizer_state))

    def latest(self) -> Version | None:
        """Read the newest version; None in an empty registry. Raises as ``version``."""
        with database.explained(self.engine), self.engine.connect() as connection:
            number = connection.scalar(select(func.max(database.versions.c.version)))
        return None if number is None else self.version(number)

    def version(self, number: int) -> Version:
        """Read one version. Raises DataError: there is no such version. Raises TrustError: its manifest is not what a
        trusted key signed for this number."""
        query = select(database.versions).where(database.versions.c.version == number)
        with database.explained(self.engine), self.engine.connect() as connection:
            row = connection.execute(query).one_or_none()
        if row is None:
            raise DataError(f"the registry has no version {number}", about="version")
        return self._verified(row)

    def versions(self) -> tuple[Version, ...]:
        """Read all versions, oldest first. Raises as ``version``."""
        query = select(database.versions).order_by(database.versions.c.version)
        with database.explained(self.engine), self.engine.connect() as connection:
            rows = connection.execute(query).all()
        return tuple(self._verified(row) for row in rows)

    def newest_adapter(self) -> StoredAdapter:
        """Read the newest version with its file: what the next round starts from. Raises EdgeAdaptError: the registry
        is empty, or as ``blob``."""
        manifest = self._newest().manifest
        blob = self.blobs.get(manifest.sha256)
        return StoredAdapter(manifest, blob, files.decode(blob))

    def blob(self, number: int) -> bytes:
        """Read a version's file, byte for byte as published. Raises DataError: the version or its blob is missing.
        Raises TrustError: the manifest or the blob was altered."""
        return self.blobs.get(self.version(number).manifest.sha256)

    def tensors(self, number: int) -> Tensors:
        """Read a version's tensors. Raises as ``blob``."""
        return files.decode(self.blob(number))

    def rounds(self, first: int = 1) -> tuple[RoundRecord, ...]:
        """Read the records of all rounds from ``first`` on, in order. Raises TrustError: a record is missing or was
        altered."""
        return self._records(first)[0]

    def head(self) -> Head:
        """Read the newest version and the last round, which agree with each other. Raises EdgeAdaptError: the registry
        is empty. Raises TrustError: a manifest or a record was altered, or one of the two is missing."""
        newest = self._newest().manifest
        records, digest = self._records(max(newest.round, 1))
        begins = newest.plan is None
        since = [record for record in records if record.round > newest.round] if begins else records
        produced = [(record.version, record.adapter) for record in since if record.version is not None]
        if produced != ([] if begins else [newest.id]):
            reason = f"the registry has version {newest.version} as its newest, and its rounds contradict that: "
            reason += "restore it from a copy"
            raise TrustError(reason, about="record")
        earlier, before = list[tuple[int, str]](), newest
        while before.plan is None and before.version:
            before = self.version(before.version - 1).manifest
            earlier.append(before.id)
        return Head(newest.id, records[-1] if records else None, digest, tuple(earlier))

    def optimizer_state(self) -> Tensors:
        """Read the optimizer state that the last committed round left; empty if it left none. Raises EdgeAdaptError:
        the registry is empty. Raises TrustError: the stored state is not that of the last round's record."""
        last = self.head().round
        with database.explained(self.engine), self.engine.connect() as connection:
            raw = connection.scalar(select(database.optimizer.c.tensors)) or b""
        if not isinstance(raw, bytes) or (files.sha256(raw) if raw else None) != (last and last.optimizer):
            reason = "the stored optimizer state was altered: restore the registry from a copy"
            raise TrustError(reason, about="optimizer")
        return files.decode(raw) if raw else {}

    @property
    def is_shared(self) -> bool:
        """Whether coordinators on several machines may use its database."""
        return self.engine.dialect.name == "postgresql"

    def _newest(self) -> Version:
        version = self.latest()
        if version is None:
            reason = "the registry is empty: publish a first adapter with 'edgeadapt coordinator publish'"
            raise EdgeAdaptError(reason, about="registry")
        return version

    def _records(self, first: int) -> tuple[tuple[RoundRecord, ...], str | None]:
        """Read and verify the records from round ``first`` on, and the digest of the last signed one of all."""
        table = database.rounds
        query = select(table.c.round, table.c.record).where(table.c.round >= first - 1).order_by(table.c.round)
        with database.explained(self.engine), self.engine.connect() as connection:
            rows = [(row.round, row.record) for row in connection.execute(query)]
        before, following = (rows[0], rows[1:]) if first > 1 and rows else ((0, None), rows)
        return tuple(accept_chain(following, self.trusted, before)), digest_of(rows[-1][1]) if rows else None

    def _append(self, connection: Connection, record: RoundRecord, key: IdentityKey) -> None:
        table = database.rounds
        last = connection.execute(select(table).order_by(table.c.round.desc()).limit(1)).one_or_none()
        number, digest = (last.round, digest_of(last.record)) if last else (0, None)
        state = RoundRecord.accept(last.record, self.trusted).optimizer if last else None
        if record.version is None and record.optimizer != state:
            reason = f"round {record.round} made no version and left another optimizer state"
            raise DataError(reason, about="record.optimizer")
        if (record.round, record.previous) != (number + 1, digest):
            reason = f"the record of round {record.round} does not follow that of round {number}"
            raise DataError(reason, about="record.previous")
        connection.execute(table.insert().values(round=record.round, record=record.sign(key)))

    def _prepare(self, manifest: VersionManifest, blob: bytes, key: IdentityKey) -> Version:
        """Check a new version against its blob, sign it, and store the blob, which nothing refers to yet."""
        number = manifest.version
        if key.public not in self.trusted:
            raise ConfigError(f"the registry does not trust the key {key.public.key_id}", about="key")
        if manifest.sha256 != files.sha256(blob) or manifest.size != len(blob):
            raise DataError(f"version {number}: the manifest describes another file", about="manifest.sha256")
        if Layout.of(files.decode(blob)).digest != manifest.layout_digest:
            reason = f"version {number}: the file does not have the manifest's layout"
            raise DataError(reason, about="manifest.layout_digest")
        raw = manifest.sign(key)
        version = Version(VersionManifest.accept(raw, [key.public]), raw)
        self.blobs.put(blob)
        return version

    def _insert(self, connection: Connection, version: Version) -> None:
        manifest, table = version.manifest, database.versions
        last = connection.execute(select(table).order_by(table.c.version.desc()).limit(1)).one_or_none()
        number, parent = (last.version, last.sha256) if last else (-1, None)
        if manifest.version != number + 1:
            reason = f"version {manifest.version} is not the next one: the last is {number}"
            raise DataError(reason, about="manifest.version")
        if manifest.parent != parent:
            reason = f"version {manifest.version} is not made from version {number}"
            raise DataError(reason, about="manifest.parent")
        row = {"version": manifest.version, "sha256": manifest.sha256, "manifest": version.raw}
        connection.execute(table.insert().values(row))

    def _verified(self, row: Row[Any]) -> Version:
        if not isinstance(row.manifest, bytes):
            raise TrustError(f"version {row.version} of the registry has no signed manifest", about="manifest")
        with of_file(f"version {row.version} of {shown(self.engine.url)}"):
            manifest = VersionManifest.accept(row.manifest, self.trusted)
        if (manifest.version, manifest.sha256) != (row.version, row.sha256):
            reason = f"version {row.version} of the registry holds the manifest of another version"
            raise TrustError(reason, about="manifest")
        return Version(manifest, row.manifest)


def state_digest(optimizer_state: Tensors) -> str | None:
    """Digest by which a record names the optimizer's state after its round (SHA-256, hex); None without tensors. Raises
    DataError: a number is not finite."""
    return files.sha256(_encoded(optimizer_state)) if optimizer_state else None


def _encoded(tensors: Tensors) -> bytes:
    return files.encode(tensors) if tensors else b""
