"""The registry's files: their names, and a reader that returns nothing unsigned.

    STATE/registry.db                  SQLite: for each version its number, its file's digest and its signed manifest;
                                       for each round its number and its signed record
    STATE/blobs/SHA256.safetensors     the adapter of each version, named by its digest
    STATE/registry.toml                where they are, if not there

``coordinator.registry`` writes them with SQLAlchemy and fsspec, under the names defined here. The exporter and the
auditor only read (``edgeadapt.formats.registryreader``), which takes no more than the bare install for files, and for a
database or a bucket ``edgeadapt.formats.registrystores``."""

import hashlib
import json
import math
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from aggregation.errors import ConfigError, DataError, TrustError
from aggregation.pki.identity import PublicKey
from edgeadapt.formats import storage
from edgeadapt.formats.dsse import MAX_ENVELOPE
from edgeadapt.formats.layout import Floats, Layout, Tensors
from edgeadapt.formats.manifest import RoundRecord, VersionManifest, accept_chain
from edgeadapt.formats.settings import Settings

# Files and folders of a coordinator's state directory.
SIGNING_KEY, DATABASE, BLOBS, REGISTRY = "signing.pem", "registry.db", "blobs", "registry.toml"
PUBLIC_KEY, AUTHORITY, REVOKED, TRANSCRIPT = "coordinator.pem", "authority.pem", "revoked.crl", "transcript"
SUMS = "sums"  # in place of a transcript, of a simulation whose rounds have no masks
SCHEMA = "3"  # revision of the tables; ``coordinator.registry.migrations`` brings older ones to it
PREFIX = "edgeadapt_"  # of this program's tables, so that another program's database is recognized
# Tables; the first is alembic's, has one row and the column SCHEMA_COLUMN.
SCHEMAS, VERSIONS, ROUNDS = f"{PREFIX}schema", f"{PREFIX}versions", f"{PREFIX}rounds"
SCHEMA_COLUMN, VERSION, SHA256, MANIFEST = "version_num", "version", "sha256", "manifest"
FIRST, FIRST_TABLE = "1", f"{PREFIX}format"  # the revision that had no table of alembic's, and a table of it alone
ROUND, RECORD = "round", "record"

_SELECT = f"SELECT {VERSION}, {SHA256}, {MANIFEST} FROM {VERSIONS}"  # noqa: S608 - the names above
_BY_VERSION, _NEWEST = f"{_SELECT} WHERE {VERSION} = ?", f"{_SELECT} ORDER BY {VERSION} DESC LIMIT 1"
_ROUNDS = f"SELECT {ROUND}, {RECORD} FROM {ROUNDS} ORDER BY {ROUND}"  # noqa: S608
# What a schema may hold besides tables: views and triggers run statements of their own, also such without an end; and
# virtual tables, which run code. An automatic index has no statement.
NOT_TABLES = "SELECT name FROM sqlite_master WHERE sql NOT LIKE 'CREATE TABLE %'"
_LENGTH = 8  # bytes before a safetensors header: its length, little-endian


class RegistrySettings(Settings):
    """``registry.toml`` in the coordinator's state directory."""

    database: str = ""
    """postgresql://USER@HOST/NAME, without a password; PGPASSWORD, PGPASSFILE or ~/.pgpass has it; empty: registry.db
    here"""
    blobs: str = ""
    """where adapters are kept: s3://BUCKET/PREFIX, without keys, or another URL that fsspec knows; empty: blobs here"""

    @classmethod
    def of(cls, state_dir: Path) -> Self:
        """Read those of a state directory. Without the file, all is there. Raises as ``read``."""
        return cls.read(state_dir / REGISTRY) if (state_dir / REGISTRY).exists() else cls()


def blob_name(digest: str) -> str:
    """Name the file in ``BLOBS`` with the adapter of this SHA-256 (hex)."""
    return f"{digest}.safetensors"


def require(state_dir: Path) -> None:
    """Check that a coordinator's registry is in the folder. Raises ConfigError."""
    elsewhere = RegistrySettings.of(state_dir)
    database = (DATABASE, elsewhere.database or (state_dir / DATABASE).is_file())
    for name, there in (database, (BLOBS, elsewhere.blobs or (state_dir / BLOBS).is_dir())):
        if not there:
            text = f"{state_dir} is not a coordinator's state directory: it has no {name}"
            raise ConfigError(text, about=name)


@dataclass(frozen=True, slots=True)
class LocalFiles:
    """Reads a registry from its state directory. Nothing that it returns is verified. Methods raise ConfigError if the
    database has another schema, and DataError if it cannot be read."""

    folder: Path

    @property
    def name(self) -> str:
        """Name the database in a message."""
        return str(self.folder / DATABASE)

    def place(self, digest: str) -> str:
        """Name the file with that digest in a message."""
        return str(self.folder / BLOBS / blob_name(digest))

    def file(self, digest: str, size: int) -> bytes:
        """Read that file; empty if it does not have that size. Raises DataError if it is missing."""
        path = Path(LocalFiles.place(self, digest))
        try:
            return storage.read(path) if path.stat().st_size == size else b""
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(f"{path} is missing: restore it from a copy", about="blob") from None

    def rows(self, query: str, values: tuple[int, ...]) -> list[tuple[Any, ...]]:
        path = self.folder / DATABASE
        try:
            with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
                database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 2 * MAX_ENVELOPE)
                # A row has more bytes than it takes steps to read, so a query that takes more steps than the file has
                # bytes reads what is not there: pages that refer to each other in many ways.
                database.set_progress_handler(lambda: True, path.stat().st_size)
                if other := database.execute(NOT_TABLES).fetchone():
                    raise sqlite3.DatabaseError(f"{other[0]!r} is not a table")
                old = database.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (FIRST_TABLE,)).fetchone()
                if old is not None:
                    require_schema(FIRST, str(path))
                revision = database.execute(f"SELECT {SCHEMA_COLUMN} FROM {SCHEMAS}").fetchone()  # noqa: S608
                require_schema(revision and revision[0], str(path))
                rows: list[tuple[Any, ...]] = database.execute(query, values).fetchall()
        except (sqlite3.Error, OverflowError, UnicodeDecodeError) as error:
            if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_READONLY_ROLLBACK:
                text = f"a process was killed while it wrote to {path}: undo what it began"
                command = f"edgeadapt coordinator status {self.folder}"
                reason = f"{text} with '{command}', or start the coordinator"
                raise DataError(reason, about=f"{DATABASE}-journal") from None
            reason = f"{path} is not a registry or is damaged ({error}): restore it from a copy"
            raise DataError(reason, about=DATABASE) from None
        return rows


def require_schema(revision: object, name: str) -> None:
    """Check that a database has the schema of this edgeadapt. Raises ConfigError if it has another ``revision``."""
    if revision == SCHEMA:
        return
    older = isinstance(revision, str) and revision.isdecimal() and int(revision) < int(SCHEMA)
    remedy = "bring it to that with 'edgeadapt coordinator upgrade'" if older else "update edgeadapt"
    text = f"{name} has revision {revision} of the registry's tables, and this edgeadapt has {SCHEMA}: {remedy}"
    raise ConfigError(text, about="database.schema")


@dataclass(frozen=True, slots=True)
class RegistryFiles:
    """Reads a registry. One coordinator may write to it at the same time. Methods raise ConfigError if the database has
    another schema, DataError if it cannot be read, and TrustError if what they read is missing, was altered, or is
    signed by no trusted key."""

    source: LocalFiles
    trusted: tuple[PublicKey, ...]

    def manifest(self, version: int | None = None) -> VersionManifest | None:
        """Read the manifest of a version, by default of the newest; None if the registry does not have it."""
        rows = self.source.rows(_NEWEST, ()) if version is None else self.source.rows(_BY_VERSION, (version,))
        if not rows:
            return None
        number, digest, raw = rows[0]
        try:
            if not isinstance(raw, bytes) or len(rows) > 1:
                raise TrustError("it is not one signed document", about="manifest")
            manifest = VersionManifest.accept(raw, self.trusted)
            if (manifest.version, manifest.sha256) != (number, digest):
                reason = f"it is the manifest of version {manifest.version} ({manifest.sha256[:12]})"
                raise TrustError(reason, about="manifest")
        except TrustError as error:
            place = f"{self.source.name}, manifest of version {number}"
            raise TrustError(f"{place}: {error}; restore it from a copy", about="manifest") from None
        return manifest

    def recorded(self, version: int | None = None) -> VersionManifest | None:
        """Read the ``manifest`` of a version; raise TrustError if no round's record says that it was made. Version 0
        and the first on another base are from no round."""
        manifest = self.manifest(version)
        made = {record.version: record for record in self.rounds()}
        before = self.manifest(manifest.version - 1) if manifest is not None and manifest.version else None
        if manifest is not None and manifest.version and not (before and manifest.begins_after(before)):
            record = made.get(manifest.version)
            if record is None or not record.made(manifest):
                text = f"{self.source.name}: no round is recorded that made version {manifest.version} as it is there"
                remedy = "check the coordinator with 'edgeadapt audit verify', or restore the registry from a copy"
                raise TrustError(f"{text}; {remedy}", about="record")
        return manifest

    def rounds(self) -> tuple[RoundRecord, ...]:
        return tuple(accept_chain(self.source.rows(_ROUNDS, ()), self.trusted))

    def blob(self, manifest: VersionManifest) -> bytes:
        """Read the file of a version, byte for byte as published. Raises DataError if it is missing."""
        digest = manifest.sha256
        blob = self.source.file(digest, manifest.size)
        if hashlib.sha256(blob).hexdigest() != digest:
            raise TrustError(f"{self.source.place(digest)} was altered: restore it from a copy", about="blob")
        return blob

    def tensors(self, manifest: VersionManifest) -> Tensors:
        """Read the tensors of a version, finite and of its manifest's layout. Raises DataError if it has no adapter."""
        blob, path = self.blob(manifest), self.source.place(manifest.sha256)
        try:
            tensors = float32_tensors(blob)
            layout = Layout.of(tensors)
            layout.check(tensors)
        except DataError as error:
            raise DataError(f"{path}: {error}", about="blob") from None
        if layout.digest != manifest.layout_digest:
            raise TrustError(f"{path} does not have the layout of its manifest", about="layout_digest")
        return tensors


def float32_tensors(blob: bytes) -> Tensors:
    """Read the tensors of a safetensors file: a length, a JSON header with shapes and offsets, the numbers.
    ``edgeadapt.formats.files.decode`` reads the same with the library, which is not in the bare install. Raises
    DataError if it is not such a file, or has a tensor of another type."""
    end = _LENGTH + int.from_bytes(blob[:_LENGTH], "little")
    try:
        header = json.loads(blob[_LENGTH:end])
        header.pop("__metadata__", None)
        return {name: _tensor(memoryview(blob)[end:], **entry) for name, entry in header.items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise DataError("not an adapter in safetensors form", about="blob") from None


def _tensor(data: memoryview, dtype: str, shape: list[int], data_offsets: list[int]) -> Floats:
    begin, end = data_offsets
    if dtype != "F32" or not 0 <= begin <= end <= len(data) or end - begin != 4 * math.prod(shape):
        raise ValueError(dtype)
    return np.frombuffer(data[begin:end], "<f4").astype(np.float32).reshape(shape)
