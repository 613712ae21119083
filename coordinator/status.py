"""The state of a federation, read from the coordinator's state directory: versions, rounds, dropouts, last session."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
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
from coordinator.services import deployment
from coordinator.statedir import TRANSCRIPT, CoordinatorStateDir

SUSPICIOUS = 0.01  # probability


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
        "services": deployment.running(state_dir.folder),
        "rounds_done": len(rounds),
        "rounds_wanted": state_dir.settings.rounds,
        "rounds_aborted": sum(record.aborted is not None for record in rounds),
        "device_rounds": sum(len({*record.survivors, *record.dropped}) for record in rounds),
        "dropouts_by_step": dict(steps),
        "versions": [_version(version.manifest) for version in state_dir.registry.versions()],
        "rounds": [_round(record) for record in rounds],
        "farthest": farthest(rounds),
        "last_session": _session(state_dir.folder / TRANSCRIPT),
    }


def lines_of(status: dict[str, Any]) -> Iterator[str]:
    """The same for a reader."""
    yield f"{status['state']}: key {status['key']}, authority {status['authority'][:16]}"
    if services := status["services"]:
        yield f"services run since {services['since']}, process {services['pid']}"
        for each in services["services"]:
            at = f" at {each['address']}" if each["address"] else ""
            process = f", process {each['pid']}" if each["pid"] else ""
            yield f"  {each['name']}{at}: {each['state']}{process}, {each['restarts']} restarts"
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
    if status["farthest"]:
        yield ""
        yield "devices whose groups were farthest from the combination, more often than chance (a hint, no proof):"
    for device, each in status["farthest"].items():
        yield f"{device}: {each['farthest']} of {each['rounds']} rounds, which has a chance of {each['chance']:.2g}"


def farthest(records: Iterable[RoundRecord]) -> dict[str, dict[str, float]]:
    """Devices whose groups were the farthest from the combination more often than chance, the least likely first.

    In each round with groups one is the farthest; a device is in it with a probability of one over their number if it
    is like all others, and rounds deal anew. A device is listed if so many such rounds or more have a probability of
    less than ``SUSPICIOUS``. That is a hint for the operator and no proof: of a hundred honest devices, one is listed.

    Returns:
        Device → ``rounds`` with groups that it is in, ``farthest``: in how many its group was, and ``chance``.
    """
    likely: dict[str, list[float]] = {}  # device → probability of so many rounds in the farthest group, by number
    seen: Counter[str] = Counter()
    for record in records:
        last = max((each.distance for each in record.groups), default=0.0)
        for group in record.groups:
            for device in group.survivors:
                share, before = 1 / len(record.groups), likely.get(device, [1.0])
                missed, hit = [*before, 0.0], [0.0, *before]
                likely[device] = [(1 - share) * no + share * yes for no, yes in zip(missed, hit, strict=True)]
                seen[device] += group.distance == last
    chances = {device: math.fsum(each[seen[device] :]) for device, each in likely.items()}
    return {
        device: {"rounds": len(likely[device]) - 1, "farthest": seen[device], "chance": chance}
        for device, chance in sorted(chances.items(), key=lambda item: (item[1], item[0]))
        if chance < SUSPICIOUS
    }


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
        "groups": [asdict(group) for group in record.groups],
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
