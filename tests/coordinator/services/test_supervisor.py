"""Services are started in order, watched and stopped: real processes of a few lines."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError, EdgeAdaptError
from aggregation.pki.tls import TlsKey
from coordinator import runstate
from coordinator.cli import coordinator_group as coordinator
from coordinator.services import deployment, supervisor
from coordinator.services.deployment import RUNNING, running, services_of, stop, up
from coordinator.services.supervisor import Happening, Patience, ServiceEvent, ServiceProgram, supervise
from coordinator.settings import SERVICES, SETTINGS, ServiceSettings
from coordinator.statedir import AUTHORITY, SERVICES_LOCK, CoordinatorStateDir
from edgeadapt.formats import storage
from edgeadapt.formats.keyfiles import NEXT_TLS_KEY, TLS_CERTIFICATE, TLS_KEY
from edgeadapt.formats.registryfiles import REGISTRY
from tests.support import FleetOf, refused
from tests.support.gateway import authority_of, certify, free_port, wait_until

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


def test_where_more_work_may_come_the_others_go_on_and_it_is_done_then(
    service: Callable[..., ServiceProgram], tmp_path: Path
) -> None:
    """As in a container, which would be started again and again if it ended."""
    record, more = Recorder(), tmp_path / "more"

    def report(event: ServiceEvent) -> None:
        record.events.append(event)
        if event.happening is Happening.READY and event.service == "page":
            more.touch()
        if event.happening is Happening.DONE and len(record.of(Happening.DONE)) == 2:
            raise KeyboardInterrupt

    work = service("work", "finish", finishes=True, is_ready=lambda: False, has_more=more.exists)
    with pytest.raises(KeyboardInterrupt):
        supervise([work, service("page")], replace(PATIENT, look=0.01), report, record.show)
    assert record.of(Happening.STARTED) == ["work", "page", "work"]  # the page although there was nothing left to do
    assert record.shown[-1][0]["restarts"] == 0


def test_an_exit_code_after_which_a_restart_is_useless_ends_all_with_what_was_written(
    service: Callable[..., ServiceProgram],
) -> None:
    record = Recorder()
    work = service("work", "refuse", fatal=frozenset({2}))
    with refused(EdgeAdaptError, "work") as caught:
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


# Which services a state directory has, and that they run once.
REPOSITORY = Path(__file__).parents[3]
BOTH = {"gateway": "127.0.0.1:9443", "superlink": "127.0.0.1:8000"}


@pytest.fixture
def state_dir(fleet_of: FleetOf) -> Any:
    """Of a coordinator with TLS files for 127.0.0.1."""
    fleet = fleet_of(3)
    folder = fleet.out / "coordinator"
    key, certificate = certify(authority_of(fleet))
    (folder / TLS_KEY).write_bytes(key)
    (folder / TLS_CERTIFICATE).write_bytes(certificate)
    opened = CoordinatorStateDir.open(folder)
    yield opened
    opened.registry.close()


def write(folder: Path, **settings: str) -> None:
    (folder / SERVICES).write_text(ServiceSettings.parse(settings, "test").to_toml())


def test_the_superlink_comes_before_the_rounds_that_use_it(state_dir: CoordinatorStateDir) -> None:
    superlink, rounds = services_of(state_dir, ServiceSettings(**BOTH))
    folder = state_dir.folder.resolve()
    assert (superlink.name, rounds.name, rounds.finishes) == ("superlink", "rounds", True)
    assert {"--enable-supernode-auth", "--disable-runtime-dependency-installation"} <= {*superlink.command}
    assert "--insecure" not in superlink.command
    assert superlink.environment["FLWR_TELEMETRY_ENABLED"] == "0"
    assert Path(superlink.environment["FLWR_HOME"]).parent == folder
    given = ("--superlink", BOTH["superlink"], "--root-certificates", str(folder / AUTHORITY))
    assert rounds.command[-6:] == (*given, "--gateway", BOTH["gateway"])


def test_the_superlink_has_the_key_in_use_where_it_could_not_be_renamed(
    state_dir: CoordinatorStateDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container, where the old key is mounted as a file, and after the renewal is there."""
    folder = state_dir.folder.resolve()
    (folder / TLS_KEY).rename(folder / NEXT_TLS_KEY)
    (folder / TLS_KEY).write_bytes(TlsKey.generate(SystemEntropy()).pem)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(16, "Device or resource busy")))
        superlink, _ = services_of(state_dir, ServiceSettings(**BOTH))
        assert superlink.command[superlink.command.index("--ssl-keyfile") + 1] == str(folder / NEXT_TLS_KEY)
    superlink, _ = services_of(state_dir, ServiceSettings(**BOTH))
    assert superlink.command[superlink.command.index("--ssl-keyfile") + 1] == str(folder / TLS_KEY)


def test_telemetry_stays_off_where_the_environment_turns_it_on(
    state_dir: CoordinatorStateDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "1")
    superlink, _ = services_of(state_dir, ServiceSettings(**BOTH))
    assert superlink.environment["FLWR_TELEMETRY_ENABLED"] == "0"


def test_the_dashboard_comes_last_and_no_end_of_it_ends_the_rounds(state_dir: CoordinatorStateDir) -> None:
    places = {"gateway": BOTH["gateway"], "dashboard": "127.0.0.1:9500", "channels": "releases"}
    *_, rounds, dashboard = services_of(state_dir, ServiceSettings(**places))
    folder = state_dir.folder.resolve()
    assert (rounds.name, dashboard.name, dashboard.finishes, dashboard.fatal) == (
        "rounds",
        "dashboard",
        False,
        frozenset(),
    )
    given = (str(folder), "--listen", "127.0.0.1:9500", "--channels", str(folder / "releases"))
    assert dashboard.command[-5:] == given


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])  # noqa: S104
def test_a_dashboard_is_ready_with_and_without_tls(
    state_dir: CoordinatorStateDir, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    """On a loopback address it has none, and on every other one it has."""
    from coordinator.dashboard.server import DashboardServer, serve
    from coordinator.servertls import TlsFiles

    address = f"{host}:{free_port()}"
    *_, dashboard = services_of(state_dir, ServiceSettings(gateway=BOTH["gateway"], dashboard=address))
    assert not dashboard.is_ready()
    tls = None if host == "127.0.0.1" else TlsFiles(state_dir)
    made, original = list[DashboardServer](), DashboardServer.__init__

    def noted(self: DashboardServer, *arguments: Any) -> None:
        made.append(self)
        original(self, *arguments)

    monkeypatch.setattr(DashboardServer, "__init__", noted)
    serving = threading.Thread(target=serve, args=(dict, "a" * 64, address, tls))
    serving.start()
    wait_until(dashboard.is_ready)
    assert dashboard.is_alive()
    made[0].should_exit = True
    serving.join()
    assert not dashboard.is_ready()


def test_a_certificate_for_another_host_is_refused_before_flower_fails(state_dir: CoordinatorStateDir) -> None:
    with refused(ConfigError, TLS_CERTIFICATE, value="localhost"):
        services_of(state_dir, ServiceSettings(superlink="localhost:8000"))


def test_up_says_what_is_missing_and_leaves_nothing_but_a_note_of_it(fleet_of: FleetOf) -> None:
    folder = fleet_of(3).out / "coordinator"
    before = {path.name for path in folder.iterdir()}
    with refused(ConfigError, SERVICES):
        up(folder, lambda event: None)
    write(folder)
    with refused(ConfigError, SERVICES):
        up(folder, lambda event: None)
    write(folder, **BOTH)
    with refused(ConfigError, TLS_KEY):
        up(folder, lambda event: None)
    assert {path.name for path in folder.iterdir()} == before | {SERVICES, SERVICES_LOCK, runstate.FILE}
    found = runstate.read(folder).process
    assert found is not None
    assert (found.ending, found.failures, TLS_KEY in found.error) == (runstate.Ending.FAILED, 3, True)


@pytest.mark.parametrize(
    "settings",
    [
        {"gateway": "127.0.0.1"},
        {"gateway": "127.0.0.1:0"},
        {"superlink": "127.0.0.1:65536"},
        {"superlink": "https://a:8000"},
        {"gateway": "a:1 --insecure"},
        {"gateway": "a:1", "superlink": "a:1"},
        {"stop": "0"},
        {"command": "sh"},
    ],
    ids=str,
)
def test_settings_that_are_no_places_to_listen_are_refused(settings: dict[str, str]) -> None:
    with pytest.raises(ConfigError):
        ServiceSettings.parse(settings, "test")


@pytest.mark.parametrize("address", ["0.0.0.0:9443", "[::]:9443", "[::1]:1", "fleet.example:65535"])
def test_places_to_listen_are_accepted_and_written(tmp_path: Path, address: str) -> None:
    settings = ServiceSettings.parse({"gateway": address}, "test")
    (tmp_path / SERVICES).write_text(settings.to_toml())
    assert ServiceSettings.read(tmp_path / SERVICES) == settings


def test_a_second_up_is_refused_and_changes_nothing(
    state_dir: CoordinatorStateDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployment, "PROBE", 0.1)
    folder = state_dir.folder
    write(folder, gateway=f"127.0.0.1:{free_port()}")
    (folder / RUNNING).write_text(json.dumps({"pid": 1, "since": "now", "services": []}))
    with storage.locked(folder / SERVICES_LOCK), refused(EdgeAdaptError, SERVICES_LOCK):
        up(folder, lambda event: None)
    assert json.loads((folder / RUNNING).read_text())["pid"] == 1


def test_what_a_killed_up_has_written_does_not_count(state_dir: CoordinatorStateDir) -> None:
    folder = state_dir.folder
    write(folder, **BOTH)
    (folder / RUNNING).write_text(json.dumps({"pid": 1, "since": "now", "services": []}))
    (folder / SERVICES_LOCK).touch()
    assert running(folder) is None
    assert not stop(folder)  # and process 1 is not asked to end


def test_on_a_full_disk_up_does_not_leave_the_process_of_one_that_was_killed(
    state_dir: CoordinatorStateDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write(state_dir.folder, gateway=f"127.0.0.1:{free_port()}")
    (state_dir.folder / RUNNING).write_text(json.dumps({"pid": 1, "since": "now", "stop": 1.0, "services": []}))
    found = []
    monkeypatch.setattr(storage, "replace", full)
    monkeypatch.setattr(deployment, "supervise", lambda *_: found.append(running(state_dir.folder)))
    up(state_dir.folder, lambda event: None)
    assert [each["pid"] for each in found if each] == [None]  # and 'stop' would not ask process 1 to end


def test_a_fleet_is_stopped_whatever_its_settings_are_now(state_dir: CoordinatorStateDir) -> None:
    folder = state_dir.folder
    for name in (SETTINGS, SERVICES, REGISTRY):
        (folder / name).write_text("edited = and not TOML\n")
    found = {"pid": 0, "since": "now", "stop": 1.0, "services": []}
    program = f"""
import json, os, signal
from pathlib import Path
from edgeadapt.formats import storage
folder = Path({str(folder)!r})
with storage.locked(folder / {SERVICES_LOCK!r}):
    storage.replace(folder / {RUNNING!r}, json.dumps({found!r} | {{"pid": os.getpid()}}).encode())
    signal.pause()
"""
    with subprocess.Popen([sys.executable, "-c", program], cwd=REPOSITORY) as process:
        try:
            wait_until(lambda: bool((running(folder) or found)["pid"]), seconds=60)
            result = CliRunner().invoke(coordinator, ["stop", str(folder)])
            assert (result.exit_code, result.output) == (0, "stopped\n")
            assert process.wait(60) == -signal.SIGTERM
        finally:
            process.kill()


def test_stop_refuses_a_folder_that_is_not_a_coordinators(tmp_path: Path) -> None:
    with refused(ConfigError, SETTINGS):
        stop(tmp_path)


def test_stop_and_status_of_what_does_not_run(state_dir: CoordinatorStateDir) -> None:
    write(state_dir.folder, **BOTH)
    result = CliRunner().invoke(coordinator, ["stop", str(state_dir.folder)])
    assert (result.exit_code, result.output) == (0, f"no services of {state_dir.folder} run\n")
    found = json.loads(CliRunner().invoke(coordinator, ["status", str(state_dir.folder), "--json"]).stdout)
    assert found["services"] is None
