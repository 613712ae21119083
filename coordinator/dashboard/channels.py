"""What the signed log of a repository of channels says of each channel: its release, who gets it, how it was made."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from adapters import storage
from adapters.rollout import ALL
from aggregation.errors import TrustError
from coordinator.channels.actions import ActionRecord
from coordinator.channels.history import audit_repository
from coordinator.channels.metadata import MAX_METADATA
from coordinator.channels.repository import ChannelRepository

MAKES = ("publish", "promote", "rollback")  # a release


@dataclass(slots=True)
class ChannelsView:
    """Reads a repository again when it has changed.

    Args:
        folder: Of the repository.
    """

    folder: Path
    _timestamp: bytes = b""
    _found: dict[str, Any] | None = None

    def look(self) -> dict[str, Any]:
        """``channels``, name → row or None without a release, and ``problem``: why they cannot be believed, or None.

        Raises:
            ConfigError: The folder has no repository.
            OSError: It cannot be read.
        """
        opened = ChannelRepository.open(self.folder, datetime.now(UTC))
        timestamp = storage.read(opened.metadata.place / "timestamp.json", MAX_METADATA)
        if self._found is None or timestamp != self._timestamp:  # each action signs a new one
            self._found, self._timestamp = self._read(opened), timestamp
        return self._found

    def _read(self, opened: ChannelRepository) -> dict[str, Any]:
        try:
            records = audit_repository(self.folder, None).records
        except TrustError as error:
            return {"channels": {}, "problem": str(error)}
        protected = opened.protected
        rows = {name: _row(records, name, name in protected) for name in opened.channels}
        return {"channels": rows, "problem": None}


def _row(records: Sequence[ActionRecord], channel: str, protected: bool) -> dict[str, Any] | None:
    """The release of a channel, from the record that made it and those after it."""
    own = [record for record in records if record.action.subject == channel]
    made = next((record for record in reversed(own) if record.action.kind in MAKES), None)
    if made is None:
        return None
    later = [record for record in own if record.number > made.number]
    staged = next((record for record in reversed(later) if record.action.kind == "rollout"), made)
    refusal = next((record for record in reversed(later) if record.action.kind == "refuse"), None)
    action, rollout = made.action, staged.action.rollout
    return {
        "release": action.release,
        "adapters": action.adapters,
        "protected": protected,
        "kind": action.kind,
        "source": action.source,
        "again": action.again,
        "since": made.made,
        "by": made.by,
        "share": ALL if rollout is None else rollout.share,
        "languages": [] if rollout is None else list(rollout.languages),
        "previous": None if rollout is None else rollout.previous,
        "share_since": staged.made,
        "gates": [asdict(each) for each in action.gates],
        "refusal": None
        if refusal is None
        else {
            "release": refusal.action.release,
            "source": refusal.action.source,
            "since": refusal.made,
            "by": refusal.by,
            "gates": [asdict(each) for each in refusal.action.gates if not each.passed],
        },
    }
