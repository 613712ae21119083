"""Where an adapter to be exported comes from: a version in a coordinator's registry, or a PEFT folder.

The registry belongs to the coordinator, a sibling; it is read here through its files alone, and never written:
a table of signed manifests in SQLite, and blobs under their digests.
"""

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from adapters import files
from adapters.layout import Layout, Tensors
from adapters.manifest import VersionManifest
from adapters.peftconfig import PeftConfig
from aggregation.errors import ConfigError, DataError, TrustError
from aggregation.pki.identity import PublicKey
from export.bundle.keys import public_keys
from export.onnx.slots import LORA
from export.peft.folder import read_peft

DATABASE, BLOBS, KEY = "registry.db", "blobs", "signing.pem"  # in a coordinator's home
FORMAT = 1  # of the database; a higher one would be misread


@dataclass(frozen=True, slots=True)
class Origin:
    """An adapter before its export, verified as far as its source allows."""

    method: PeftConfig
    labels: tuple[str, ...]  # the head's rows, in order
    version: int
    sha256: str  # of the safetensors file that the tensors come from
    base_digest: str | None  # None: the source does not say
    base: str | None  # a name or folder that the source gives the base; a hint
    tensors: Tensors = field(repr=False)  # under peft's names


def from_registry(state_dir: Path, version: int | None, trust: Path | None) -> Origin:
    """A version of the registry in a coordinator's home, the newest unless ``version`` says which.

    Args:
        home: The folder.
        version: Its number.
        trust: The public keys that may have signed it; by default the home's own key.

    Raises:
        ConfigError: There is no registry, or no key.
        DataError: There is no such version, or its file is missing or damaged.
        TrustError: Manifest or file are not what a trusted key signed.
    """
    if not (state_dir / DATABASE).is_file():
        raise ConfigError(f"{state_dir} is not a coordinator's home: it has no {DATABASE}")
    manifest = _manifest(state_dir / DATABASE, version, public_keys(trust or state_dir / KEY))
    place = state_dir / BLOBS / f"{manifest.sha256}.safetensors"
    if not place.is_file():
        raise DataError(f"blob {manifest.sha256} is missing from {state_dir / BLOBS}: restore it from a copy")
    if place.stat().st_size != manifest.size or files.sha256(blob := place.read_bytes()) != manifest.sha256:
        raise TrustError(f"{place} was altered: restore it from a copy")
    tensors = files.decode(blob)
    if Layout.of(tensors).digest != manifest.layout_digest:
        raise TrustError(f"{place} does not have the layout of its manifest")
    return Origin(
        manifest.method, manifest.labels, manifest.version, manifest.sha256, manifest.base_digest, None, tensors
    )


def from_peft(folder: Path, version: int, labels: tuple[str, ...]) -> Origin:
    """The adapter in a PEFT folder.

    Args:
        folder: From ``save_pretrained``.
        version: The number that devices shall know it by.
        labels: The rows of its head, in order; a PEFT folder does not say.

    Raises:
        ConfigError, DataError: As ``read_peft``.
    """
    read = read_peft(folder)
    if labels and all(LORA in name for name in read.tensors):
        raise ConfigError(f"the adapter in {folder} has no head, so that its labels have no meaning; leave them out")
    return Origin(read.method, labels, version, read.sha256, None, read.base, read.tensors)


def _manifest(database: Path, version: int | None, trusted: Sequence[PublicKey]) -> VersionManifest:
    where, values = ("WHERE version = ?", (version,)) if version is not None else ("ORDER BY version DESC LIMIT 1", ())
    try:
        with closing(sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro", uri=True)) as connection:
            found = connection.execute("SELECT format FROM edgeadapt_format").fetchone()
            query = f"SELECT version, manifest FROM edgeadapt_versions {where}"  # noqa: S608  # one of the two above
            row = connection.execute(query, values).fetchone()
    except (sqlite3.Error, OverflowError) as error:
        raise DataError(f"{database} is no sound registry ({error}): restore it from a copy") from error
    if found is None or found[0] != FORMAT:
        raise ConfigError(f"{database} is of another format than {FORMAT}: use the edgeadapt that made it")
    if row is None:
        raise DataError(f"the registry has no version{'' if version is None else f' {version}'}")
    manifest = VersionManifest.accept(row[1], trusted)
    if manifest.version != row[0]:
        raise TrustError(f"version {row[0]} of the registry holds the manifest of another version")
    return manifest
