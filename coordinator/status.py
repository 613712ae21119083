"""The state of a federation, read from the coordinator's state directory: versions, rounds, dropouts, last session."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adapters import storage
from adapters.manifest import VersionManifest
from adapters.roundrecord import RoundRecord
from aggregation import envelope, transcript
from aggregation.errors import ProtocolError
from aggregation.messages import Shares
from aggregation.transcript import Checkpoint, Stage
from coordinator.audit.transcripts import logs
from coordinator.statedir import TRANSCRIPT, CoordinatorStateDir


def status_of(state_dir: CoordinatorStateDir) -> dict[str, Any]:
    """The object that ``edgeadapt coordinator status --json`` prints.

    Raises:
        EdgeAdaptError: As ``Registry.versions`` and ``Registry.rounds``; or the last log is too large, or no file.
    """
    rounds = state_dir.registry.rounds()
    steps = Counter(step for record in rounds for step in record.dropped.values())
    return {
        "state": str(state_dir.folder),
        "key": state_dir.key.public.key_id,
        "authority": state_dir.root.fingerprint,
        "running": state_dir.in_use,
        "rounds_done": len(rounds),
        "rounds_wanted": state_dir.settings.rounds,
        "rounds_aborted": sum(record.aborted is not None for record in rounds),
        "device_rounds": sum(len({*record.survivors, *record.dropped}) for record in rounds),
        "dropouts_by_step": dict(steps),
        "versions": [_version(version.manifest) for version in state_dir.registry.versions()],
        "rounds": [_round(record) for record in rounds],
        "last_session": _session(state_dir.folder / TRANSCRIPT),
    }


def lines_of(status: dict[str, Any]) -> Iterator[str]:
    """The same for a reader."""
    yield f"{status['state']}: key {status['key']}, authority {status['authority'][:16]}"
    done, wanted, aborted = status["rounds_done"], status["rounds_wanted"], status["rounds_aborted"]
    at = ", ".join(f"{count} at {step}" for step, count in status["dropouts_by_step"].items())
    count = sum(status["dropouts_by_step"].values())
    if not status["versions"]:
        yield "no version: publish a first adapter with 'edgeadapt coordinator publish'"
    for version in status["versions"][-1:]:
        yield (
            f"version {version['version']}, of round {version['round']}: {version['bytes']:,} bytes, "
            f"{version['labels']} labels, sha256 {version['sha256'][:16]}"
        )
    yield f"rounds {done} of {wanted}, {aborted} aborted{', a run is in progress' if status['running'] else ''}"
    yield f"dropouts {count} of {status['device_rounds']} device-rounds{f': {at}' if at else ''}"
    if session := status["last_session"]:
        state = "closed" if session["closed"] else "not closed"
        yield f"last session {session['log']}: {session['devices']} devices, {session['rounds']} rounds, {state}"
    if status["rounds"]:
        yield ""
        yield "round  version  survivors  dropouts  accuracy    loss  seconds"
    for each in status["rounds"]:
        accuracy, loss = (each["metrics"].get(name) for name in ("accuracy", "loss"))
        cells = (
            f"{each['round']:>5}",
            f"{'-' if each['version'] is None else each['version']:>7}",
            f"{len(each['survivors']):>9}",
            f"{len(each['dropped']):>8}",
            f"{'-' if accuracy is None else format(accuracy, '.3f'):>8}",
            f"{'-' if loss is None else format(loss, '.3f'):>6}",
            f"{each['seconds']:>7.1f}",
        )
        notes = [f"epsilon {each['epsilon']:.3f}"] if each["epsilon"] is not None else []
        notes += [f"{name}: {each[name]}" for name in ("aborted", "spoiled") if each[name]]
        yield "  ".join([*cells, *notes])


def _version(manifest: VersionManifest) -> dict[str, Any]:
    return {
        "version": manifest.version,
        "round": manifest.round,
        "sha256": manifest.sha256,
        "bytes": manifest.size,
        "labels": len(manifest.labels),
    }


def _round(record: RoundRecord) -> dict[str, Any]:
    return {
        "round": record.round,
        "survivors": list(record.survivors),
        "dropped": record.dropped,
        "aborted": record.aborted,
        "spoiled": record.spoiled,
        "bytes_up": record.bytes_up,
        "bytes_down": record.bytes_down,
        "seconds": record.seconds,
        "metrics": record.metrics,
        "epsilon": record.epsilon,
        "version": record.version,
    }


def _session(folder: Path) -> dict[str, Any] | None:
    """The newest session's log, as far as it can be read; ``edgeadapt audit`` verifies it."""
    paths = logs(folder)
    if not paths:
        return None
    entries = transcript.read(storage.read(paths[-1])).entries
    stage = None
    if entries and entries[-1].kind == Checkpoint.TAG:
        try:
            stage = Checkpoint.decode(envelope.unverified_body(entries[-1].message)).stage
        except ProtocolError:
            stage = None
    return {
        "log": paths[-1].name,
        "devices": sum(entry.kind == Shares.TAG for entry in entries),
        "rounds": max((entry.round for entry in entries), default=0),
        "closed": stage is Stage.CLOSED,
    }
