"""Start services in order, wait until each is ready, restart those that end, and stop them in reverse order.

It knows nothing of coordinators. A service that is not ready holds back the start of those after it; those that run
already go on, because what they need from it may come back before they notice. One that runs and does not answer any
more is restarted as well."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum
from signal import SIGTERM

from aggregation.errors import EdgeAdaptError
from edgeadapt.commandline import relayed

LOOK = 0.1  # seconds between two polls of the services
FIRST_PAUSE = 1.0  # seconds
HUNG = 2.0  # seconds that a service has to stop if it does not answer: most that hang hear no signal either
LONGEST_LINE = 2**16  # bytes of one line of a service's output; a longer one is cut into several


class Happening(Enum):
    STARTED = "started"
    READY = "ready"
    OUTPUT = "output"
    UNSAVED = "unsaved"
    SILENT = "silent"
    ENDED = "ended"
    STOPPING = "stopping"
    KILLED = "killed"
    DONE = "done"


@dataclass(frozen=True, slots=True)
class ServiceEvent:
    """``details``: what can be written in JSON."""

    service: str
    happening: Happening
    details: Mapping[str, str | int | float] = field(default_factory=dict)
    at: datetime = field(default_factory=lambda: datetime.now(UTC))

    @property
    def is_trouble(self) -> bool:
        failed = self.happening is Happening.ENDED and self.details["code"] not in (0, -SIGTERM, 128 + SIGTERM)
        return failed or self.happening in (Happening.UNSAVED, Happening.SILENT, Happening.KILLED)


Report = Callable[[ServiceEvent], None]  # called from several threads


@dataclass(frozen=True, slots=True)
class ServiceProgram:
    """A program that runs as long as the supervisor. ``command``: the program, ``MODULE:FUNCTION``, and its arguments;
    started by ``coordinator.services.child``. ``is_alive``: whether it still answers; asked while it is ready, in the
    supervisor's only thread."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    address: str  # ``HOST:PORT`` at which it listens; empty if it does not
    is_ready: Callable[[], bool]  # whether it does its work; asked until it does
    is_alive: Callable[[], bool] = lambda: True
    may_start: Callable[[], bool] = lambda: True  # whether it can be started now; asked until it can
    finishes: bool = False  # whether exit code 0 means that its work is done
    has_more: Callable[[], bool] | None = None  # whether there is work again; None: the supervisor ends with the first
    fatal: frozenset[int] = frozenset()  # exit codes after which a restart does not help


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a service is waited for, in seconds."""

    ready: float  # time in which it must be ready
    stop: float  # time in which it must stop
    pause: float  # longest pause before a restart
    look: float  # time between two checks whether it is alive
    failures: int  # checks in a row that must fail before it is started again


class ServiceState(Enum):
    WAITING = "waiting"
    STARTING = "starting"
    READY = "ready"
    DONE = "done"


@dataclass(slots=True)
class Supervised:
    service: ServiceProgram
    patience: Patience
    report: Report
    process: "subprocess.Popen[bytes] | None" = None
    state: ServiceState = ServiceState.WAITING
    restarts: int = 0
    _failures: int = 0  # in a row
    _silent: int = 0  # checks in a row that failed
    _next_look: float = 0.0
    _since: float = 0.0  # when the process was started
    _not_before: float = 0.0
    _reader: threading.Thread | None = None
    _last: str = ""  # line that the process wrote

    @property
    def is_over(self) -> bool:
        return self.state is ServiceState.DONE and self.service.has_more is None

    def step(self, *, may_start: bool) -> None:
        now = time.monotonic()
        if self.state is ServiceState.DONE:
            self._await_more(now)
        elif self.process is None:
            if may_start and now >= self._not_before and self.service.may_start():
                self._start(now)
        elif (code := self.process.poll()) is not None:
            self._ended(code, now)
        elif self.state is ServiceState.STARTING and self.service.is_ready():
            self.state, self._silent, self._next_look = ServiceState.READY, 0, now + self.patience.look
            self._report(Happening.READY, seconds=round(now - self._since, 1), **self._where())
        elif self.state is ServiceState.STARTING and now - self._since > self.patience.ready:
            self.stop(reason=f"not ready within {self.patience.ready:g} s")
            self._pause(now)
        elif self.state is ServiceState.READY:
            if now - self._since > self.patience.pause:
                self._failures = 0
            if now >= self._next_look:
                self._look()

    def _await_more(self, now: float) -> None:
        if now >= self._next_look:
            self._next_look = now + self.patience.look
            if self.service.has_more is not None and self.service.has_more():
                self.state = ServiceState.WAITING

    def _look(self) -> None:
        alive, now = self.service.is_alive(), time.monotonic()
        self._next_look, self._silent = now + self.patience.look, 0 if alive else self._silent + 1
        if not alive:
            self._report(Happening.SILENT, looks=self._silent)
        if self._silent >= self.patience.failures:
            self.stop(reason=f"no answer to {self._silent} looks in a row", seconds=HUNG)
            self._pause(now)

    def stop(self, *, reason: str, seconds: float | None = None) -> None:
        """Ask the process to end, and kill it after ``seconds``, or those of ``patience`` if these are fewer."""
        if self.process is None:
            return
        self._report(Happening.STOPPING, pid=self.process.pid, reason=reason)
        self.process.terminate()
        try:
            self.process.wait(min(self.patience.stop, seconds or self.patience.stop))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self._report(Happening.KILLED, pid=self.process.pid)
        self._close(self.process.wait())

    def snapshot(self) -> dict[str, str | int | None]:
        return {
            "name": self.service.name,
            "state": self.state.value,
            "pid": self.process.pid if self.process else None,
            "address": self.service.address,
            "restarts": self.restarts,
        }

    def _start(self, now: float) -> None:
        command = [sys.executable, "-m", "coordinator.services.child", *self.service.command]
        self.process = subprocess.Popen(  # noqa: S603
            command,
            env=self.service.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in a terminal would end all at once, and not in order
        )
        self._since, self.state = now, ServiceState.STARTING
        self._report(Happening.STARTED, pid=self.process.pid, **self._where())
        self._reader = threading.Thread(target=self._read, args=(self.process,), daemon=True)
        self._reader.start()

    def _read(self, process: "subprocess.Popen[bytes]") -> None:
        assert process.stdout is not None  # noqa: S101
        while raw := process.stdout.readline(LONGEST_LINE):
            if text := raw.decode(errors="replace").rstrip():
                self._last = text
                self._report(Happening.OUTPUT, text=text)

    def _ended(self, code: int, now: float) -> None:
        self._close(code)
        if code == 0 and self.service.finishes:
            self.state, self._failures = ServiceState.DONE, 0
            if self.service.has_more is not None:
                self._report(Happening.DONE)
        elif code in self.service.fatal:
            last = relayed(self._last)
            text = f"{self.service.name} ended: {vars(last).get('text', last.msg)}"
            raise EdgeAdaptError(text, about=self.service.name)
        else:
            self._pause(now)

    def _pause(self, now: float) -> None:
        self._not_before = now + min(FIRST_PAUSE * 2**self._failures, self.patience.pause)
        self._failures += 1
        self.restarts += 1

    def _close(self, code: int) -> None:
        process, self.process, self.state = self.process, None, ServiceState.WAITING
        if process is not None and process.stdin is not None:
            process.stdin.close()
        if self._reader is not None:
            self._reader.join(LOOK)  # what the process wrote last; one that it started may keep the pipe open
        self._report(Happening.ENDED, code=code)

    def _where(self) -> dict[str, str]:
        return {"address": self.service.address} if self.service.address else {}

    def _report(self, happening: Happening, **details: str | int | float) -> None:
        self.report(ServiceEvent(self.service.name, happening, details))


def supervise(
    services: Sequence[ServiceProgram],
    patience: Patience,
    report: Report,
    changed: Callable[[list[dict[str, str | int | None]]], bool],
    stopping: Callable[[], object] = lambda: None,
) -> None:
    """Run services until one that ``finishes`` has done its work and cannot have more; whatever ends this, stop them in
    reverse order.
    ``changed``: called with ``Supervised.snapshot`` of each service when one has changed; again until it returns True.
    Raises EdgeAdaptError: a service ended with an exit code that is ``fatal`` for it."""
    supervised = [Supervised(service, patience, report) for service in services]
    shown: list[dict[str, str | int | None]] = []
    try:
        while not any(unit.is_over for unit in supervised):
            ready = True
            for unit in supervised:
                unit.step(may_start=ready)
                ready = ready and unit.state in (ServiceState.READY, ServiceState.DONE)
            if (now := [unit.snapshot() for unit in supervised]) != shown and changed(now):
                shown = now
            time.sleep(LOOK)
    finally:
        try:
            stopping()
        finally:
            for unit in reversed(supervised):
                unit.stop(reason="all are stopped")
