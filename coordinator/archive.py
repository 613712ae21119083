"""A backup of a coordinator as a tar archive (POSIX ustar) whose manifest the coordinator signs.

    coordinator.pem   the public key, which devices pin
    backup.json       a signed document: what the registry holds, and the digest of SHA256SUMS
    SHA256SUMS        a line for each file that follows, in order, as ``sha256sum`` writes it
    …                 the files

Equal files give equal bytes: no archive has a time or a user. The reader accepts no header but the one that the writer
makes for that name and size, so it meets no link, no device, no name outside of the archive and no extension.
"""

import hashlib
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, ClassVar

from aggregation.errors import DataError, EdgeAdaptError, TrustError
from aggregation.pki.identity import IdentityKey, PublicKey
from edgeadapt.formats import storage
from edgeadapt.formats.dsse import MAX_ENVELOPE
from edgeadapt.formats.keyfiles import MAX_PEM
from edgeadapt.formats.manifest import Count, Manifest, Sha256

PUBLIC_KEY, MANIFEST, SUMS = "coordinator.pem", "backup.json", "SHA256SUMS"
LARGEST_LIST = 2**28  # bytes of SHA256SUMS: two million files
BLOCK = tarfile.BLOCKSIZE
END = bytes(2 * BLOCK)
_LINE = re.compile(r"([0-9a-f]{64})  ([!-~]{1,99})")

Report = Callable[[int, int], object]  # bytes done since the last call, of how many in all


@dataclass(frozen=True, slots=True)
class BackupManifest(Manifest):
    """What a backup holds. ``version`` and ``round`` are the newest.

    ``registry``: ``RegistrySnapshot.digest``; None for a standby, whose registry stays where ``registry.toml`` says.
    """

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


def write(
    out: Path,
    files: Sequence[ArchiveFile],
    manifest: Callable[[str], BackupManifest],
    key: IdentityKey,
    report: Report,
) -> None:
    """Write an archive, readable by its owner only.

    Args:
        out: Does not exist; a part of it is left where the disk is full.
        manifest: Digest of SHA256SUMS → the manifest.
        report: Called for each file when it was hashed, and when it was written.

    Raises:
        EdgeAdaptError: A file changed meanwhile.
    """
    digests, total = list[str](), 2 * sum(entry.size for entry in files)
    for entry in files:
        digests.append(hashlib.sha256(entry.read()).hexdigest())
        report(entry.size, total)
    sums = "".join(f"{digest}  {entry.name}\n" for digest, entry in zip(digests, files, strict=True)).encode()
    signed = manifest(hashlib.sha256(sums).hexdigest()).sign(key)
    with os.fdopen(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, storage.PRIVATE), "wb") as file:
        for name, content in ((PUBLIC_KEY, key.public.to_pem()), (MANIFEST, signed), (SUMS, sums)):
            _append(file, name, content, storage.PUBLIC)
        for entry, digest in zip(files, digests, strict=True):
            content = entry.read()
            if hashlib.sha256(content).hexdigest() != digest:
                raise EdgeAdaptError(f"{entry.name} changed while it was copied: repeat the backup", about=entry.name)
            _append(file, entry.name, content, entry.mode)
            report(entry.size, total)
        file.write(END)
        storage.flush(file)


def extract(
    archive: Path, folder: Path, trusted: PublicKey | None, modes: Mapping[str, int], report: Report
) -> BackupManifest:
    """Write the files of an archive to an empty folder, each after its digest was found to be the one that was signed.

    Args:
        trusted: The coordinator's key; None: the one in the archive, which then proves only that nothing is damaged.
        modes: Regular expression of a name → permissions. A file with another name is refused.

    Raises:
        DataError: It is not an archive of a coordinator, or it is truncated.
        TrustError: It is of another coordinator, or was altered.
    """
    with storage.opened(archive, 2**63) as (file, total):
        reader = _ArchiveReader(archive, file)
        public = PublicKey.from_pem(reader.next(PUBLIC_KEY, MAX_PEM))
        if trusted not in (None, public):
            text = f"{archive} is of the coordinator {public.key_id}, and not of the one that was named"
            raise TrustError(text, about=PUBLIC_KEY, value=public.key_id)
        storage.create(folder / PUBLIC_KEY, public.to_pem(), storage.PUBLIC)
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
            if name == PUBLIC_KEY:
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
