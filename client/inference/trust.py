"""The bundles that a device accepts: signed by a key that its owner pinned, and never older or other than before.

``adapters.bundle`` verifies the files. A device adds two rules:

- The pinned keys are outside the bundle: keys that ship in a bundle would vouch for themselves.
- The version of an adapter is not below the highest that this device has accepted under its name for its base, and has
  the content that this version had then (``seen.py``). It is noted only after every other rule holds.

docs/explanation/inference.md says what these rules leave open.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from adapters.bundle import TRUST, Bundle, VerifiedAdapter, VerifiedBase
from adapters.keyfiles import read_public_keys
from adapters.storage import real
from aggregation.errors import TrustError
from client.inference.seen import SeenVersions


@dataclass(frozen=True, slots=True)
class Trust:
    """A bundle, the device's pinned keys, which a lesson adds to, and the versions that the device has accepted."""

    folder: Path
    pinned: Path

    @classmethod
    def open(cls, folder: Path, pinned: Path | None = None) -> Self:
        """Take the keys in ``pinned``, by default in ``trust.pem`` in the folder that holds the bundle ``folder``.

        Raises:
            TrustError: There is no such file, it is inside the bundle, or it does not hold public keys only.
        """
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
        """The bundle with the keys that are pinned now. Raises TrustError as ``open``."""
        file = self.pinned
        if not file.is_file():
            what = f"{file} is not a regular file" if file.exists() else f"no pinned keys at {file}"
            raise TrustError(f"{what}: put the vendor's public key there, or name it with --trust", about=TRUST)
        return Bundle(self.folder, read_public_keys(file))

    @property
    def seen(self) -> SeenVersions:
        """The versions that the device has accepted."""
        return SeenVersions(self.pinned.with_suffix(".seen.json"))

    def adapter(self, name: str, base: VerifiedBase) -> VerifiedAdapter:
        """An adapter for ``base``; its version is noted.

        Raises:
            ConfigError: No adapter can have this name, or the version cannot be noted.
            DataError, TrustError: As ``Bundle.adapter``; or its version is older than one that was accepted,
                or had another content then.
        """
        verified = self.bundle.adapter(name, base.manifest)
        self.seen.accept(verified.manifest)
        return verified
