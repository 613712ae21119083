"""The coordinator's home: its signing key, the authority that it relies on, settings, registry and transcripts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from sqlalchemy.engine import URL

from aggregation.certificates import Root
from aggregation.errors import ConfigError
from aggregation.identity import IdentityKey
from coordinator.registry import Registry
from coordinator.settings import FederationSettings
from coordinator.transcript import Transcripts

KEY = "signing.pem"
AUTHORITY = "authority.pem"
SETTINGS = "federation.json"
DATABASE = "registry.db"
BLOBS = "blobs"
TRANSCRIPT = "transcript"


@dataclass(frozen=True, slots=True)
class CoordinatorHome:
    """A coordinator, opened from its folder."""

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
        """
        settings = FederationSettings.read(folder / SETTINGS)
        try:
            key = IdentityKey.from_pem((folder / KEY).read_bytes())
            root = Root.from_pem((folder / AUTHORITY).read_bytes())
        except FileNotFoundError as error:
            raise ConfigError(
                f"{folder} is not a coordinator's home: {Path(error.filename).name} is missing"
            ) from error
        transcripts = Transcripts(folder / TRANSCRIPT, key, root, settings.aggregation.keep_masked_inputs)
        return cls(key, root, settings, open_registry(folder, key), transcripts)


def open_registry(folder: Path, key: IdentityKey) -> Registry:
    """The registry of a coordinator's home."""
    url = URL.create("sqlite", database=str(folder / DATABASE))  # built, not formatted: a folder may have a "?"
    return Registry.open(url, str(folder / BLOBS), [key.public])
