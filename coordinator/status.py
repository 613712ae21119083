"""The state of a federation, read from the coordinator's state directory: versions, rounds, dropouts, last session.
Nothing in a log is verified here; ``edgeadapt audit`` does that."""

import math
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from aggregation import envelope
from aggregation.errors import ConfigError, EdgeAdaptError, ProtocolError
from aggregation.messages import Shares
from aggregation.steps import Step
from aggregation.transcript.entries import MAGIC, Abort, Checkpoint, Entry, Result, Stage, read
from aggregation.transcript.log import ANSWERS, REQUESTS
from coordinator import health, runstate
from coordinator.expiry import expiries
from coordinator.health import Condition
from coordinator.schedule import evaluations, next_evaluation
from coordinator.services import deployment
from coordinator.settings import SETTINGS, FederationSettings
from coordinator.statedir import CoordinatorStateDir
from edgeadapt.auditing.transcripts import logs
from edgeadapt.formats import storage
from edgeadapt.formats.jsontext import optional_timestamp
from edgeadapt.formats.manifest import RoundRecord, VersionManifest
from edgeadapt.formats.registryfiles import TRANSCRIPT
from edgeadapt.releases import drift

_REQUESTS = {kind.TAG: step for step, kind in REQUESTS.items()}
_ANSWERS = {kind.TAG: step for step, kind in ANSWERS.items()}
_ENDINGS = (Result.TAG, Abort.TAG)


@dataclass(slots=True)
class SessionProgress:
    log: str  # file name
    began: int | None = None  # when it was offered, in seconds since 1970; None before that
    latest: int | None = None  # last time in the log
    devices: int = 0  # how many established the session
    round: int = 0  # counted in the session from 1; 0 before the first
    step: Step | None = None  # under way; None between rounds
    answered: int = 0  # devices that answered the step
    closed: bool = False

    def as_json(self) -> dict[str, Any]:
        step = None if self.step is None else {"name": self.step.value, "answered": self.answered}
        times = {"began": optional_timestamp(self.began), "latest": optional_timestamp(self.latest)}
        counts = {"devices": self.devices, "rounds": self.round}
        return {"log": self.log, **times, **counts, "step": step, "closed": self.closed}

    def add(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            if entry.at is not None:
                self.began, self.latest = self.began or entry.at, entry.at
            self.round = max(self.round, entry.round)
            self.devices += entry.kind == Shares.TAG
            if entry.kind in _ENDINGS:
                self.step, self.answered = None, 0
            elif entry.kind == Checkpoint.TAG:
                self.closed = _closes(entry)
                self.step = None if self.closed else self.step
            elif (step := _REQUESTS.get(entry.kind)) is not None and step is not self.step:
                self.step, self.answered = step, 0
            elif entry.kind in _ANSWERS and _ANSWERS[entry.kind] is self.step:
                self.answered += 1


@dataclass(slots=True)
class LogFollower:
    """Reads what was added to the newest log since the last call."""

    folder: Path  # holds the transcripts
    _progress: SessionProgress | None = None
    _end: int = 0  # bytes read

    def look(self) -> SessionProgress | None:
        """Read the progress of the newest session, if any. Raises DataError: the log is too large, or not a file."""
        if not (paths := logs(self.folder)):
            return None
        newest = paths[-1]
        if self._progress is None or self._progress.log != newest.name or newest.stat().st_size < self._end:
            self._progress, self._end = SessionProgress(newest.name), 0
        with storage.opened(newest) as (file, size):
            file.seek(self._end)
            added = file.read(size - self._end)
        reading = read(added if self._end == 0 else MAGIC + added)
        self._progress.add(reading.entries)
        self._end += reading.end - (len(MAGIC) if self._end else 0)
        return self._progress


def _closes(entry: Entry) -> bool:
    try:
        return Checkpoint.decode(envelope.unverified_body(entry.message)).stage is Stage.CLOSED
    except ProtocolError:
        return False


class StuckError(EdgeAdaptError):
    exit_code = 7


def require_health(health: Mapping[str, Any]) -> None:
    """Check a verdict, as ``Verdict.row`` has it. Raises StuckError: it is not healthy."""
    if not health["healthy"]:
        raise StuckError(f"{health_line(health)}: {health['remedy']}", about=f"health.{health['condition']}")


def health_line(health: Mapping[str, Any]) -> str:
    since = f", and nothing has moved since {health['since']}" if health["since"] else ""
    minutes = f" ({health['seconds'] / 60:.0f} minutes)" if since else ""
    quiet = health["condition"] in (Condition.STUCK, Condition.WAITING, Condition.HUNG)
    return f"{health['condition']}: {health['text']}{f'{since}{minutes}' if quiet else ''}"


OF_VERSION = ("version", "round", "sha256")
OF_ROUND = ("round", "dropped", "aborted", "spoiled", "metrics", "epsilon", "version")
COSTS = ("bytes_up", "bytes_down", "seconds")  # of a round
LISTED = 10  # rounds, the last ones, of a status in text
SUSPICIOUS = 0.01  # probability
GAP = "  "
COLUMNS = {  # name in the table of rounds → heading, which is as wide as the cells
    "round": "round",
    "version": "version",
    "survivors": "survivors",
    "dropouts": "dropouts",
    "accuracy": "accuracy",
    "loss": "  loss",
    "seconds": "seconds",
    "ended": "ended               ",
}


def status_of(state_dir: CoordinatorStateDir, patience: float | None = None) -> dict[str, Any]:
    """Collect the object that ``edgeadapt coordinator status --json`` prints. ``patience``: seconds without progress
    that are healthy, instead of those of the settings. Raises EdgeAdaptError: as ``Registry.versions`` and
    ``Registry.rounds``; or the last log is too large, or not a file."""
    rounds, progress = state_dir.registry.rounds(), LogFollower(state_dir.folder / TRANSCRIPT).look()
    manifests = [version.manifest for version in state_dir.registry.versions()]
    return {
        "state": str(state_dir.folder),
        "key": state_dir.key.public.key_id,
        "authority": state_dir.root.fingerprint,
        **operation_of(state_dir, patience),
        **counts_of(rounds),
        "versions": [
            {**{name: getattr(each, name) for name in OF_VERSION}, "bytes": each.size, "labels": len(each.labels)}
            for each in manifests
        ],
        "drift": drift_of(manifests),
        "rounds": [round_row(record) for record in rounds],
        "farthest": farthest(rounds),
        "last_session": progress and progress.as_json(),
    }


def operation_of(state_dir: CoordinatorStateDir, patience: float | None = None) -> dict[str, Any]:
    now, settings, records = datetime.now(UTC), _settings(state_dir), state_dir.registry.rounds()
    how, ends = settings.evaluation, expiries(state_dir.folder, now)
    following = next_evaluation(state_dir.folder, how, records) if how.every else None
    wanted = settings.rounds + (evaluations(records) if how.every else 0)
    run, running, judged = health.of_federation(state_dir, settings, records, wanted, ends, patience)
    return {
        "health": judged.row(),
        "running": running,
        "run": run.row(running=running),
        "lease": lease_of(state_dir),
        "services": deployment.running(state_dir.folder),
        "expiries": ends,
        "rounds_wanted": wanted,
        "evaluation": following and {"due": following.due and following.due.isoformat(), "text": following.text},
    }


def _settings(state_dir: CoordinatorStateDir) -> FederationSettings:
    """Read the settings again: a dashboard outlives changes of them. While they are refused, those of before count."""
    try:
        return FederationSettings.read(state_dir.folder / SETTINGS)
    except (EdgeAdaptError, OSError):
        return state_dir.settings


def counts_of(rounds: Sequence[RoundRecord]) -> dict[str, Any]:
    return {
        "rounds_done": len(rounds),
        "rounds_aborted": sum(record.aborted is not None for record in rounds),
        "device_rounds": sum(len({*record.survivors, *record.dropped}) for record in rounds),
        "dropouts_by_step": dict(Counter(step for record in rounds for step in record.dropped.values())),
    }


def drift_of(manifests: Sequence[VersionManifest]) -> dict[str, Any] | None:
    """Summarize the last observation, and compare it with the one before; None if there is none. ``changed`` is None
    where the two say nothing."""
    last = next(filter(drift.is_observation, reversed(manifests)), None)
    if last is None:
        return None
    seen, observed = drift.Observed.of(last, last), dict[str, str]()
    row: dict[str, Any] = {"rounds": [], "changed": None, "histograms": []}
    try:
        observed = {histogram: seen.summary(histogram) for histogram in seen.histograms}
        row = drift.compare(*drift.observations(manifests)).row()
    except ConfigError as error:
        row["text"] = str(error)
    lines = [f"observed {histogram}: {text}" for histogram, text in observed.items()]
    return row | {"observed": observed, "text": "\n".join([*lines, row["text"]])}


def lines_of(status: dict[str, Any]) -> Iterator[str]:
    yield f"{status['state']}: key {status['key']}, authority {status['authority'][:16]}"
    yield from _verdict_lines(status["health"], running=status["running"])
    if lease := status["lease"]:
        leads = "leads" if lease["in_force"] else "led last, and nobody leads now"
        own = " (this directory)" if lease["own"] else ""
        yield f"{lease['leader']}{own} {leads}, epoch {lease['epoch']}"
    said = {each["about"] for each in status["health"]["problems"]}
    yield from (row["warning"] for name, row in status["expiries"].items() if row["warning"] and name not in said)
    if services := status["services"]:
        yield f"services run since {services['since']}, process {services['pid']}"
        for service in services["services"]:
            at = f" at {service['address']}" if service["address"] else ""
            process = f", process {service['pid']}" if service["pid"] else ""
            yield f"  {service['name']}{at}: {service['state']}{process}, {service['restarts']} restarts"
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
    lead = status["lease"] is None or status["lease"]["own"] or not status["lease"]["in_force"]
    state = "" if not status["running"] else ", a run is in progress" if lead else ", a run waits to take over"
    state = state if status["running"] or done >= wanted else ", no run is in progress"
    yield f"rounds {done} of {wanted}, {aborted} aborted{state}"
    yield from [status["evaluation"]["text"]] if status["evaluation"] else []
    yield from runstate.lines(status["run"])
    yield from status["drift"]["text"].splitlines() if status["drift"] else ()
    yield f"dropouts {count} of {status['device_rounds']} device-rounds{f': {at}' if at else ''}"
    if session := status["last_session"]:
        state, step = "closed" if session["closed"] else "not closed", session["step"]
        if step and status["running"]:
            state = f"{step['name']} answered by {step['answered']}"
        times = f", {session['began']} to {session['latest']}" if session["began"] else ""
        yield f"last session {session['log']}{times}: {session['devices']} devices, {session['rounds']} rounds, {state}"
    yield from _last_rounds(status["rounds"])
    if status["farthest"]:
        yield ""
        yield "devices whose groups were farthest from the combination, more often than chance (a hint, no proof):"
    for device, row in status["farthest"].items():
        yield f"{device}: {row['farthest']} of {row['rounds']} rounds, which has a chance of {row['chance']:.2g}"


def _last_rounds(rounds: Sequence[dict[str, Any]]) -> Iterator[str]:
    if rounds:
        yield ""
        yield heading()
    if (earlier := len(rounds) - LISTED) > 0:
        yield f"{earlier} rounds before these: 'edgeadapt coordinator status DIR --rounds' lists all"
    for row in rounds[-LISTED:]:
        yield from round_lines(row)


def _verdict_lines(judged: Mapping[str, Any], *, running: bool) -> Iterator[str]:
    yield health_line(judged)
    if judged["remedy"]:
        yield f"  do: {judged['remedy']}"
    if judged["error"]:
        yield f"  the {'run before this one' if running else 'last run'} failed: {judged['error']}"
    for problem in judged["problems"][1:]:
        yield f"  {problem['about']}: {problem['text']}"


def heading(width: int = 0) -> str:
    return GAP.join(COLUMNS[name] for name in _columns(width)).rstrip()


def round_lines(row: dict[str, Any], width: int = 0) -> list[str]:
    """Format a round, as ``round_row`` gives it, under ``heading``. For a terminal of ``width`` columns, those that do
    not fit are left out, and notes that do not fit follow on lines of their own; 0: all is on one line."""
    accuracy, loss = (row["metrics"].get(name) for name in ("accuracy", "loss"))
    cells = {
        "round": str(row["round"]),
        "version": "-" if row["version"] is None else str(row["version"]),
        "survivors": str(len(row["survivors"])),
        "dropouts": str(len(row["dropped"])),
        "accuracy": "-" if accuracy is None else format(accuracy, ".3f"),
        "loss": "-" if loss is None else format(loss, ".3f"),
        "seconds": format(row["seconds"], ".1f"),
        "ended": row["ended"] or "-",
    }
    line = GAP.join(cells[name].rjust(len(COLUMNS[name])) for name in _columns(width))
    notes = [f"epsilon {row['epsilon']:.3f}"] if row["epsilon"] is not None else []
    notes += [f"{name}: {row[name]}" for name in ("aborted", "spoiled") if row[name]]
    whole = GAP.join([line, *notes])
    if not width or len(whole) <= width:
        return [whole]
    indent = " " * len(COLUMNS["round"]) + GAP
    return [line, *textwrap.wrap(GAP.join(notes), max(width, 20), initial_indent=indent, subsequent_indent=indent)]


def _columns(width: int) -> list[str]:
    chosen = list(COLUMNS)
    for name in ("ended", "loss", "version", "seconds", "dropouts"):
        if width and len(GAP.join(COLUMNS[each] for each in chosen)) > width:
            chosen.remove(name)
    return chosen


def farthest(records: Iterable[RoundRecord]) -> dict[str, dict[str, float]]:
    """Find devices whose groups were the farthest from the combination more often than chance, the least likely first.

    In each round with groups one is the farthest; a device is in it with a probability of one over their number if it
    is like all others, and rounds deal again. A device is listed if its number of such rounds or more has a probability
    below ``SUSPICIOUS``. That is a hint for the operator, not a proof: of a hundred honest devices, one is listed.
    Returns device → ``rounds`` with groups that it is in, ``farthest``: in how many its group was, and ``chance``."""
    likely: dict[str, list[float]] = {}  # device → probability of each number of rounds in the farthest group
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


def device_rows(records: Iterable[RoundRecord]) -> list[dict[str, Any]]:
    """List the devices of the rounds, those first that have been in no sum for the longest. Each has ``sums``: rounds
    whose sum it is in, ``round`` and ``ended`` of the last of them (None: it is in none), and ``dropped``: step →
    rounds in which it dropped out there. A device that never joined a session is not known here."""
    rows: dict[str, dict[str, Any]] = {}
    for record in records:
        for device in (*record.survivors, *record.dropped):
            rows.setdefault(device, {"device": device, "sums": 0, "round": None, "ended": None, "dropped": Counter()})
        for device in record.survivors if record.aborted is None else ():
            last = {"round": record.round, "ended": optional_timestamp(record.ended)}
            rows[device] |= {"sums": rows[device]["sums"] + 1, **last}
        for device, step in record.dropped.items():
            rows[device]["dropped"][step] += 1
    return sorted(rows.values(), key=lambda row: (row["round"] or 0, row["device"]))


def device_lines(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    width = max(len(row["device"]) for row in [{"device": "device"}, *rows])
    yield f"{'device':{width}}  sums  last  ended                 dropped out"
    for row in rows:
        dropped = ", ".join(f"{count} at {step}" for step, count in row["dropped"].items())
        last = f"{row['round'] or '-':>4}  {row['ended'] or '-':20}"
        yield f"{row['device']:{width}}  {row['sums']:>4}  {last}  {dropped}".rstrip()


def lease_of(state_dir: CoordinatorStateDir) -> dict[str, Any] | None:
    """Describe who leads, of several coordinators with one registry; None if nobody did. Raises as ``leadership``."""
    leader = state_dir.leadership()
    if leader is None:
        return None
    return asdict(leader) | {"own": leader.leader == state_dir.name and not state_dir.waits()}


def round_row(record: RoundRecord) -> dict[str, Any]:
    lists = {"groups": [asdict(group) for group in record.groups], "survivors": list(record.survivors)}
    row = {name: getattr(record, name) for name in (*OF_ROUND, *COSTS)}
    return {**row, **lists, "ended": optional_timestamp(record.ended)}
