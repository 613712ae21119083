"""The coordinator's home: its signing key, the authority that it relies on, settings, registry and transcripts.

The authority's revocation list lies in it too, where there is one. It is read again for each session, so that a new one
counts without a restart, and the coordinator takes no older one than it went by before. Flower would start a second run
beside one that is under way; the home takes one at a time.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Self

from sqlalchemy.engine import URL

from adapters import storage
from adapters.registryfiles import BLOBS, DATABASE, SIGNING_KEY
from aggregation.errors import ConfigError, EdgeAdaptError, of_file
from aggregation.pki import Root
from aggregation.pki.identity import IdentityKey
from coordinator.registry.versions import Registry, Version
from coordinator.settings import SETTINGS as SETTINGS
from coordinator.settings import FederationSettings
from coordinator.transcripts import Transcripts

KEY = SIGNING_KEY
AUTHORITY = "authority.pem"
REVOKED = "revoked.crl"
TRANSCRIPT = "transcript"
LOCK = "run.lock"


@dataclass(frozen=True, slots=True)
class CoordinatorStateDir:
    """A coordinator, opened from its folder."""

    folder: Path
    key: IdentityKey
    root: Root
    settings: FederationSettings
    registry: Registry
    transcripts: Transcripts

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Read the folder.

        Raises:
            ConfigError: A file is missing or a setting is ill-formed.
            TrustError: The key, or the authority's certificate, is damaged.
        """
        settings = FederationSettings.read(folder / SETTINGS)
        try:
            with of_file(folder / KEY):
                key = IdentityKey.from_pem((folder / KEY).read_bytes())
            with of_file(folder / AUTHORITY):
                root = Root.from_pem((folder / AUTHORITY).read_bytes())
        except FileNotFoundError as error:
            raise ConfigError(
                f"{folder} is not a coordinator's home: {Path(error.filename).name} is missing"
            ) from error
        transcripts = Transcripts(folder / TRANSCRIPT, key, root, settings.aggregation.keep_masked_inputs)
        return cls(folder, key, root, settings, open_registry(folder, key), transcripts)

    def trusted(self, at: datetime) -> Root:
        """The authority, with the revocation list that lies here and in the newest transcript.

        Args:
            at: Now.

        Raises:
            TrustError: The list is not the authority's, is older than that of the last session, or is past its end.
        """
        root = self.root
        for path in (self.folder / TRANSCRIPT / REVOKED, self.folder / REVOKED):
            if path.exists():
                with of_file(path):
                    root = root.with_revocations(path.read_bytes())
        if root.revoked is not None:
            root.revoked.require_fresh(at)
        return root

    def latest(self) -> Version:
        """The adapter of the last round that came through, or the vendor's seed.

        Raises:
            EdgeAdaptError: There is none yet.
        """
        version = self.registry.latest()
        if version is None:
            raise EdgeAdaptError("the registry is empty: publish a seed adapter as version 0 first")
        return version

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One run at a time: two would write the same logs and registry.

        Raises:
            EdgeAdaptError: Another run is under way.
        """
        with ExitStack() as stack:
            try:
                stack.enter_context(storage.locked(self.folder / LOCK, wait=False))
            except TimeoutError:
                raise EdgeAdaptError(
                    f"another run is using {self.folder}: wait until it ends, or end it", about=LOCK
                ) from None
            yield


def open_registry(folder: Path, key: IdentityKey) -> Registry:
    """The registry of a coordinator's home."""
    url = URL.create("sqlite", database=str(folder / DATABASE))  # built, not formatted: a folder may have a "?"
    return Registry.open(url, str(folder / BLOBS), [key.public])
