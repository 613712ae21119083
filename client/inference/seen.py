"""The highest version of every adapter that a device has accepted, by base: what a rollback is refused by.

Kept in a file beside the pinned keys. As good as that folder: who can write there can pin another key anyway.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from adapters.dsse import MAX_ENVELOPE
from adapters.manifest import AdapterManifest
from adapters.storage import locked, replace
from aggregation.errors import ConfigError, TrustError
from client.inference import intact

Versions = dict[str, dict[str, int]]  # base digest → adapter → version


@dataclass(frozen=True, slots=True)
class SeenVersions:
    """The file, which need not be there yet."""

    path: Path

    def refuse_older(self, sidecar: AdapterManifest) -> None:
        """Return if the version is not below the highest that was accepted.

        Raises:
            TrustError: It is; or the note is damaged.
        """
        if sidecar.version < (highest := _highest(self._read(), sidecar)):
            raise TrustError(
                f"adapter {sidecar.name!r} is version {sidecar.version}, but version {highest} was accepted "
                "here before; fetch the current bundle"
            )

    def note(self, sidecar: AdapterManifest) -> None:
        """Note that the version was accepted, if it is the highest so far.

        Raises:
            TrustError: The note is damaged.
            ConfigError: It cannot be written.
        """
        if sidecar.version <= _highest(self._read(), sidecar):
            return
        try:
            with locked(self.path.with_suffix(".lock")):  # else two programs could undo what the other noted
                self._raise(sidecar)
        except OSError as error:
            raise ConfigError(
                f"cannot note the accepted version in {self.path} ({error.strerror}); make the folder writable, or pin "
                "the keys in another one with --trust"
            ) from error

    def _raise(self, sidecar: AdapterManifest) -> None:
        versions = self._read()
        if sidecar.version > _highest(versions, sidecar):
            versions.setdefault(sidecar.base_digest, {})[sidecar.name] = sidecar.version
            replace(self.path, json.dumps(versions, indent=1, sort_keys=True).encode())

    def _read(self) -> Versions:
        if not self.path.exists():
            return {}
        try:
            versions = json.loads(intact.read(self.path, MAX_ENVELOPE))
            sound = all(type(version) is int for noted in versions.values() for version in noted.values())
        except (ValueError, AttributeError, RecursionError):
            sound = False
        if not sound:
            raise TrustError(f"{self.path} is damaged; delete it only if you trust the bundle to be the current one")
        return dict(versions)


def _highest(versions: Versions, sidecar: AdapterManifest) -> int:
    return versions.get(sidecar.base_digest, {}).get(sidecar.name, -1)
