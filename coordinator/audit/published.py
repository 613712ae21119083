"""What a coordinator published, as an auditor reads it: with nothing but numpy and the standard library.

    HOME/registry.db       the signed manifest of each version
    HOME/blobs/            each version's safetensors file, under its digest
    HOME/federation.json   the server's rule: the operator's own word, believed by nobody else

Manifests are believed after their signature, files after their digest. ``coordinator.registry`` reads and writes the
same with the packages that a coordinator has and an auditor may lack.
"""

import hashlib
import json
import math
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from adapters import signed, storage
from adapters.layout import Floats, Tensors
from aggregation.errors import ConfigError, DataError, TrustError
from aggregation.pki.identity import PublicKey
from coordinator.optimizer import FedAdam, FedAvg

PARTS = DATABASE, BLOBS, SETTINGS = "registry.db", "blobs", "federation.json"
MANIFEST = "edgeadapt/manifest/1"  # ``adapters.manifest.VersionManifest``
_MANIFEST = "select manifest from edgeadapt_versions where version = ?"  # ``coordinator.registry.database.versions``
_NEWEST = "select max(version) from edgeadapt_versions"
_LENGTH = 8  # bytes before a safetensors header: its length, little-endian


@dataclass(frozen=True, slots=True)
class Published:
    """A coordinator's home. ``coordinator``: whose signature manifests must bear; ``rule``: the server's."""

    folder: Path
    coordinator: PublicKey
    rule: FedAvg | FedAdam

    @classmethod
    def open(cls, folder: Path, coordinator: PublicKey) -> Self:
        """Find it.

        Raises:
            DataError: The folder is no coordinator's home.
            ConfigError: Its settings name no rule of the server's.
        """
        if missing := [name for name in PARTS if not (folder / name).exists()]:
            raise DataError(f"{folder} is no coordinator's home: it has no {missing[0]}")
        try:
            return cls(folder, coordinator, rule_of(storage.read(folder / SETTINGS)))
        except ConfigError as error:
            raise ConfigError(f"{folder / SETTINGS}: {error}") from None

    @staticmethod
    def lies_in(folder: Path) -> bool:
        """Whether a folder is a home, if only by its registry."""
        return (folder / DATABASE).exists()

    def manifest(self, version: int) -> dict[str, Any] | None:
        """What was signed about a version; nothing where the registry has no such version.

        Raises:
            DataError: The registry cannot be read.
            TrustError: Its manifest is not the coordinator's.
        """
        row = self._row(_MANIFEST, version)
        if row is None:
            return None
        try:
            manifest = signed.accept(row[0], MANIFEST, [self.coordinator])
        except (TypeError, TrustError) as error:
            raise TrustError(f"{self.folder / DATABASE}, manifest of adapter {version}: {error}") from None
        if (found := manifest.get("version")) != version:
            raise TrustError(
                f"{self.folder / DATABASE} has the manifest of adapter {found} where that of {version} belongs"
            )
        return manifest

    @property
    def newest(self) -> int:
        """The last version that was published.

        Raises:
            DataError: The registry cannot be read, or holds no version.
        """
        row = self._row(_NEWEST)
        if row is None or not isinstance(row[0], int):
            raise DataError(f"{self.folder / DATABASE} holds no adapter")
        return row[0]

    def _row(self, query: str, *values: int) -> tuple[Any, ...] | None:
        url = f"{(self.folder / DATABASE).absolute().as_uri()}?mode=ro"
        try:
            with closing(sqlite3.connect(url, uri=True)) as database:
                row: tuple[Any, ...] | None = database.execute(query, values).fetchone()
        except (sqlite3.Error, OverflowError, UnicodeDecodeError) as error:
            raise DataError(f"{self.folder / DATABASE} cannot be read ({error})") from None
        return row

    def adapter(self, version: int, digest: str) -> Tensors:
        """A version's tensors.

        Raises:
            DataError: Its file is missing or holds no adapter.
            TrustError: Its file was altered.
        """
        try:
            blob = storage.read(self.folder / BLOBS / f"{digest}.safetensors")
        except FileNotFoundError:
            raise DataError(f"the file of adapter {version} ({digest[:12]}) is missing") from None
        if hashlib.sha256(blob).hexdigest() != digest:
            raise TrustError(f"the file of adapter {version} ({digest[:12]}) was altered")
        return tensors_of(blob)


def rule_of(settings: bytes) -> FedAvg | FedAdam:
    """The server's rule in a ``federation.json``; what it leaves out is as in ``coordinator.settings.Server``.

    Raises:
        ConfigError: The file cannot be read, or names no such rule.
    """
    try:
        given = {"optimizer": "fedavg", "learning_rate": 1.0, **json.loads(settings).get("server", {})}
        kind = {"fedavg": FedAvg, "fedadam": FedAdam}[given.pop("optimizer")]
        return kind(given["learning_rate"]) if kind is FedAvg else kind(**given)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        raise ConfigError("it names no rule of the server's") from None


def tensors_of(blob: bytes) -> Tensors:
    """The float32 tensors of a safetensors file: a length, a JSON header with shapes and places, the numbers.

    Raises:
        DataError: It is no such file.
    """
    end = _LENGTH + int.from_bytes(blob[:_LENGTH], "little")
    try:
        header = json.loads(blob[_LENGTH:end])
        header.pop("__metadata__", None)
        return {name: _tensor(memoryview(blob)[end:], **entry) for name, entry in header.items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise DataError("a published file is no adapter") from None


def _tensor(data: memoryview, dtype: str, shape: list[int], data_offsets: list[int]) -> Floats:
    begin, end = data_offsets
    if dtype != "F32" or not 0 <= begin <= end <= len(data) or end - begin != 4 * math.prod(shape):
        raise ValueError(dtype)
    return np.frombuffer(data[begin:end], "<f4").astype(np.float32).reshape(shape)
