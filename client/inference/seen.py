"""The highest version of each adapter that a device has accepted, and its content, by base. It protects from rollback.

One version has one content: else whoever can write to the bundle, but cannot sign, could go back to another adapter
that was once signed under the same version. The file is next to the pinned keys, and as safe as their folder: whoever
can write there can pin another key.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Self

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from adapters import jsontext
from adapters.bundle import read_file
from adapters.dsse import MAX_ENVELOPE
from adapters.manifest import AdapterManifest, Count, Sha256
from adapters.storage import locked, replace
from aggregation.errors import ConfigError, DataError, TrustError


@dataclass(frozen=True, slots=True)
class SeenVersion:
    """An accepted version of an adapter."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    version: Count
    content: Sha256  # ``AdapterManifest.content``

    @classmethod
    def of(cls, manifest: AdapterManifest) -> Self:
        """What is noted of a manifest."""
        return cls(manifest.version, manifest.content)


Versions = dict[Sha256, dict[Annotated[str, Field(max_length=64)], SeenVersion]]  # base digest → adapter → version


@dataclass(frozen=True, slots=True)
class SeenVersions:
    """The file, which need not exist yet."""

    path: Path

    def check(self, manifest: AdapterManifest) -> None:
        """Return if ``accept`` would. Raises TrustError as it does, and notes nothing."""
        _is_new(self._read(), manifest)

    def highest(self, base_digest: str, name: str) -> int:
        """The highest version of an adapter that was accepted; 0 if none was. Raises TrustError as ``accept``."""
        seen = self._read().get(base_digest, {}).get(name)
        return seen.version if seen else 0

    def accept(self, manifest: AdapterManifest) -> None:
        """Note the version of a verified manifest, if it is the highest so far.

        Raises:
            TrustError: It is lower than the highest, the highest had another content, or the file is damaged.
            ConfigError: The file cannot be written.
        """
        if not _is_new(self._read(), manifest):
            return
        try:
            with locked(self.path.with_suffix(".lock")):  # else two programs could undo what the other noted
                versions = self._read()
                if _is_new(versions, manifest):
                    versions.setdefault(manifest.base_digest, {})[manifest.name] = SeenVersion.of(manifest)
                    noted = {base: {name: asdict(one) for name, one in seen.items()} for base, seen in versions.items()}
                    replace(self.path, jsontext.encode(noted))
        except OSError as error:
            raise ConfigError(
                f"cannot note the accepted version in {self.path} ({error.strerror}): make the folder writable, or pin "
                "the keys in another one with --trust",
                about=self.path.name,
            ) from error

    def _read(self) -> Versions:
        if not self.path.exists():
            return {}
        try:
            raw = read_file(self.path, MAX_ENVELOPE)
            jsontext.decode(raw)  # refuses what the next line would read in one of several ways
            return TypeAdapter(Versions).validate_json(raw, strict=True)
        except (DataError, TrustError, ValueError, ValidationError) as error:
            # The cause would say to copy the bundle again, which does not help.
            raise TrustError(
                f"{self.path}, which notes the versions that were accepted, is damaged: delete it only if you trust "
                "the bundle to be the current one",
                about=self.path.name,
            ) from error


def _is_new(versions: Versions, manifest: AdapterManifest) -> bool:
    """Whether the version is above the highest. Raises TrustError as ``SeenVersions.accept``."""
    highest = versions.get(manifest.base_digest, {}).get(manifest.name)
    if highest is None or manifest.version > highest.version:
        return True
    if manifest.version < highest.version:
        raise TrustError(
            f"adapter {manifest.name!r} is version {manifest.version}, but version {highest.version} was accepted here "
            "before: copy the current bundle",
            about="adapter-manifest.version",
            value=manifest.version,
        )
    if manifest.content != highest.content:
        raise TrustError(
            f"adapter {manifest.name!r} has another content than the version {manifest.version} that was accepted here "
            "before: copy the current bundle, or export the new content under the next version",
            about="adapter-manifest.source",
            value=manifest.source,
        )
    return False
