"""The verdict on a federation: whether it moves, what it waits for, since when, and what to do.

``verdict`` is a pure function of the record that the run writes (``runstate``), of what is around it, and of the time.
``edgeadapt coordinator status``, its exit code, the dashboard, the metrics and the probes of containers all show this
one verdict. Rules:

* Time without progress is measured by the monotonic clock while a process holds the run's lock, which all processes of
  the machine share; a change of the calendar makes nothing look stuck. The kernel frees the lock of a dead process, so
  a number of a process that was given to another one deceives nobody.
* A step of a round is stuck after the patience, but not before the time that devices have for an answer.
* A wait that is as it should be (``IDLE``) is healthy however long it takes, if its process lives.
* A run that was killed, or that failed and that nothing starts again, is down at once; one that was stopped on purpose,
  after the patience. Where rounds were added later, the patience begins then."""

import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from aggregation.errors import EdgeAdaptError
from aggregation.pki.certificates import to_der
from aggregation.pki.tls import verify_tls
from coordinator import runstate
from coordinator.runstate import IDLE, Ending, Need, RunProcess, RunState
from coordinator.settings import SERVICES, SETTINGS, FederationSettings, ServiceSettings
from coordinator.statedir import LOCK, SERVICES_LOCK, TLS_REQUEST, CoordinatorStateDir
from edgeadapt.formats import storage
from edgeadapt.formats.keyfiles import TLS_CERTIFICATE, tls_pair
from edgeadapt.formats.manifest import RoundRecord

HUNG = 60.0  # seconds without a sign of life, which comes every ``runstate.BEAT``
FAILURES = 3  # runs in a row that fail without progress
ABORTS = 3  # rounds in a row without a version
LEAST_DISK = 2**20  # bytes
DISK = "disk"  # what a problem is about
START = "start it: 'edgeadapt coordinator up DIR', or 'run'"


class Condition(StrEnum):
    NEW = "new"  # no run has begun
    DONE = "done"  # no round is left
    MOVING = "moving"
    IDLE = "idle"  # waits as it should
    WAITING = "waiting"  # not for too long yet
    STOPPED = "stopped"  # on purpose, not long ago
    STUCK = "stuck"
    HUNG = "hung"  # the process of the run shows no sign of life
    DOWN = "down"  # nothing runs, and rounds are left


BAD = (Condition.STUCK, Condition.HUNG, Condition.DOWN)


@dataclass(frozen=True, slots=True)
class Problem:
    """Keeps rounds from going on until somebody acts. ``about``: a file's name, or ``disk``; ``text`` names no
    device."""

    about: str
    text: str


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a verdict needs besides the record.

    ``running``: a process holds the lock of the run. ``supervised``: ``up`` runs, which starts runs again. ``left``:
    rounds to do; None if that is not known, which counts as some. ``scheduled``: more come by a schedule. ``since``:
    when the settings, and with them the rounds, changed last. ``aborted``: rounds in a row without a version, the last
    ones, and ``reason`` of the last."""

    running: bool
    supervised: bool
    left: int | None
    patience: float  # seconds
    deadlines: bool = True  # whether a step also has the time that devices have for an answer
    scheduled: bool = False
    since: datetime | None = None
    aborted: int = 0
    reason: str = ""
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True, slots=True)
class Verdict:
    """``text`` and ``remedy`` name no device, and say the same as long as nothing changes; ``error`` may name some.
    ``seconds``: since something moved last. ``restart``: whether another process would help, as a probe asks."""

    condition: Condition
    text: str
    remedy: str = ""
    since: str | None = None  # when something moved last, ISO 8601
    seconds: float = 0.0
    left: int | None = None
    error: str = ""  # that the last run failed with
    problems: tuple[Problem, ...] = ()
    restart: bool = False

    @property
    def healthy(self) -> bool:
        return self.condition not in BAD

    def row(self) -> dict[str, Any]:
        """Describe it as ``--json`` has it."""
        row = {**asdict(self), "problems": [asdict(each) for each in self.problems]}
        return {"healthy": self.healthy, **row}


def verdict(state: RunState, around: Surroundings, now: datetime, ticks: float) -> Verdict:
    """Judge a run. ``ticks``: the monotonic clock of this machine, in seconds."""
    process = state.process
    if around.left == 0 and not around.scheduled:
        return Verdict(Condition.DONE, "all rounds are done", since=state.since, left=0)
    judged = _of_process(process, state, around, now, ticks) if around.running else _of_none(process, around, now)
    age = _age(state, around, now, ticks)
    if judged is None:
        judged = _of_progress(state, around, age)
    condition, text, remedy, restart = judged
    if around.problems and condition is not Condition.NEW:
        condition, restart = Condition.STUCK, False
        text, remedy = f"{around.problems[0].text} ({text})", "correct that"
    since, error = state.since, process.error if process else ""
    return Verdict(condition, text, remedy, since, age, around.left, error, around.problems, restart)


Judged = tuple[Condition, str, str, bool]  # the last one: whether a restart helps


def _of_process(
    process: RunProcess | None, state: RunState, around: Surroundings, now: datetime, ticks: float
) -> Judged | None:
    """Judge whether the process that holds the lock lives; None if it does."""
    if process is None or process.ended is not None:  # it has just taken the lock, or is another command
        return Condition.MOVING, "a run begins or ends", "", False
    if ticks - process.ticks > HUNG:
        text = f"process {process.pid}, which makes the rounds, shows no sign of life since {process.beat}"
        remedy = f"see whether it hangs, or cannot write to DIR; 'kill -9 {process.pid}' ends it, and 'up' goes on"
        return Condition.HUNG, text, remedy, True
    if process.failures >= FAILURES:
        return _failing(process)
    return None


def _failing(process: RunProcess) -> Judged:
    text = f"{process.failures} runs in a row failed or were killed without progress"
    return Condition.STUCK, text, "see the error, and the log of 'up'", False


def _of_progress(state: RunState, around: Surroundings, age: float) -> Judged:
    """Judge a run whose process lives by what it waits for, and how long nothing has moved."""
    text = state.wait or "works on a round"
    if state.waits_for in IDLE:
        return Condition.IDLE, text, "", False
    if around.aborted >= ABORTS:
        text = f"the last {around.aborted} rounds made no version: {around.reason}"
        return Condition.STUCK, text, "see the log, and what devices refused", False
    answers = state.waits_for is Need.ANSWERS and state.step is not None
    allowed = state.step.allowed if answers and around.deadlines and state.step else 0.0
    limit = max(around.patience, allowed)
    if age > limit:
        return Condition.STUCK, text, _REMEDIES.get(state.waits_for, "see the log of 'up'"), False
    first = state.waits_for is Need.SESSION and state.attempt <= 1
    return Condition.MOVING if answers or first or state.waits_for is None else Condition.WAITING, text, "", False


_REMEDIES: dict[Need | None, str] = {
    Need.REVOCATIONS: "let the authority sign a new list ('edgeadapt authority revoke DIR'), and copy it",
    Need.DEVICES: "see whether agents run and reach the gateway: their logs say why not",
    Need.SESSION: "see what was refused, and the logs of the agents",
    Need.ANSWERS: "see whether the agents still run; the log of 'up' names those that are silent",
}


def _of_none(process: RunProcess | None, around: Surroundings, now: datetime) -> Judged:
    """Judge a federation of which no run is in progress."""
    if process is None:
        text = "services begin" if around.supervised else "no run has begun"
        return (
            Condition.WAITING if around.supervised else Condition.NEW,
            text,
            "" if around.supervised else START,
            False,
        )
    quiet = (now - _latest(process.ended or process.beat, around.since)).total_seconds()
    if around.supervised:
        if process.failures >= FAILURES:
            return _failing(process)
        if quiet > around.patience:
            text = "'up' runs, and has started no round"
            return Condition.HUNG, text, "see its log; stop it, and start it again", True
        if around.left is None and process.ending is Ending.DONE:  # and waits for more
            return Condition.DONE, "a run ended with nothing left to do", "", False
        return Condition.WAITING, "'up' starts the rounds again", "", False
    if process.ended is None:
        text = f"the run was killed, or the machine went down, at about {process.beat}"
        return Condition.DOWN, f"nothing runs: {text}", START, True
    if process.ending is Ending.FAILED:
        return Condition.DOWN, f"nothing runs: the run failed at {process.ended}", f"see the error; then {START}", True
    text = f"nothing runs: the run ended at {process.ended}, and rounds are left"
    return Condition.STOPPED if quiet <= around.patience else Condition.DOWN, text, START, True


def _latest(at: str, other: datetime | None) -> datetime:
    found = datetime.fromisoformat(at)
    return found if other is None else max(found, other)


def _age(state: RunState, around: Surroundings, now: datetime, ticks: float) -> float:
    if state.since is None:
        return 0.0
    if around.running and state.process is not None and state.process.ended is None:
        return max(0.0, ticks - state.since_ticks)
    return max(0.0, (now - datetime.fromisoformat(state.since)).total_seconds())


LOOKS = 5  # at a lock, until it is the same before and after the record was read


def seen(folder: Path) -> tuple[RunState, bool, bool]:
    """Read the record of a state directory, whether a run holds it, and whether ``up`` runs. A run that ends meanwhile
    is not taken for one that was killed."""
    for _ in range(LOOKS):
        running = storage.is_locked(folder / LOCK)
        state, supervised = runstate.read(folder), storage.is_locked(folder / SERVICES_LOCK)
        if storage.is_locked(folder / LOCK) == running:
            break
    return state, running, supervised


def of_process(folder: Path) -> Verdict:
    """Judge whether another process would help, without the registry, whose database may be away."""
    state, running, supervised = seen(folder)
    try:
        patience = FederationSettings.read(folder / SETTINGS).stuck_after
    except EdgeAdaptError:  # which keeps runs from beginning, and another process as well
        patience = FederationSettings().stuck_after
    problems = tuple(_of_disk(folder))
    around = Surroundings(running, supervised, None, patience, problems=problems)
    return verdict(state, around, datetime.now(UTC), time.monotonic())


def of_federation(
    state_dir: CoordinatorStateDir,
    settings: FederationSettings,
    records: tuple[RoundRecord, ...],
    wanted: int,
    ends: Mapping[str, Mapping[str, Any]],
    patience: float | None = None,
) -> tuple[RunState, bool, Verdict]:
    """Judge a federation as it is now; return its record, and whether a run is in progress, as well. ``wanted``:
    rounds in all, ``ends``: from ``expiry.expiries``, ``patience``: instead of that of the settings, and of the time
    that devices have for an answer."""
    folder, now = state_dir.folder, datetime.now(UTC)
    state, running, supervised = seen(folder)
    aborted = next((n for n, record in enumerate(reversed(records)) if record.aborted is None), len(records))
    around = Surroundings(
        running,
        supervised,
        max(0, wanted - len(records)),
        settings.stuck_after if patience is None else patience,
        patience is None,
        settings.evaluation.every > 0,
        datetime.fromtimestamp((folder / SETTINGS).stat().st_mtime, UTC),
        aborted,
        (records[-1].reason or "") if aborted else "",
        (*_of_disk(folder), *_of_tls(state_dir, now), *_of_lists(ends, now)),
    )
    return state, running, verdict(state, around, now, time.monotonic())


def _of_disk(folder: Path) -> Iterator[Problem]:
    if shutil.disk_usage(folder).free < LEAST_DISK:
        yield Problem(DISK, "the disk of the state directory is full: free some space")


def _of_tls(state_dir: CoordinatorStateDir, now: datetime) -> Iterator[Problem]:
    """Check the TLS certificate as a start of the services would, where there are any."""
    folder = state_dir.folder
    try:
        services = ServiceSettings.read(folder / SERVICES) if (folder / SERVICES).exists() else ServiceSettings()
        if not (services.gateway or services.superlink):
            return
        _, certificate = tls_pair(folder, f"let the authority certify {TLS_REQUEST}", rename=False)
        verify_tls(state_dir.root, to_der(certificate), now)
    except EdgeAdaptError as error:
        yield Problem(TLS_CERTIFICATE, str(error).replace(f"{folder}/", ""))
    except OSError as error:
        yield Problem(TLS_CERTIFICATE, f"{TLS_CERTIFICATE} cannot be read: {error.strerror or error}")


def _of_lists(ends: Mapping[str, Mapping[str, Any]], now: datetime) -> Iterator[Problem]:
    for name, row in ends.items():
        if name != TLS_CERTIFICATE and (row["until"] is None or datetime.fromisoformat(row["until"]) < now):
            yield Problem(name, row["warning"] or f"{name} has ended")
