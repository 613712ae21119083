"""The bundles that a device accepts: signed by a key that its owner pinned, and never older or other than before.

``edgeadapt.formats.bundle`` verifies the files. A device adds two rules:

- The pinned keys are outside the bundle: keys that ship in a bundle would vouch for themselves.
- The version of an adapter is not below the highest that this device has accepted under its name for its base, and has
  the content that this version had then: else a writer of the bundle who cannot sign could go back to an adapter that
  was once signed. It is noted only after every other rule holds, in a file next to the pinned keys: a writer there can
  pin another key anyway.

docs/explanation/export.md says what these rules leave open."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Self

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from aggregation.errors import ConfigError, DataError, TrustError
from edgeadapt.formats import jsontext
from edgeadapt.formats.bundle import TRUST, Bundle, VerifiedAdapter, VerifiedBase, read_file
from edgeadapt.formats.dsse import MAX_ENVELOPE
from edgeadapt.formats.keyfiles import read_public_keys
from edgeadapt.formats.manifest import AdapterManifest, Count, Sha256
from edgeadapt.formats.storage import locked, real, replace


@dataclass(frozen=True, slots=True)
class SeenVersion:
    __pydantic_config__ = ConfigDict(extra="forbid")

    version: Count
    content: Sha256  # ``AdapterManifest.content``

    @classmethod
    def of(cls, manifest: AdapterManifest) -> Self:
        return cls(manifest.version, manifest.content)


Versions = dict[Sha256, dict[Annotated[str, Field(max_length=64)], SeenVersion]]  # base digest → adapter → version


@dataclass(frozen=True, slots=True)
class SeenVersions:
    path: Path

    def check(self, manifest: AdapterManifest) -> None:
        """Check that ``accept`` would not raise TrustError, and note nothing."""
        _is_new(self._read(), manifest)

    def highest(self, base_digest: str, name: str) -> int:
        """Read the highest version of an adapter that was accepted; 0 if none was. Raises TrustError as ``accept``."""
        seen = self._read().get(base_digest, {}).get(name)
        return seen.version if seen else 0

    def accept(self, manifest: AdapterManifest) -> None:
        """Note the version of a verified manifest, if it is the highest so far. Raises TrustError: it is lower than the
        highest, the highest had another content, or the file is damaged; ConfigError: the file cannot be written."""
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
        )
    if manifest.content != highest.content:
        raise TrustError(
            f"adapter {manifest.name!r} has another content than the version {manifest.version} that was accepted here "
            "before: copy the current bundle, or export the new content under the next version",
            about="adapter-manifest.source",
        )
    return False


@dataclass(frozen=True, slots=True)
class Trust:
    """A bundle, the device's pinned keys, which a lesson adds to, and the versions that the device has accepted."""

    folder: Path
    pinned: Path

    @classmethod
    def open(cls, folder: Path, pinned: Path | None = None) -> Self:
        """Take the keys in ``pinned``, by default in ``trust.pem`` in the folder that holds the bundle ``folder``.
        Raises TrustError: there is no such file, it is inside the bundle, or it does not hold public keys only."""
        folder = real(folder)
        file = folder.parent / TRUST if pinned is None else pinned.absolute()
        if real(file).is_relative_to(folder):
            raise TrustError(
                f"{file} is inside the bundle, which cannot vouch for itself: pin the keys elsewhere", about=TRUST
            )
        trust = cls(folder, file)
        trust.bundle  # noqa: B018  # refuses a file without keys
        return trust

    @property
    def bundle(self) -> Bundle:
        """Open the bundle with the keys that are pinned now. Raises TrustError as ``open``."""
        file = self.pinned
        if not file.is_file():
            what = f"{file} is not a regular file" if file.exists() else f"no pinned keys at {file}"
            raise TrustError(f"{what}: put the vendor's public key there, or name it with --trust", about=TRUST)
        return Bundle(self.folder, read_public_keys(file))

    @property
    def seen(self) -> SeenVersions:
        return SeenVersions(self.pinned.with_suffix(".seen.json"))

    def adapter(self, name: str, base: VerifiedBase) -> VerifiedAdapter:
        """Verify an adapter for ``base``; its version is noted. Raises ConfigError: no adapter can have this name, or
        the version cannot be noted; DataError, TrustError: as ``Bundle.adapter``; or it is older than one that was
        accepted, or had another content then."""
        verified = self.bundle.adapter(name, base.manifest)
        for manifest in self.bundle.governing(verified.manifest, base.manifest) if verified.manifest.parent else ():
            if manifest.version < self.seen.highest(base.digest, manifest.name):
                self.seen.check(manifest)
        self.seen.accept(verified.manifest)
        return verified
