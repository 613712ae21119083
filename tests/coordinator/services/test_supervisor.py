"""Services are started in order, watched and stopped: real processes of a few lines."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from aggregation.errors import EdgeAdaptError
from coordinator.services import supervisor
from coordinator.services.supervisor import Happening, Patience, ServiceEvent, ServiceProgram, supervise
from edgeadapt.formats import storage
from tests.support import refused
from tests.support.gateway import wait_until

ROOT = Path(__file__).resolve().parents[3]
PATIENT = Patience(ready=600, stop=600, pause=600, look=600, failures=3)
PROGRAMS = """
import pathlib, signal, sys, time

def serve(name):
    pathlib.Path(name).touch()
    while True:
        time.sleep(0.05)

def server(): serve(sys.argv[1])
def finish(): print("the work is done")
def beating():
    while True:
        pathlib.Path(sys.argv[1]).touch()
        time.sleep(0.02)

def fail(): print("first line"); sys.exit("it\\x1b[31m failed")
def refuse(): print("no such setting"); sys.exit(2)
def fail_twice():
    with open(sys.argv[1], "a") as file: file.write("x")
    sys.exit(pathlib.Path(sys.argv[1]).read_text() != "xxx")
def deaf():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    serve(sys.argv[1])
"""


class Recorder:
    """The events of a run, and what was shown of its services."""

    def __init__(self) -> None:
        self.events: list[ServiceEvent] = []
        self.shown: list[list[dict[str, str | int | None]]] = []

    def show(self, shown: list[dict[str, str | int | None]]) -> bool:
        self.shown.append(shown)
        return True

    def of(self, happening: Happening) -> list[str]:
        return [event.service for event in self.events if event.happening is happening]

    def texts(self) -> list[object]:
        return [event.details["text"] for event in self.events if event.happening is Happening.OUTPUT]


@pytest.fixture
def service(tmp_path: Path) -> Callable[..., ServiceProgram]:
    """A service that runs a function of ``PROGRAMS``; it is ready when the file of its name is there."""
    (tmp_path / "programs.py").write_text(PROGRAMS)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}

    def make(name: str, function: str = "server", **options: object) -> ServiceProgram:
        mark = tmp_path / name
        known = {"is_ready": mark.exists, "address": "", **options}
        return ServiceProgram(name, (f"programs:{function}", str(mark)), environment, **known)  # type: ignore[arg-type]

    return make


def run(services: list[ServiceProgram], patience: Patience = PATIENT) -> Recorder:
    record = Recorder()
    supervise(services, patience, record.events.append, record.show)
    return record


def test_each_is_started_when_the_one_before_is_ready_and_all_are_stopped_in_reverse_order(
    service: Callable[..., ServiceProgram], tmp_path: Path
) -> None:
    asked: list[bool] = []

    def ready() -> bool:
        asked.append((tmp_path / "second").exists())
        return (tmp_path / "first").exists() and len(asked) > 3

    work = service("work", "finish", finishes=True, is_ready=lambda: True)
    record = run([service("first", is_ready=ready), service("second"), work])
    assert not any(asked)  # the second was not started before the first was ready
    assert record.of(Happening.STARTED) == ["first", "second", "work"]
    assert record.of(Happening.STOPPING) == ["second", "first"]
    assert record.of(Happening.ENDED) == ["work", "second", "first"]
    assert "the work is done" in record.texts()


def test_a_service_that_ends_is_started_again_after_pauses_that_double(
    service: Callable[..., ServiceProgram], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "FIRST_PAUSE", 0.25)
    record = run([service("work", "fail_twice", finishes=True, is_ready=lambda: False)])
    assert record.of(Happening.STARTED) == ["work"] * 3
    assert [event.details["code"] for event in record.events if event.happening is Happening.ENDED] == [1, 1, 0]
    started = [event.at for event in record.events if event.happening is Happening.STARTED]
    ended = [event.at for event in record.events if event.happening is Happening.ENDED]
    pauses = [(begin - end).total_seconds() for begin, end in zip(started[1:], ended, strict=False)]
    assert pauses[0] >= 0.24
    assert pauses[1] >= 0.49
    assert record.shown[-1][0]["restarts"] == 2


def test_one_that_is_not_ready_in_time_is_stopped_and_started_again(
    service: Callable[..., ServiceProgram], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "FIRST_PAUSE", 0.0)
    record = Recorder()

    def report(event: ServiceEvent) -> None:
        record.events.append(event)
        if len(record.of(Happening.STARTED)) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        supervise(
            [service("slow", is_ready=lambda: False)], replace(PATIENT, ready=0.2, pause=1), report, record.shown.append
        )
    reasons = [event.details["reason"] for event in record.events if event.happening is Happening.STOPPING]
    assert reasons[0] == "not ready within 0.2 s"


def test_one_that_does_not_stop_is_killed(service: Callable[..., ServiceProgram]) -> None:
    work = service("work", "finish", finishes=True, is_ready=lambda: True)
    record = run([service("deaf", "deaf"), work], replace(PATIENT, stop=0.3))
    assert record.of(Happening.KILLED) == ["deaf"]
    assert record.events[-1].details["code"] == -signal.SIGKILL


def test_one_that_hangs_is_killed_after_looks_in_a_row_without_an_answer_and_started_again(
    service: Callable[..., ServiceProgram], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "FIRST_PAUSE", 0.0)
    monkeypatch.setattr(supervisor, "HUNG", 0.2)
    mark, record = tmp_path / "hanging", Recorder()

    def beats() -> bool:
        """Whether the process writes its mark again; one that is stopped by SIGSTOP does not."""
        mark.unlink(missing_ok=True)
        try:
            wait_until(mark.exists, 2.0)
        except AssertionError:
            return False
        return True

    def report(event: ServiceEvent) -> None:
        record.events.append(event)
        if event.happening is Happening.READY and len(record.of(Happening.READY)) == 1:
            (started,) = [each for each in record.events if each.happening is Happening.STARTED]
            os.kill(int(started.details["pid"]), signal.SIGSTOP)
        if len(record.of(Happening.READY)) == 2:
            raise KeyboardInterrupt

    hanging = service("hanging", "beating", is_ready=beats, is_alive=beats)
    with pytest.raises(KeyboardInterrupt):
        supervise([hanging], replace(PATIENT, look=0.05), report, record.show)
    looks = [event.details["looks"] for event in record.events if event.happening is Happening.SILENT]
    assert looks == [1, 2, 3]
    assert record.of(Happening.KILLED) == ["hanging"]
    reasons = [event.details["reason"] for event in record.events if event.happening is Happening.STOPPING]
    assert reasons == ["no answer to 3 looks in a row", "all are stopped"]
    assert record.shown[-1][0]["restarts"] == 1


def test_what_could_not_be_shown_is_shown_later_and_ends_nothing(service: Callable[..., ServiceProgram]) -> None:
    tries = list[object]()
    work = service("work", "finish", finishes=True, is_ready=lambda: True, may_start=lambda: len(tries) > 3)

    def changed(shown: object) -> bool:
        tries.append(shown)
        return len(tries) > 3

    supervise([service("first"), work], PATIENT, lambda event: None, changed)
    assert len(tries) > 3


def test_looks_that_fail_now_and_then_end_nothing(service: Callable[..., ServiceProgram]) -> None:
    looks: list[bool] = []

    def alive() -> bool:
        looks.append(len(looks) % 3 == 2)
        return looks[-1]

    work = service("work", "finish", finishes=True, is_ready=lambda: True, may_start=lambda: len(looks) > 12)
    record = run([service("first", is_alive=alive), work], replace(PATIENT, look=0.01))
    assert len(record.of(Happening.SILENT)) >= 8
    assert record.of(Happening.STARTED) == ["first", "work"]


def test_an_exit_code_after_which_a_restart_is_useless_ends_all_with_what_was_written(
    service: Callable[..., ServiceProgram],
) -> None:
    record = Recorder()
    work = service("work", "refuse", fatal=frozenset({2}))
    with refused(EdgeAdaptError, "work", value=2) as caught:
        supervise([service("first"), work], PATIENT, record.events.append, record.show)
    assert "no such setting" in str(caught.value)
    assert record.of(Happening.ENDED) == ["work", "first"]


def test_services_end_when_the_supervisor_is_killed(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    (tmp_path / "holder.py").write_text(
        "import sys, time\nfrom pathlib import Path\nfrom edgeadapt.formats.storage import locked\n"
        "def hold():\n    with locked(Path(sys.argv[1])): Path(sys.argv[1] + '.held').touch(); time.sleep(600)\n"
    )
    script = (
        "import os, sys\nfrom coordinator.services.supervisor import *\n"
        "service = ServiceProgram('held', ('holder:hold', sys.argv[1]), dict(os.environ), '', lambda: True)\n"
        "supervise([service], Patience(600, 600, 600, 600, 3), lambda event: None, lambda shown: True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    with subprocess.Popen([sys.executable, "-c", script, str(lock)], env=environment) as process:
        wait_until(lambda: (tmp_path / "lock.held").exists(), seconds=120)
        process.kill()
    with storage.locked(lock, timeout=120):
        pass
