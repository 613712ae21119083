"""What the page and the metrics show: numbers of the fleet, and no device's name."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest

from aggregation.errors import DataError, TrustError
from coordinator import runstate
from coordinator.health import BAD, Condition
from coordinator.registry import Head
from coordinator.runstate import Need
from coordinator.statedir import CoordinatorStateDir
from coordinator.status import LogFollower, counts_of, drift_of, operation_of
from edgeadapt.formats import storage
from edgeadapt.formats.jsontext import optional_timestamp
from edgeadapt.formats.manifest import RoundRecord, VersionManifest
from edgeadapt.formats.registryfiles import TRANSCRIPT
from edgeadapt.formats.release import ALL
from edgeadapt.releases.actions import ActionRecord
from edgeadapt.releases.history import audit_repository
from edgeadapt.releases.metadata import MAX_METADATA
from edgeadapt.releases.repository import ChannelRepository

MAKES = ("publish", "promote", "rollback")  # a release


@dataclass(slots=True)
class ChannelsView:
    folder: Path
    _seen: tuple[bytes, ...] = ()
    _found: dict[str, Any] | None = None

    def look(self) -> dict[str, Any]:
        """Read ``channels``, name → row or None without a release, and the ``problem`` why not to believe them. Raises
        ConfigError: the folder does not have a repository."""
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
        rows = {name: _channel(records, name, name in protected) for name in opened.channels}
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


def _channel(records: Sequence[ActionRecord], channel: str, protected: bool) -> dict[str, Any] | None:
    own = [record for record in records if record.action.subject == channel]
    release = next((record for record in reversed(own) if record.action.kind in MAKES), None)
    if release is None:
        return None
    later = [record for record in own if record.number > release.number]
    staged = next((record for record in reversed(later) if record.action.kind == "rollout"), release)
    refusal = next((record for record in reversed(later) if record.action.kind == "refuse"), None)
    judged = next(filter(None, map(_evaluation, reversed([release, *later]))), None)
    action, rollout = release.action, staged.action.rollout
    return {
        **{name: getattr(action, name) for name in OF_ACTION},
        "protected": protected,
        "since": release.made,
        "by": release.by,
        "share": ALL if rollout is None else rollout.share,
        "languages": [] if rollout is None else list(rollout.languages),
        "previous": None if rollout is None else rollout.previous,
        "share_since": staged.made,
        "evaluation": judged,
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
    evaluation = record.action.evaluation
    if evaluation is None:
        return None
    return {"round": evaluation.round, "worse": evaluation.worse, "text": str(evaluation.verdict), "since": record.made}


OF_ROUND = ("round", "version", "seconds", "bytes_up", "epsilon", "metrics", "reason")
OF_ACTION = ("release", "adapters", "kind", "source", "again")
LISTED = 200  # rounds at most, the last ones
HIDDEN = ("gateway", "reason", "process", "since_ticks")  # of a run: elsewhere in the view, or changes or names devices


@dataclass(slots=True)
class Viewer:
    """Reads a coordinator's state directory again and again. It writes nothing, and takes no lock for long.
    ``channels``: a repository of channels; None if none is to be shown."""

    state_dir: CoordinatorStateDir
    channels: ChannelsView | None = None
    _follower: LogFollower = field(init=False)
    _head: Head | None = None
    _history: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._follower = LogFollower(self.state_dir.folder / TRANSCRIPT)

    def look(self) -> dict[str, Any]:
        """Read the fleet now. All values can be written in JSON. Raises EdgeAdaptError and OSError."""
        operation, progress = operation_of(self.state_dir), self._follower.look()
        run = operation["run"]
        # Texts may name devices, and a wait changes while nothing does.
        run["refusals"] = [
            {name: each[name] for name in ("kind", "version", "count", "at", "cause")} for each in run["refusals"]
        ]
        judged = {name: value for name, value in operation["health"].items() if name not in ("seconds", "error")}
        return {
            **operation,
            "health": judged | {"failed": bool(operation["health"]["error"])},
            "services": (operation["services"] or {"services": []})["services"],
            "session": progress and progress.as_json(),
            "gateway": run["gateway"],
            "run": {name: value for name, value in run.items() if name not in HIDDEN},
            "epsilon_limit": self.state_dir.settings.privacy.epsilon or None,
            **({"channels": {}, "problem": None} if self.channels is None else self.channels.look()),
            **self._rounds(),
        }

    def _rounds(self) -> dict[str, Any]:
        """Read what the registry says, again only when it has a new round or version."""
        registry = self.state_dir.registry
        if registry.latest() is None:
            return _history((), ())
        head = registry.head()
        if head != self._head:
            manifests = tuple(version.manifest for version in registry.versions())
            self._history = _history(registry.rounds(), manifests)
            self._head = head
        return self._history


def _history(records: tuple[RoundRecord, ...], manifests: tuple[VersionManifest, ...]) -> dict[str, Any]:
    last, newest = records[-1] if records else None, manifests[-1] if manifests else None
    return {
        "version": None if newest is None else newest.version,
        "privacy": None if newest is None or newest.privacy is None else str(newest.privacy),
        "epsilon": None if last is None else last.epsilon,
        **counts_of(records),
        "bytes_up": sum(record.bytes_up for record in records),
        "bytes_down": sum(record.bytes_down for record in records),
        "seconds": sum(record.seconds for record in records),
        "metrics": {} if last is None else last.metrics,
        "drift": drift_of(manifests),
        "rounds": [_round(record) for record in records[-LISTED:]],
    }


def _round(record: RoundRecord) -> dict[str, Any]:
    row = {name: getattr(record, name) for name in OF_ROUND}
    counts = {"survivors": len(record.survivors), "dropouts": dict(Counter(record.dropped.values()))}
    return {**row, **counts, "ended": optional_timestamp(record.ended), "spoiled": record.spoiled is not None}


PREFIX = "edgeadapt_"


class _View(CollectorRegistry):
    def __init__(self, view: dict[str, Any]) -> None:
        super().__init__()
        self._view = view

    def collect(self) -> Iterator[Metric]:
        yield from families(self._view)


def exposition(view: dict[str, Any]) -> bytes:
    return generate_latest(_View(view))


def families(view: dict[str, Any]) -> Iterator[Metric]:
    aborted = view["rounds_aborted"]
    ended = {"sum": view["rounds_done"] - aborted, "abort": aborted}
    yield _counter("rounds", "Rounds that ended, by how they did.", "outcome", ended)
    yield _gauge("rounds_wanted", "Rounds after which the federation ends.", view["rounds_wanted"])
    yield _gauge("running", "1 while a run uses the state directory.", int(view["running"]))
    yield from _judged(view["health"])
    yield from _waits(view["run"])
    if (lease := view["lease"]) is not None:
        yield _gauge("lease_epoch", "How often a coordinator of this registry began to lead.", lease["epoch"])
        leads = int(lease["own"] and lease["in_force"])
        yield _gauge("leads", "1 while the coordinator of this state directory leads.", leads)
    ends = {name: each["until"] for name, each in view["expiries"].items() if each["until"]}
    times = {name: datetime.fromisoformat(until).timestamp() for name, until in ends.items()}
    yield _gauge("expiry_timestamp_seconds", "When a certificate or revocation list ends.", times, "file")
    if view["version"] is not None:
        yield _gauge("version", "The newest version in the registry.", view["version"])
    yield _counter("device_rounds", "Rounds of all devices together.", None, {"": view["device_rounds"]})
    yield _counter("dropouts", "Devices that dropped out of a round, by step.", "step", view["dropouts_by_step"])
    if (last := view["rounds"][-1:]) and last[0]["ended"] is not None:
        at = datetime.fromisoformat(last[0]["ended"]).timestamp()
        yield _gauge("round_timestamp_seconds", "When the last round ended.", at)
    sizes = {"up": view["bytes_up"], "down": view["bytes_down"]}
    yield _counter("bytes", "Bytes of the rounds, from devices (up) and to them (down).", "direction", sizes)
    yield _counter("round_seconds", "Wall time of all rounds.", None, {"": view["seconds"]})
    yield _gauge("metric", "Means over the survivors of the last round, from its sum.", view["metrics"], "name")
    if (drift := view["drift"]) and drift["changed"] is not None:
        yield _gauge("drift", "1 if the last two observations differ.", int(drift["changed"]))
        chances = {each["histogram"]: each["p"] for each in drift["histograms"]}
        yield _gauge("drift_probability", "Chance of such a difference without a change.", chances, "histogram")
    if view["epsilon"] is not None:
        yield _gauge("epsilon", "What all sums so far may have revealed of a device.", view["epsilon"])
    if view["epsilon_limit"] is not None:
        yield _gauge("epsilon_limit", "The epsilon at which the federation ends.", view["epsilon_limit"])
    services = view["services"]
    up = {each["name"]: int(each["state"] == "ready") for each in services}
    yield _gauge("service_ready", "1 while a service does its work.", up, "service")
    restarts = {each["name"]: each["restarts"] for each in services}
    yield _counter("service_restarts", "Restarts of a service since 'up' began.", "service", restarts)
    if (session := view["session"]) is not None:
        yield _gauge("session_devices", "Devices of the newest session.", session["devices"])
        if session["began"] is not None:
            began = datetime.fromisoformat(session["began"]).timestamp()
            yield _gauge("session_timestamp_seconds", "When the newest session was offered.", began)
    if (gateway := view["gateway"]) is not None:
        yield _gauge("gateway_devices", "Devices that are connected to the gateway.", gateway["devices"])
        yield _gauge("gateway_skewed_clocks", "Of these, with a clock off by over a minute.", gateway["skewed"])
        yield _gauge("gateway_requests", "Requests without an answer yet.", gateway["requests"])
        yield _gauge("gateway_versions", "Connected devices by version.", gateway["versions"], "version")
        yield _counter("gateway_check_ins", "Check-ins by outcome.", "outcome", gateway["check_ins"])
        yield _gauge("gateway_places", "Devices that may be connected.", gateway["places"])
        yield _gauge("gateway_waiting", "Devices that were sent away and come back.", gateway["waiting"])
        yield _counter("gateway_ends", "Ends of sessions of devices by reason.", "reason", gateway["ends"])
    releases = {name: one["release"] if one else 0 for name, one in view["channels"].items()}
    yield _gauge("channel_release", "The current release of a channel; 0: none.", releases, "channel")
    shares = {name: one["share"] for name, one in view["channels"].items() if one}
    yield _gauge("channel_share", "Percent of devices that the current release is for.", shares, "channel")
    staged = {name: one for name, one in view["channels"].items() if one and one["previous"] is not None}
    ready = {name: int(one["prepared"] is not None) for name, one in staged.items()}
    yield _gauge("channel_rollback_prepared", "1 if a rollout can be rolled back by itself.", ready, "channel")
    judged = {name: one["evaluation"] for name, one in view["channels"].items() if one and one["evaluation"]}
    worse = {name: int(found["worse"]) for name, found in judged.items()}
    yield _gauge("channel_worse", "1 if the last evaluation found the newest release worse.", worse, "channel")
    if view["problem"] is not None or view["channels"]:
        yield _gauge("channels_verified", "1 while the log of the channels passes its audit.", int(not view["problem"]))


def _judged(health: dict[str, Any]) -> Iterator[Metric]:
    yield _gauge("healthy", "1 unless the fleet is stuck, hung or down.", int(health["healthy"]))
    conditions = {each.value: int(health["condition"] == each) for each in Condition}
    yield _gauge("condition", "1 for the condition of the fleet.", conditions, "condition")
    if health["left"] is not None:
        yield _gauge("rounds_left", "Rounds that are left to do.", health["left"])
    if health["since"] is not None:
        at = datetime.fromisoformat(health["since"]).timestamp()
        yield _gauge("progress_timestamp_seconds", "When something moved last.", at)
        if health["condition"] in (Condition.WAITING, *BAD):
            yield _gauge("wait_timestamp_seconds", "The same, while the fleet waits, is stuck or down.", at)
    problems = {each["about"]: 1 for each in health["problems"]}
    yield _gauge("problem", "1 for what keeps rounds from going on.", problems, "about")


def _waits(run: dict[str, Any]) -> Iterator[Metric]:
    needs = {need.value: int(run["waits_for"] == need) for need in runstate.Need}
    yield _gauge("waits", "1 for what a run waits for.", needs, "need")
    if run["waits_for"] in (Need.DEVICES, Need.SESSION):
        yield _gauge("wait_devices", "Devices that are there, while a run waits.", run["devices"])
        yield _gauge("wait_devices_needed", "Devices that a session needs.", run["needed"])
        yield _gauge("wait_attempt", "Attempt at a session.", run["attempt"])
        yield _gauge("wait_attempts", "Attempts after which the run ends.", run["attempts"])
    if (step := run["step"]) is not None:
        yield _gauge(
            "step_asked", "Devices asked at the step that is under way.", {step["name"]: step["asked"]}, "step"
        )
        needed = {step["name"]: step["needed"]}
        answered = {step["name"]: step["answered"]}
        yield _gauge("step_answers", "Answers to the step that is under way.", answered, "step")
        yield _gauge("step_answers_needed", "Answers with which the step can go on.", needed, "step")
    for name, text in (("devices", "Devices whose owners agreed when asked."), ("needed", "Devices that need to.")):
        counts = {kind: each[name] for kind, each in run["agreed"].items()}
        yield _gauge(f"consent_{name}", text, counts, "kind")
    yield _counter("sessions", "Attempts at a session: made, or what they lacked.", "outcome", run["sessions"])
    text = "Refusals by field or step, and by the version that the device states."
    refusals = CounterMetricFamily(PREFIX + "refusals", text, labels=["kind", "version"])
    for each in run["refusals"]:
        refusals.add_metric([each["kind"], each["version"]], each["count"])
    yield refusals


def _gauge(name: str, text: str, value: Any, label: str | None = None) -> Metric:
    family = GaugeMetricFamily(PREFIX + name, text, labels=[label] if label else [])
    for key, number in (value if label else {"": value}).items():
        family.add_metric([key] if label else [], number)
    return family


def _counter(name: str, text: str, label: str | None, values: dict[str, float]) -> Metric:
    family = CounterMetricFamily(PREFIX + name, text, labels=[label] if label else [])
    for key, number in values.items():
        family.add_metric([key] if label else [], number)
    return family
