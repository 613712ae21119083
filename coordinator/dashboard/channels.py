"""What the signed log of a repository of channels says of each channel: its release, who gets it, how it was made.

The rollback that is prepared for a rollout is not in the log, and is read itself.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from aggregation.errors import DataError, TrustError
from edgeadapt.formats import storage
from edgeadapt.formats.rollout import ALL
from edgeadapt.releases.actions import ActionRecord
from edgeadapt.releases.history import audit_repository
from edgeadapt.releases.metadata import MAX_METADATA
from edgeadapt.releases.repository import ChannelRepository

MAKES = ("publish", "promote", "rollback")  # a release


@dataclass(slots=True)
class ChannelsView:
    """Reads a repository again when it has changed."""

    folder: Path
    _seen: tuple[bytes, ...] = ()
    _found: dict[str, Any] | None = None

    def look(self) -> dict[str, Any]:
        """Read ``channels``, name → row or None without a release, and the ``problem`` why not to believe them.

        Raises ConfigError: the folder does not have a repository.
        """
        opened = ChannelRepository.open(self.folder, datetime.now(UTC))
        timestamp = opened.metadata.place / "timestamp.json"  # each action signs a new one
        ready = [opened.prepared.path(name) for name in opened.channels]  # and preparing a rollback does not
        seen = (storage.read(timestamp, MAX_METADATA), *map(_content, ready))
        if self._found is None or seen != self._seen:
            self._found, self._seen = self._read(opened), seen
        return self._found

    def _read(self, opened: ChannelRepository) -> dict[str, Any]:
        try:
            records = audit_repository(self.folder, None).records
        except TrustError as error:
            return {"channels": {}, "problem": str(error)}
        protected = opened.protected
        rows = {name: _row(records, name, name in protected) for name in opened.channels}
        for name, row in rows.items():
            current = opened.release(name)
            if row is not None and row["previous"] is not None and current is not None:
                condition, problem = opened.prepared.state(name, current)
                row["prepared"] = condition and {"again": condition.again, "margin": condition.margin}
                row["unprepared"] = problem
        return {"channels": rows, "problem": None}


def _content(path: Path) -> bytes:
    """Read a file that may be missing, or why it cannot be read: ``PreparedRollbacks.state`` makes a reason of that."""
    try:
        return storage.read(path, MAX_METADATA)
    except FileNotFoundError:
        return b""
    except (OSError, DataError) as error:
        return str(error).encode()


def _row(records: Sequence[ActionRecord], channel: str, protected: bool) -> dict[str, Any] | None:
    """Describe the release of a channel, from the record that made it and those after it."""
    own = [record for record in records if record.action.subject == channel]
    release = next((record for record in reversed(own) if record.action.kind in MAKES), None)
    if release is None:
        return None
    later = [record for record in own if record.number > release.number]
    staged = next((record for record in reversed(later) if record.action.kind == "rollout"), release)
    refusal = next((record for record in reversed(later) if record.action.kind == "refuse"), None)
    judged = next((record for record in reversed([release, *later]) if record.action.evaluation), None)
    action, rollout = release.action, staged.action.rollout
    return {
        "release": action.release,
        "adapters": action.adapters,
        "protected": protected,
        "kind": action.kind,
        "source": action.source,
        "again": action.again,
        "since": release.made,
        "by": release.by,
        "share": ALL if rollout is None else rollout.share,
        "languages": [] if rollout is None else list(rollout.languages),
        "previous": None if rollout is None else rollout.previous,
        "share_since": staged.made,
        "evaluation": None if judged is None else _evaluation(judged),
        "prepared": None,
        "unprepared": "",
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


def _evaluation(record: ActionRecord) -> dict[str, Any] | None:
    """Describe the verdict in a record: the reason why the release stayed or the previous one was published again."""
    evaluation = record.action.evaluation
    if evaluation is None:
        return None
    return {"round": evaluation.round, "worse": evaluation.worse, "text": str(evaluation.verdict), "since": record.made}
