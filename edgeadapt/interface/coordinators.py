"""``edgeadapt.Coordinator``: a coordinator's state directory, and the rounds over its gateway."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from aggregation.entropy import SystemEntropy
from coordinator.seed import publish_first
from coordinator.settings import FederationSettings
from coordinator.statedir import CoordinatorStateDir
from coordinator.status import status_of
from edgeadapt.formats.keyfiles import MAX_PEM
from edgeadapt.formats.manifest import RoundRecord, VersionManifest
from edgeadapt.formats.settings import overridden
from edgeadapt.formats.storage import File, read
from edgeadapt.interface.names import check_texts, in_python, overrides


class Coordinator:
    """A coordinator, which its state directory holds: each call reads that."""

    def __init__(self, path: File) -> None:
        """Open a state directory. Raises ConfigError, TrustError: it is not one, or is damaged."""
        self.path = Path(path)
        self._open()

    @classmethod
    def create(cls, path: File, *, authority: File, **settings: Any) -> Self:
        """Make a new state directory with a new signing key; devices pin ``coordinator.pem`` there.

        Args:
            path: A new or empty folder.
            authority: The certificate of the authority that enrols devices.
            settings: Keys of ``federation.toml``, as in ``rounds=20`` or ``aggregation__minimum_devices=5``.

        Raises ConfigError, TrustError: as ``CoordinatorStateDir.create``."""
        with in_python():
            keys = FederationSettings.parse(overridden({}, overrides(settings)), "settings")
            CoordinatorStateDir.create(Path(path), read(Path(authority), MAX_PEM), keys, SystemEntropy())
        return cls(path)

    def publish(
        self, adapter: File | None, *, base: File, labels: Sequence[str] | None = None, task: str = "classification"
    ) -> VersionManifest:
        """Publish the first adapter, a folder that peft saved, as version 0; None for a model of your own. ``labels``:
        of its head, in order; by default those in ``labels.txt`` there. ``task``: what devices learn of labels, by its
        name. Raises ConfigError, DataError: as ``publish_first``."""
        check_texts("labels", labels or ())
        with in_python():
            return publish_first(self._open(), None if adapter is None else Path(adapter), str(base), labels, task)

    def run(self, gateway: str, report: Callable[[RoundRecord], object] = lambda _: None) -> tuple[RoundRecord, ...]:
        """Serve devices at ``gateway``, ``HOST:PORT``, until all rounds are done, and return those that ran. ``report``
        gets the record of each round once it is committed. The logger ``edgeadapt`` says more. Raises as
        ``coordinator.app.over_gateway``."""
        from coordinator.app import over_gateway  # Flower

        records = []
        with in_python():
            for record in over_gateway(self._open(), gateway):
                report(record)
                records.append(record)
        return tuple(records)

    def status(self) -> dict[str, Any]:
        """Return what ``edgeadapt coordinator status --json`` prints."""
        return status_of(self._open())

    def versions(self) -> tuple[VersionManifest, ...]:
        """Return the manifests of all versions, verified, oldest first."""
        return tuple(version.manifest for version in self._open().registry.versions())

    def _open(self) -> CoordinatorStateDir:
        return CoordinatorStateDir.open(self.path)

    def __repr__(self) -> str:
        return f"<Coordinator {str(self.path)!r}>"
