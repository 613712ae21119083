"""The highest version of each adapter that a device has accepted, by base. It protects from rollback.

The file is next to the pinned keys, and as safe as their folder: whoever can write there can pin another key.
"""

from dataclasses import dataclass
from pathlib import Path

from adapters import jsontext
from adapters.bundle import read_file
from adapters.dsse import MAX_ENVELOPE
from adapters.manifest import AdapterManifest
from adapters.storage import locked, replace
from aggregation.errors import ConfigError, TrustError

Versions = dict[str, dict[str, int]]  # base digest → adapter → version


@dataclass(frozen=True, slots=True)
class SeenVersions:
    """The file, which need not exist yet."""

    path: Path

    def accept(self, manifest: AdapterManifest) -> None:
        """Note the version of a verified manifest, if it is the highest so far.

        Raises:
            TrustError: It is lower than the highest, or the file is damaged.
            ConfigError: The file cannot be written.
        """
        if manifest.version < (highest := _highest(self._read(), manifest)):
            raise TrustError(
                f"adapter {manifest.name!r} is version {manifest.version}, but version {highest} was accepted here "
                "before: copy the current bundle",
                about="adapter-manifest.version",
                value=manifest.version,
            )
        if manifest.version == highest:
            return
        try:
            with locked(self.path.with_suffix(".lock")):  # else two programs could undo what the other noted
                self._raise(manifest)
        except OSError as error:
            raise ConfigError(
                f"cannot note the accepted version in {self.path} ({error.strerror}): make the folder writable, or pin "
                "the keys in another one with --trust",
                about=self.path.name,
            ) from error

    def _raise(self, manifest: AdapterManifest) -> None:
        versions = self._read()
        if manifest.version > _highest(versions, manifest):
            versions.setdefault(manifest.base_digest, {})[manifest.name] = manifest.version
            replace(self.path, jsontext.encode(versions))

    def _read(self) -> Versions:
        if not self.path.exists():
            return {}
        try:
            versions = jsontext.decode(read_file(self.path, MAX_ENVELOPE))
            sound = all(type(version) is int for noted in versions.values() for version in noted.values())
        except (ValueError, AttributeError):
            sound = False
        if not sound:
            raise TrustError(
                f"{self.path} is damaged: delete it only if you trust the bundle to be the current one",
                about=self.path.name,
            )
        return dict(versions)


def _highest(versions: Versions, manifest: AdapterManifest) -> int:
    return versions.get(manifest.base_digest, {}).get(manifest.name, -1)
