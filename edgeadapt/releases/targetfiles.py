"""The files among the targets of a repository of channels: each is stored once, under the digest of its content."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from tuf.api.metadata import TargetFile

from aggregation.errors import DataError
from edgeadapt.formats import storage
from edgeadapt.formats.release import target


@dataclass(frozen=True, slots=True)
class TargetFiles:
    """Keeps files in ``folder``, with consistent snapshots: ``CHANNEL/DIGEST.NAME``."""

    folder: Path
    limit: int  # bytes of a file

    def path(self, channel: str, name: str, digest: str) -> Path:
        folder, _, last = target(channel, name).rpartition("/")
        return self.folder / folder / f"{digest}.{last}"

    def stored(self, channel: str, name: str, digest: str) -> TargetFile:
        """Describe a file that is there. Raises DataError if it is not."""
        place = self.path(channel, name, digest)
        if not place.is_file():
            raise DataError(f"{place} is missing: restore the repository", about=place.name)
        return TargetFile(place.stat().st_size, {"sha256": digest}, target(channel, name))

    def store(self, channel: str, name: str, path: Path) -> TargetFile:
        """Copy a file, up to the size of a bundle's file, among the targets, under the digest of what was copied."""
        work = self.folder / ".incoming"
        shutil.copyfile(path, work)  # a link would change with a file that is written again
        digest, size = storage.file_sha256(work), work.stat().st_size
        if size > self.limit:
            raise DataError(f"{path} has {size} bytes, more than a bundle's file can have", about=path.name)
        place = self.path(channel, name, digest)
        place.parent.mkdir(parents=True, exist_ok=True)
        work.chmod(storage.PUBLIC)
        with work.open("r+b") as file:
            storage.flush(file)
        work.replace(place)
        storage.sync(place.parent)
        return TargetFile(size, {"sha256": digest}, target(channel, name))

    def write(self, channel: str, name: str, content: bytes) -> TargetFile:
        described = TargetFile.from_data(target(channel, name), content, ["sha256"])
        place = self.path(channel, name, described.hashes["sha256"])
        place.parent.mkdir(parents=True, exist_ok=True)
        storage.replace(place, content, storage.PUBLIC)
        return described
