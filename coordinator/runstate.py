"""What a run waits for, in one file of the coordinator's state directory: the run writes it, everybody else reads it.

``edgeadapt coordinator status``, its exit code, the dashboard and the metrics render this record. It outlives the run:
one that fails leaves to the next one since when the fleet has waited, and what was counted. A run that is stopped on
purpose waits no more."""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from edgeadapt.formats import jsontext, storage
from edgeadapt.formats.jsontext import timestamp

FILE = "run.json"
EVERY = 1.0  # seconds between two writes of what a gateway counts
REMIND = 60.0  # seconds between two lines of the log while the run waits
MAX_RECORD = 2**18  # bytes
KINDS = 32  # of refusals
VERSIONS = 4  # of one kind: peers that prove nothing state any, and must not push out what others are refused for
_WAIT = ("waits_for", "since", "devices", "needed", "attempt", "attempts", "reason")  # of a wait
log = logging.getLogger("edgeadapt.coordinator")


class Need(StrEnum):
    LEASE = "lease"  # another coordinator leads, as it should
    REVOCATIONS = "revocations"  # the newest revocation list has expired
    DEVICES = "devices"  # too few are connected for an attempt at a session
    SESSION = "session"  # attempts at one are made
    INTERVAL = "interval"  # the last sum is not long enough ago, as it should


IDLE = (Need.LEASE, Need.INTERVAL)  # waits in which nothing is wrong


@dataclass(frozen=True, slots=True)
class Refusal:
    """Counts refusals of one kind, of devices by the coordinator or of messages by devices. ``text``: of the last."""

    kind: str  # field that was refused, or step that devices refused
    version: str  # of edgeadapt, as the device states it; empty if nothing says it
    count: int
    at: str  # when the last one came, ISO 8601
    text: str


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
    once), ``full``. ``skewed``: connected devices whose clocks are off by more than a minute, by that of the gateway.
    """

    address: str  # ``HOST:PORT``
    devices: int = 0  # devices that are connected, or may come back
    requests: int = 0  # requests without an answer yet
    versions: Mapping[str, int] = field(default_factory=dict)
    check_ins: Mapping[str, int] = field(default_factory=dict)
    skewed: int = 0


@dataclass(frozen=True, slots=True)
class RunState:
    """The record. ``waits_for``: None while rounds go on, and before the first run."""

    waits_for: Need | None = None
    since: str | None = None  # when the wait began, ISO 8601; one for devices goes on as one for a session
    devices: int = 0  # that are there, or listed for the attempt
    needed: int = 0
    attempt: int = 0  # at a session, from 1; 0 before the first
    attempts: int = 0  # after which the run ends
    reason: str = ""  # why the last attempt failed; may name devices
    sessions: Mapping[str, int] = field(default_factory=dict)  # ``made``, or why not → attempts
    refusals: tuple[Refusal, ...] = ()  # the last one first
    agreed: Mapping[str, Agreement] = field(default_factory=dict)  # by ``RoundTask.CONSENT``
    gateway: GatewaySnapshot | None = None  # while one runs

    def row(self, now: datetime, *, running: bool = True) -> dict[str, Any]:
        """Describe it as ``--json`` has it. ``waited``: for how many seconds the fleet has waited for devices or a
        session; 0 if it does not. ``running``: whether a run is in progress; one that was killed has no gateway."""
        waits = self.since is not None and self.waits_for not in (None, *IDLE)
        waited = (now - datetime.fromisoformat(self.since or "")).total_seconds() if waits else 0.0
        row = {**asdict(self), "refusals": [asdict(each) for each in self.refusals], "waited": max(0.0, waited)}
        return row if running else row | {"gateway": None}


def lines(row: Mapping[str, Any]) -> Iterator[str]:
    """Say what a run waits for, and what was refused. ``row``: from ``RunState.row``."""
    if row["waits_for"] is not None:
        since = f"since {row['since']}" + (f", {row['waited'] / 60:.0f} minutes" if row["waited"] else "")
        there = f": {row['devices']} of {row['needed']} devices are there" if row["needed"] else ""
        attempt = f", attempt {row['attempt']} of {row['attempts']}" if row["attempt"] else ""
        yield f"waits for {_NAMES[row['waits_for']]} {since}{there}{attempt}"
    if row["reason"]:
        yield f"  the last attempt failed: {row['reason']}"
    for each in row["refusals"]:
        version = f", edgeadapt {each['version']}" if each["version"] else ""
        yield f"  refused {each['count']} times, last at {each['at']} ({each['kind']}{version}): {each['text']}"

    for what, each in row["agreed"].items():
        agreed = f"{each['devices']} of {each['asked']} devices agreed to contribute {what}"
        yield f"{agreed} at {each['at']}, {each['needed']} are needed"
    if gateway := row["gateway"]:
        outcomes = ", ".join(f"{count} {outcome}" for outcome, count in gateway["check_ins"].items())
        clocks = f", {gateway['skewed']} with a wrong clock" if gateway["skewed"] else ""
        yield f"gateway {gateway['address']}: {gateway['devices']} devices{clocks}, check-ins: {outcomes or 'none'}"


_NAMES = {
    Need.LEASE: "the lease",
    Need.REVOCATIONS: "a newer revocation list",
    Need.DEVICES: "devices",
    Need.SESSION: "a session",
    Need.INTERVAL: "the end of the interval",
}


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
    _written: bytes = b""
    _remind: float = 0.0  # when the log is due again, by the monotonic clock

    def waits(self, need: Need, devices: int = 0, needed: int = 0, attempt: int = 0, attempts: int = 0) -> None:
        """Note what the run waits for, with the numbers of now. A wait for devices is logged from time to time; for
        the others there are lines about each attempt."""
        before = self._now()
        goes_on = before.waits_for is not None and (before.waits_for in IDLE) == (need in IDLE)
        facts = {"devices": devices, "needed": needed, "attempt": attempt, "attempts": attempts}
        since = before.since if goes_on else timestamp(time.time())
        state = self._update(waits_for=need, since=since, reason=before.reason if goes_on else "", **facts)
        if need is Need.DEVICES and (before.waits_for is not need or time.monotonic() >= self._remind):
            self._remind = time.monotonic() + REMIND
            log.info("%s", next(lines(state.row(datetime.now(UTC)))))

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
        self._update(waits_for=None, since=None, attempt=0, reason="", sessions=_counted(self._now().sessions, "made"))

    def agreed(self, what: str, devices: int, asked: int, needed: int) -> None:
        """Note how many owners agree to a kind of session: the others are not there for it."""
        now = Agreement(devices, asked, needed, timestamp(time.time()))
        self._update(agreed={**self._now().agreed, what: now}, devices=devices)

    def leads(self) -> None:
        """End a wait for the lease; one for devices, of a run before, goes on."""
        if self._now().waits_for is Need.LEASE:
            self.stopped()

    def stopped(self) -> None:
        self._update(waits_for=None, since=None)

    def save(self) -> None:
        self._update()

    def refused(self, kind: str, version: str, text: str) -> None:
        """Count a refusal. ``save`` or the next change writes it: peers that prove nothing make the disk no work."""
        with self._lock:
            state = self._state or read(self.folder)
            same = [each for each in state.refusals if (each.kind, each.version) == (kind, version)]
            count = 1 + sum(each.count for each in same)
            kept = [Refusal(kind, version, count, timestamp(time.time()), text)]
            for each in state.refusals:
                if each not in same and sum(one.kind == each.kind for one in kept) < VERSIONS:
                    kept.append(each)
            self._state = replace(state, refusals=tuple(kept[:KINDS]))

    @contextmanager
    def observing(self, look: Callable[[], GatewaySnapshot]) -> Iterator[None]:
        """Keep what a gateway says about itself up to date while the block runs."""
        over = threading.Event()

        def observe() -> None:
            while True:
                self._update(gateway=look())
                if over.wait(EVERY):
                    return

        observer = threading.Thread(target=observe, name="run record", daemon=True)
        observer.start()
        try:
            yield
        finally:
            over.set()
            observer.join()
            self._update(gateway=None)

    def _now(self) -> RunState:
        with self._lock:
            return self._state or read(self.folder)

    def _update(self, **changes: object) -> RunState:
        with self._lock:
            self._state = state = replace(self._state or read(self.folder), **changes)  # type: ignore[arg-type]
            raw = json.dumps(asdict(state)).encode()
            if raw != self._written:
                with suppress(OSError):
                    storage.replace(self.folder / FILE, raw, storage.PUBLIC)
                    self._written = raw
            return state


def _counted(counts: Mapping[str, int], name: str) -> dict[str, int]:
    return {**counts, name: counts.get(name, 0) + 1}
