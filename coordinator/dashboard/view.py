"""What the page and the metrics show: numbers of the fleet, and no device's name."""

from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from coordinator.dashboard.channels import ChannelsView
from coordinator.expiry import expiries
from coordinator.gateway import snapshot
from coordinator.registry import Head
from coordinator.services import deployment
from coordinator.sessionprogress import LogFollower
from coordinator.statedir import CoordinatorStateDir
from coordinator.status import lease_of
from edgeadapt.formats.manifest import VersionManifest
from edgeadapt.formats.registryfiles import TRANSCRIPT
from edgeadapt.formats.roundrecord import RoundRecord

LISTED = 200  # rounds at most, the last ones


@dataclass(slots=True)
class Viewer:
    """Reads a coordinator's state directory again and again. It writes nothing, and takes no lock for long.

    ``channels``: a repository of channels; None if none is to be shown.
    """

    state_dir: CoordinatorStateDir
    channels: ChannelsView | None = None
    _follower: LogFollower = field(init=False)
    _head: Head | None = None
    _history: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._follower = LogFollower(self.state_dir.folder / TRANSCRIPT)

    def look(self) -> dict[str, Any]:
        """Read the fleet now. All values can be written in JSON. Raises EdgeAdaptError and OSError."""
        running, progress = self.state_dir.in_use, self._follower.look()
        return {
            "running": running,
            "lease": lease_of(self.state_dir),
            "expiries": expiries(self.state_dir.folder, datetime.now(UTC)),
            "rounds_wanted": self.state_dir.settings.rounds,
            "services": (deployment.running(self.state_dir.folder) or {"services": []})["services"],
            "session": None if progress is None else progress.as_json(),
            "gateway": snapshot.read(self.state_dir.folder) if running else None,
            "epsilon_limit": self.state_dir.settings.privacy.epsilon or None,
            **({"channels": {}, "problem": None} if self.channels is None else self.channels.look()),
            **self._rounds(),
        }

    def _rounds(self) -> dict[str, Any]:
        """Read what the registry says, again only when it has a new round or version."""
        registry = self.state_dir.registry
        if registry.latest() is None:
            return _history((), None)
        head = registry.head()
        if head != self._head:
            self._history = _history(registry.rounds(), registry.version(head.newest[0]).manifest)
            self._head = head
        return self._history


def _history(records: tuple[RoundRecord, ...], newest: VersionManifest | None) -> dict[str, Any]:
    steps = Counter(step for record in records for step in record.dropped.values())
    last = records[-1] if records else None
    return {
        "version": None if newest is None else newest.version,
        "privacy": None if newest is None or newest.privacy is None else str(newest.privacy),
        "epsilon": None if last is None else last.epsilon,
        "rounds_done": len(records),
        "rounds_aborted": sum(record.aborted is not None for record in records),
        "device_rounds": sum(len({*record.survivors, *record.dropped}) for record in records),
        "dropouts_by_step": dict(steps),
        "bytes_up": sum(record.bytes_up for record in records),
        "bytes_down": sum(record.bytes_down for record in records),
        "seconds": sum(record.seconds for record in records),
        "metrics": {} if last is None else last.metrics,
        "rounds": [_round(record) for record in records[-LISTED:]],
    }


def _round(record: RoundRecord) -> dict[str, Any]:
    return {
        "round": record.round,
        "version": record.version,
        "survivors": len(record.survivors),
        "dropouts": dict(Counter(record.dropped.values())),
        "seconds": record.seconds,
        "bytes_up": record.bytes_up,
        "epsilon": record.epsilon,
        "metrics": record.metrics,
        "reason": record.reason,
        "spoiled": record.spoiled is not None,
    }
