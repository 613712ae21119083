"""The registry: every version of the global adapter, signed and content-addressed, and the record of every round.

A round is committed as a unit (docs/decisions/0002): first the blob under its content address, then one database
transaction with the version, the round's record and the optimizer's state. A kill at any instant loses at most the
round under way. Everything that is read is verified: the signature of a manifest, the digest of a blob. Whether a
version is newer than the one that a device has is for the device to check.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from sqlalchemy import Connection, Engine, Row, func, select
from sqlalchemy.engine import URL

from adapters import files
from adapters.layout import Layout, Tensors
from adapters.manifest import VersionManifest
from aggregation.errors import ConfigError, DataError, EdgeAdaptError, TrustError
from aggregation.pki.identity import IdentityKey, PublicKey
from coordinator.registry import database
from coordinator.registry.blobs import Blobs
from coordinator.registry.roundrecord import RoundRecord

ONLY_ROW = 1  # of the optimizer's table


@dataclass(frozen=True, slots=True)
class Version:
    """A published adapter's manifest, verified, and its signed form."""

    manifest: VersionManifest
    raw: bytes


@dataclass(frozen=True, slots=True)
class StoredAdapter:
    """A version with its file, read and verified once. ``tensors`` are those in ``blob``."""

    manifest: VersionManifest
    blob: bytes = field(repr=False)
    tensors: Tensors = field(repr=False)

    @property
    def layout(self) -> Layout:
        """Of the tensors."""
        return Layout.of(self.tensors)


@dataclass(frozen=True, slots=True)
class Registry:
    """Open with ``Registry.open``. One coordinator writes; any number may read."""

    engine: Engine
    blobs: Blobs
    trusted: tuple[PublicKey, ...]

    @classmethod
    def open(cls, database_url: str | URL, blob_url: str, trusted: Sequence[PublicKey]) -> Self:
        """Open a registry, and create an empty one if it is missing.

        Args:
            database_url: SQLAlchemy's, for example ``sqlite:///registry.db``.
            blob_url: A folder, or any address that fsspec supports.
            trusted: Keys whose manifests are accepted, and which may publish.

        Raises:
            EdgeAdaptError: As ``database.connect`` and ``Blobs.open``.
        """
        return cls(database.connect(database_url), Blobs.open(blob_url), tuple(trusted))

    def close(self) -> None:
        """Close the database connections."""
        self.engine.dispose()

    def publish(self, manifest: VersionManifest, blob: bytes, key: IdentityKey) -> Version:
        """Sign and store a version that no round produced, such as the seed adapter.

        Raises:
            DataError: The blob is not what the manifest says, or the version is not the next one.
            ConfigError: The registry does not trust ``key``.
            EdgeAdaptError: The store failed; nothing was changed.
        """
        version = self._prepare(manifest, blob, key)
        with database.explained(self.engine), self.engine.begin() as connection:
            self._insert(connection, version)
        return version

    def record_round(self, record: RoundRecord) -> None:
        """Keep the record of a round that produced no version.

        Raises:
            DataError: The round is already recorded, or the record names a version.
            EdgeAdaptError: The database failed; nothing was changed.
        """
        if record.version is not None:
            raise DataError(
                f"round {record.round} names version {record.version}: commit it with its manifest",
                about="record.version",
                value=record.version,
            )
        with database.explained(self.engine), self.engine.begin() as connection:
            connection.execute(database.rounds.insert().values(record.to_row()))

    def commit_round(
        self, record: RoundRecord, manifest: VersionManifest, blob: bytes, optimizer_state: Tensors, key: IdentityKey
    ) -> Version:
        """Keep a round's record, the version that it produced and the optimizer's state, all of them or none.

        Args:
            record: Of the round.
            manifest: Of the new version.
            blob: The new version's safetensors bytes.
            optimizer_state: From ``optimizer.to_tensors``.
            key: Signs the manifest.

        Raises:
            DataError: Record, manifest and blob contradict each other or what is stored.
            ConfigError: The registry does not trust ``key``.
            EdgeAdaptError: The store failed; nothing was changed.
        """
        record.require_agreement(manifest)
        version, state = self._prepare(manifest, blob, key), _state_row(optimizer_state)
        with database.explained(self.engine), self.engine.begin() as connection:
            self._insert(connection, version)
            connection.execute(database.rounds.insert().values(record.to_row()))
            connection.execute(database.optimizer.delete())
            connection.execute(database.optimizer.insert().values(state))
        return version

    def latest(self) -> Version | None:
        """The newest version; None in an empty registry. Raises as ``version``."""
        with database.explained(self.engine), self.engine.connect() as connection:
            number = connection.scalar(select(func.max(database.versions.c.version)))
        return None if number is None else self.version(number)

    def version(self, number: int) -> Version:
        """One version.

        Raises:
            DataError: There is no such version.
            TrustError: Its manifest is not what a trusted key signed for this number.
        """
        query = select(database.versions).where(database.versions.c.version == number)
        with database.explained(self.engine), self.engine.connect() as connection:
            row = connection.execute(query).one_or_none()
        if row is None:
            raise DataError(f"the registry has no version {number}", about="version", value=number)
        return self._verified(row)

    def versions(self) -> tuple[Version, ...]:
        """All versions, oldest first. Raises as ``version``."""
        query = select(database.versions).order_by(database.versions.c.version)
        with database.explained(self.engine), self.engine.connect() as connection:
            rows = connection.execute(query).all()
        return tuple(self._verified(row) for row in rows)

    def newest_adapter(self) -> StoredAdapter:
        """The newest version with its file: what the next round starts from.

        Raises:
            EdgeAdaptError: The registry is empty, or as ``blob``.
        """
        version = self.latest()
        if version is None:
            raise EdgeAdaptError(
                "the registry is empty: publish a first adapter with 'edgeadapt coordinator publish'", about="registry"
            )
        blob = self.blobs.get(version.manifest.sha256)
        return StoredAdapter(version.manifest, blob, files.decode(blob))

    def blob(self, number: int) -> bytes:
        """A version's file, byte for byte as published.

        Raises:
            DataError: The version or its blob is missing.
            TrustError: The manifest or the blob was altered.
        """
        return self.blobs.get(self.version(number).manifest.sha256)

    def tensors(self, number: int, layout: Layout | None = None) -> Tensors:
        """A version's tensors. Raises as ``blob``, and ``DataError`` for tensors that are not of ``layout``."""
        return files.decode(self.blob(number), layout)

    def rounds(self) -> tuple[RoundRecord, ...]:
        """The records of all rounds, in order.

        Raises:
            DataError: A record is damaged.
        """
        query = select(database.rounds).order_by(database.rounds.c.round)
        with database.explained(self.engine), self.engine.connect() as connection:
            try:
                return tuple(RoundRecord.of_row(row) for row in connection.execute(query))
            except (TypeError, ValueError) as error:
                raise DataError(
                    f"a round's record is damaged ({error}): restore the database from a copy", about="record"
                ) from error

    def optimizer_state(self) -> Tensors:
        """The optimizer state that the last committed round left; empty if it left none.

        Raises:
            TrustError: The stored state was altered.
        """
        with database.explained(self.engine), self.engine.connect() as connection:
            row = connection.execute(select(database.optimizer)).one_or_none()
        if row is None or not row.tensors:
            return {}
        if files.sha256(row.tensors) != row.sha256:
            raise TrustError(
                "the stored optimizer state was altered: restore the database from a copy", about="optimizer"
            )
        return files.decode(row.tensors)

    def _prepare(self, manifest: VersionManifest, blob: bytes, key: IdentityKey) -> Version:
        """Check a new version against its blob, sign it, and store the blob, which nothing refers to yet."""
        number = manifest.version
        if key.public not in self.trusted:
            raise ConfigError(f"the registry does not trust the key {key.public.key_id}", about="key")
        if manifest.sha256 != files.sha256(blob) or manifest.size != len(blob):
            raise DataError(f"version {number}: the manifest describes another file", about="manifest.sha256")
        if Layout.of(files.decode(blob)).digest != manifest.layout_digest:
            raise DataError(
                f"version {number}: the file does not have the manifest's layout", about="manifest.layout_digest"
            )
        raw = manifest.sign(key)
        version = Version(VersionManifest.accept(raw, [key.public]), raw)
        self.blobs.put(blob)
        return version

    def _insert(self, connection: Connection, version: Version) -> None:
        manifest, table = version.manifest, database.versions
        last = connection.scalar(select(func.max(table.c.version)))
        if manifest.version != (0 if last is None else last + 1):
            raise DataError(
                f"version {manifest.version} is not the next one: the last is {last}",
                about="manifest.version",
                value=manifest.version,
            )
        known = select(table.c.version).where(table.c.sha256 == manifest.parent).limit(1)
        if (last is None) != (manifest.parent is None) or (last is not None and connection.scalar(known) is None):
            raise DataError(
                f"version {manifest.version}: its parent is not a version of this registry",
                about="manifest.parent",
                value=manifest.parent,
            )
        row = {"version": manifest.version, "sha256": manifest.sha256, "manifest": version.raw}
        connection.execute(table.insert().values(row))

    def _verified(self, row: Row[Any]) -> Version:
        manifest = VersionManifest.accept(row.manifest, self.trusted)
        if (manifest.version, manifest.sha256) != (row.version, row.sha256):
            raise TrustError(
                f"version {row.version} of the registry holds the manifest of another version", about="manifest"
            )
        return Version(manifest, row.manifest)


def _state_row(tensors: Tensors) -> dict[str, Any]:
    raw = files.encode(tensors) if tensors else b""
    return {"id": ONLY_ROW, "sha256": files.sha256(raw), "tensors": raw}
