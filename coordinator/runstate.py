"""What a run does and waits for, since when, and whether its process lives, in one file of the coordinator's state
directory: the run writes it, everybody else reads it.

``coordinator.health`` makes the verdict of it that every surface shows. The record outlives the run: one that fails, or
is killed, leaves to the next one since when nothing has moved, and what was counted."""

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from aggregation.errors import EdgeAdaptError
from edgeadapt.formats import jsontext, storage
from edgeadapt.formats.jsontext import timestamp

FILE = "run.json"
EVERY = 1.0  # seconds between two writes of what is counted
BEAT = 5.0  # seconds between two signs of life of a run in which nothing else is written
REMIND = 60.0  # seconds between two lines of the log while the run waits
MAX_RECORD = 2**18  # bytes
KINDS = 32  # of refusals
LONGEST = 1000  # characters of an error
VERSIONS = 4  # of one kind: peers that prove nothing state any, and must not push out what others are refused for
_WAIT = ("waits_for", "devices", "needed", "attempt", "attempts", "reason")  # of a wait
log = logging.getLogger("edgeadapt.coordinator")


class Need(StrEnum):
    LEASE = "lease"  # another coordinator leads, as it should
    REVOCATIONS = "revocations"  # the newest revocation list has expired
    DEVICES = "devices"  # too few are connected for an attempt at a session
    SESSION = "session"  # attempts at one are made
    ANSWERS = "answers"  # devices were asked at a step of a round
    INTERVAL = "interval"  # the last sum is not long enough ago, as it should
    EVALUATION = "evaluation"  # all other rounds are done, and the next one of the schedule is not due


IDLE = (Need.LEASE, Need.INTERVAL, Need.EVALUATION)  # waits in which nothing is wrong


class Stopped(EdgeAdaptError):  # noqa: N818  # no error: what runs was asked to stop
    """Ends a run, whose round under way is lost."""


class Ending(StrEnum):
    DONE = "done"  # what there was to do
    STOPPED = "stopped"  # asked to: Ctrl-C, SIGTERM or 'edgeadapt coordinator stop'
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Refusal:
    """Counts refusals of one kind, of devices by the coordinator or of messages by devices. ``text``: of the last one;
    it may name devices. ``cause``: the same without names, for the dashboard; empty where ``kind`` says it."""

    kind: str  # field that was refused, or step that devices refused
    version: str  # of edgeadapt, as the device states it; empty if nothing says it
    count: int
    at: str  # when the last one came, ISO 8601
    text: str
    cause: str = ""


@dataclass(frozen=True, slots=True)
class Agreement:
    """Counts the devices whose owners agree to what a session sums, when it was asked last."""

    devices: int
    asked: int
    needed: int
    at: str  # ISO 8601


@dataclass(frozen=True, slots=True)
class GatewaySnapshot:
    """A gateway at one moment, in numbers.

    ``versions``: version of edgeadapt, as devices state it → how many of the connected have it. ``check_ins``: outcome
    → check-ins since the start: ``admitted``, ``refused``, ``early`` (before their window), ``paced`` (too many at
    once), ``full`` (others have waited longer), ``calls`` (of one device, too many). ``skewed``: connected devices
    whose clocks are off by more than a minute, by that of the gateway.

    ``ends``: reason → ends of sessions of devices since the start: ``left`` (by itself, or its connection broke),
    ``turn`` (it was another device's), ``replaced`` (by a newer connection), ``released`` (the run is over),
    ``answers`` (too many to no request), ``memory`` (too many bytes of answers at once), ``slow``, ``invalid`` (bytes
    that are not a message), ``revoked`` (or expired), ``failed`` (an error of the gateway's)."""

    address: str  # ``HOST:PORT``
    devices: int = 0  # devices that are connected, or may come back
    requests: int = 0  # requests without an answer yet
    versions: Mapping[str, int] = field(default_factory=dict)
    check_ins: Mapping[str, int] = field(default_factory=dict)
    skewed: int = 0
    places: int = 0  # devices that may be connected
    waiting: int = 0  # devices that were sent away and come back
    ends: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StepUnderWay:
    """A step of a round or of the making of a session. ``needed``: fewest answers with which it can go on, or 0 where
    the step does not say; more may come. ``allowed``: seconds that devices have for an answer."""

    name: str
    round: int  # 0: of no round
    asked: int
    needed: int
    answered: int = 0
    allowed: float = 0.0


@dataclass(frozen=True, slots=True)
class RunProcess:
    """The process that makes the rounds, or made the last ones.

    ``beat`` and ``ticks``: its last sign of life, by the calendar, and by the monotonic clock, which all processes of a
    machine share until it starts again. A process that holds the run's lock is compared by ``ticks``: no change of the
    calendar makes it look hung. ``ended``: None while it runs, and for ever if it was killed."""

    pid: int
    began: str  # ISO 8601
    beat: str
    ticks: float
    ended: str | None = None
    ending: Ending | None = None
    error: str = ""  # that it failed with; may name devices
    failures: int = 0  # runs in a row that failed or were killed, without progress, before this one ended


@dataclass(frozen=True, slots=True)
class RunState:
    """The record. ``waits_for``: None while it computes, and before the first run.

    ``since``: when something moved last: a session was made, a round had an answer or ended, or a wait that is as it
    should be began or ended. Attempts that fail do not count. ``since_ticks``: the same, by the monotonic clock."""

    waits_for: Need | None = None
    since: str | None = None  # ISO 8601
    since_ticks: float = 0.0
    devices: int = 0  # that are there, or listed for the attempt
    needed: int = 0
    attempt: int = 0  # at a session, from 1; 0 before the first
    attempts: int = 0  # after which the run ends
    reason: str = ""  # why the last attempt failed; may name devices
    step: StepUnderWay | None = None
    process: RunProcess | None = None  # None before the first run
    sessions: Mapping[str, int] = field(default_factory=dict)  # ``made``, or why not → attempts
    refusals: tuple[Refusal, ...] = ()  # the last one first
    agreed: Mapping[str, Agreement] = field(default_factory=dict)  # by ``RoundTask.CONSENT``
    gateway: GatewaySnapshot | None = None  # while one runs

    def row(self, *, running: bool = True) -> dict[str, Any]:
        """Describe it as ``--json`` has it. ``running``: whether a run is in progress; one that was killed has no
        gateway."""
        row = {**asdict(self), "refusals": [asdict(each) for each in self.refusals]}
        return row if running else row | {"gateway": None}

    @property
    def wait(self) -> str:
        """What is waited for, in words without a device's name; empty if nothing is."""
        if self.waits_for is Need.ANSWERS and self.step is not None:
            return f"waits for answers to {self.step.name} of round {self.step.round}: {_answers(self.step)}"
        if self.waits_for is None:
            return ""
        there = f": {self.devices} devices are there, {self.needed} are needed" if self.needed else ""
        attempt = f", attempt {self.attempt} of {self.attempts}" if self.attempt else ""
        step = f", {self.step.name}: {_answers(self.step)}" if self.step else ""
        return f"{_NAMES[self.waits_for]}{there}{attempt}{step}"


def _answers(step: StepUnderWay) -> str:
    needed = f", {step.needed} are needed" if step.needed else ""
    return f"{step.answered} answered{needed}, {step.asked} were asked"


def lines(row: Mapping[str, Any]) -> Iterator[str]:
    """Say what failed, what was refused, and who is there. ``row``: from ``RunState.row``."""
    if row["reason"]:
        yield f"  the last attempt at a session failed: {row['reason']}"
    for each in row["refusals"]:
        version = f", edgeadapt {each['version']}" if each["version"] else ""
        yield f"  refused {each['count']} times, last at {each['at']} ({each['kind']}{version}): {each['text']}"

    for what, each in row["agreed"].items():
        agreed = f"{each['devices']} of {each['asked']} devices agreed to contribute {what}"
        yield f"{agreed} at {each['at']}, {each['needed']} are needed"
    if gateway := row["gateway"]:
        yield from _of_gateway(gateway)


def _of_gateway(gateway: Mapping[str, Any]) -> Iterator[str]:
    check_ins, ends = (
        ", ".join(f"{count} {name}" for name, count in gateway[which].items()) for which in ("check_ins", "ends")
    )
    clocks = f", {gateway['skewed']} with a wrong clock" if gateway["skewed"] else ""
    yield f"gateway {gateway['address']}: {gateway['devices']} devices{clocks}, check-ins: {check_ins or 'none'}"
    if gateway["waiting"] and gateway["devices"] >= gateway["places"]:
        text = f"{gateway['waiting']} more wait for their turn at {gateway['places']} places"
        yield f"  the gateway is full: {text} (gateway.devices)"
    if ends:
        yield f"  sessions of devices that ended: {ends}"


_NAMES = {
    Need.LEASE: "another coordinator leads, and this one stands by",
    Need.REVOCATIONS: "waits for a newer revocation list",
    Need.DEVICES: "waits for devices",
    Need.SESSION: "makes a session",
    Need.ANSWERS: "waits for answers",
    Need.INTERVAL: "the next session waits for its time",
    Need.EVALUATION: "the next evaluation waits for its time",
}


def _seconds(at: str) -> float:
    return datetime.fromisoformat(at).timestamp()


def read(folder: Path) -> RunState:
    """Read the record of a state directory. One that is missing or damaged says nothing."""
    try:
        return jsontext.decode_as(RunState, storage.read(folder / FILE, MAX_RECORD))
    except (FileNotFoundError, ValidationError):
        return RunState()


@dataclass(slots=True)
class RunRecord:
    """Writes the record, from any thread. A full disk ends no round: what it cannot write is lost."""

    folder: Path
    _state: RunState | None = None  # None: nothing was written yet
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _written: RunState | None = None
    _at: float = 0.0  # when it was written, by the monotonic clock
    _remind: float = 0.0  # when the log is due again, by the monotonic clock
    _look: Callable[[], GatewaySnapshot] | None = None
    _looking: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def living(self, patience: float, orphaned: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Note that a run begins, that its process lives while the block runs, and how that ends. ``patience``: seconds
        after which a run that follows another one begins afresh; a sooner one waits since the one before did.
        ``orphaned``: whether a stop is that of a supervisor which was killed."""
        self._begin(patience)
        over = threading.Event()
        beating = threading.Thread(target=self._beat_until, args=(over,), name="run record", daemon=True)
        beating.start()
        ending, error = Ending.FAILED, ""
        try:
            yield
            ending = Ending.DONE
        except (Stopped, KeyboardInterrupt, SystemExit, GeneratorExit):
            if orphaned():
                error = "'edgeadapt coordinator up' was killed, and its services end with it"
            else:
                ending = Ending.STOPPED
            raise
        except BaseException as failure:
            error = str(failure) or type(failure).__name__
            raise
        finally:
            over.set()
            beating.join()
            self.ended(ending, error)

    def _begin(self, patience: float) -> None:
        with self._lock:
            self._state = before = read(self.folder)  # another process may have written it meanwhile
        now, ticks, pid = time.time(), time.monotonic(), os.getpid()
        last, process = before.process, RunProcess(pid, timestamp(now), timestamp(now), ticks)
        rest: dict[str, Any] = {"waits_for": None, "step": None, "gateway": None, "process": process}
        failed = last is not None and last.ending in (None, Ending.FAILED)  # None: it was killed
        if last is None or not failed or before.since is None or now - _seconds(last.ended or last.beat) > patience:
            self._update(**rest, since=timestamp(now), since_ticks=ticks, reason="")
            return
        rest["process"] = replace(process, failures=last.failures + (last.ended is None), error=last.error)
        # The monotonic clock may have begun again since.
        self._update(**rest, since_ticks=ticks - max(0.0, now - _seconds(before.since)))

    def ended(self, ending: Ending, error: str = "") -> None:
        """Note how a run ended, or why none could begin."""
        now, before = timestamp(time.time()), self._now().process
        last = before or RunProcess(os.getpid(), now, now, time.monotonic())
        first = before is None or (before.ended is not None and before.ending is not Ending.FAILED)
        failures = last.failures + 1 if ending is Ending.FAILED else 0
        process = replace(last, ended=now, ending=ending, error=error[:LONGEST], failures=failures)
        since: dict[str, Any] = {"since": now, "since_ticks": time.monotonic()} if first else {}
        self._update(process=process, waits_for=None, step=None, gateway=None, **since)

    def _beat_until(self, over: threading.Event) -> None:
        with storage.kill_safe():  # what is lost in a power cut is the last seconds
            while True:
                with self._looking, suppress(EdgeAdaptError, OSError):
                    if self._look is not None:
                        self._update(gateway=self._look())
                self._update()
                if over.wait(EVERY):
                    return

    def moved(self, **changes: object) -> None:
        """Note progress, and the end of a wait."""
        self._update(moved=True, **{"waits_for": None, "step": None, "attempt": 0, "reason": "", **changes})

    def waits(self, need: Need, devices: int = 0, needed: int = 0, attempt: int = 0, attempts: int = 0) -> None:
        """Note what the run waits for, with the numbers of now. A wait for devices is logged from time to time; for
        the others there are lines about each attempt."""
        before = self._now()
        turns = before.since is None or (before.waits_for in IDLE) != (need in IDLE)
        facts = {"devices": devices, "needed": needed, "attempt": attempt, "attempts": attempts, "step": None}
        state = self._update(moved=turns, waits_for=need, **facts)
        if need is Need.DEVICES and (before.waits_for is not need or time.monotonic() >= self._remind):
            self._remind = time.monotonic() + REMIND
            log.info("%s", state.wait)

    def asks(self, step: str, number: int, asked: int, needed: int, allowed: float) -> None:
        """Note a step that begins: of round ``number``, in which it is progress; or, if that is 0, of an attempt at a
        session, which is not. Like its answers, the next sign of life writes it: a round has a handful of steps."""
        under_way = StepUnderWay(step, number, asked, needed, 0, allowed)
        with self._lock:
            waits = {"waits_for": Need.ANSWERS, "attempt": 0} if number else {}
            self._state = self._changed(moved=number > 0, step=under_way, **waits)

    def answered(self) -> None:
        """Count an answer to the step under way, of which there may be thousands."""
        with self._lock:
            if (step := (self._state or read(self.folder)).step) is not None:
                counted = replace(step, answered=step.answered + 1)
                self._state = self._changed(moved=step.round > 0, step=counted)

    @contextmanager
    def waiting(self, need: Need) -> Iterator[None]:
        """Note a wait while the block runs, and after it what it interrupted."""
        before = self._now()
        self.waits(need)
        try:
            yield
        finally:
            self._update(**{name: getattr(before, name) for name in _WAIT})

    def failed(self, outcome: str, reason: str) -> None:
        """Count an attempt at a session that failed. ``outcome``: one of few; ``reason``: for the operator."""
        self._update(reason=reason, sessions=_counted(self._now().sessions, outcome))

    def made(self) -> None:
        self.moved(sessions=_counted(self._now().sessions, "made"))

    def agreed(self, what: str, devices: int, asked: int, needed: int) -> None:
        """Note how many owners agree to a kind of session: the others are not there for it."""
        now = Agreement(devices, asked, needed, timestamp(time.time()))
        self._update(agreed={**self._now().agreed, what: now}, devices=devices)

    def leads(self) -> None:
        """End a wait for the lease; one for devices, of a run before, goes on."""
        if self._now().waits_for is Need.LEASE:
            self.moved()

    def refused(self, kind: str, version: str, text: str, cause: str = "") -> None:
        """Count a refusal. The next change writes it: peers that prove nothing make the disk no work."""
        with self._lock:
            state = self._state or read(self.folder)
            same = [each for each in state.refusals if (each.kind, each.version) == (kind, version)]
            count = 1 + sum(each.count for each in same)
            kept = [Refusal(kind, version, count, timestamp(time.time()), text, cause)]
            for each in state.refusals:
                if each not in same and sum(one.kind == each.kind for one in kept) < VERSIONS:
                    kept.append(each)
            self._state = replace(state, refusals=tuple(kept[:KINDS]))

    @contextmanager
    def observing(self, look: Callable[[], GatewaySnapshot]) -> Iterator[None]:
        """Have what a gateway says about itself in the record while the block runs, in a run that is ``living``."""
        self._look = look
        try:
            yield
        finally:
            with self._looking:
                self._look = None
            self._update(gateway=None)

    def _now(self) -> RunState:
        with self._lock:
            return self._state or read(self.folder)

    def _update(self, *, moved: bool = False, **changes: object) -> RunState:
        """Change the record, and write it if that is due. ``moved``: the change is progress."""
        with self._lock:
            state = self._state = self._changed(moved=moved, **changes)
            process, ticks = state.process, time.monotonic()
            lives = process is not None and process.ended is None
            if state == self._written and not (lives and ticks - self._at >= BEAT):
                return state
            if process is not None and lives:
                beat = replace(process, beat=timestamp(time.time()), ticks=ticks)
                state = self._state = replace(state, process=beat)
            with suppress(OSError):
                storage.replace(self.folder / FILE, json.dumps(asdict(state)).encode(), storage.PUBLIC)
                self._written, self._at = state, ticks
            return state

    def _changed(self, *, moved: bool, **changes: object) -> RunState:
        state = self._state or read(self.folder)
        if moved:
            changes = {"since": timestamp(time.time()), "since_ticks": time.monotonic(), **changes}
            if state.process is not None and (state.process.failures or state.process.error):
                changes = {"process": replace(state.process, failures=0, error=""), **changes}
        return replace(state, **changes)  # type: ignore[arg-type]


def _counted(counts: Mapping[str, int], name: str) -> dict[str, int]:
    return {**counts, name: counts.get(name, 0) + 1}
