"""Read a registry wherever it is: in its state directory, or in the database and the bucket of ``registry.toml``."""

from collections.abc import Sequence
from pathlib import Path

from aggregation.pki.identity import PublicKey
from edgeadapt.formats.registryfiles import LocalFiles, RegistryFiles, RegistrySettings, require


def open_registry_files(state_dir: Path, trusted: Sequence[PublicKey]) -> RegistryFiles:
    """Open the registry of a state directory. Only one that is elsewhere takes more than the bare install."""
    require(state_dir)
    settings = RegistrySettings.of(state_dir)
    if not settings.database and not settings.blobs:
        return RegistryFiles(LocalFiles(state_dir), tuple(trusted))
    from edgeadapt.formats.registrystores import RemoteStores

    return RegistryFiles(RemoteStores.open(state_dir, settings), tuple(trusted))
