"""The services of a coordinator's state directory: Flower's SuperLink, and the rounds with their gateway. ``up`` runs
them while it holds ``up.lock``, and writes to ``services.json`` what runs. The authority's enrolment service does not
belong to them: it runs where the authority's key is."""

import http.client
import json
import os
import signal
import socket
import ssl
import sysconfig
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from aggregation.errors import ConfigError, EdgeAdaptError
from aggregation.pki.certificates import to_der
from aggregation.pki.tls import hosts_of
from coordinator.runstate import Ending, RunRecord
from coordinator.services.supervisor import Happening, Patience, Report, ServiceEvent, ServiceProgram, supervise
from coordinator.settings import SERVICES, SETTINGS, FederationSettings, ServiceSettings, is_loopback
from coordinator.statedir import LOCK, RELOAD, SERVICES_LOCK, STOPPING, CoordinatorStateDir, require
from edgeadapt.formats import jsontext, storage
from edgeadapt.formats.keyfiles import TLS_CERTIFICATE, tls_key_path
from edgeadapt.formats.registryfiles import AUTHORITY

RUNNING = "services.json"
DATABASE, HOME = "superlink.db", "superlink"  # the SuperLink's state, and Flower's folder
EVERYWHERE = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}  # noqa: S104  # where Flower's own processes reach what listens there
PROBE = 2.0  # seconds for one look at a service that begins
ANSWER = 5.0  # seconds in which a service that was ready must answer, on a machine that has other work
MAX_RUNNING = 2**16  # bytes
SLACK = 30.0  # seconds, beyond what services may take to stop


def up(folder: Path, report: Report, *, as_json: bool = False, stay: bool = False) -> None:
    """Run a state directory's services until all rounds are done. Several threads ``report`` events. ``as_json``: the
    services write their logs as objects. ``stay``: when all rounds are done, wait for more.

    Raises ConfigError: ``services.toml`` is missing or names nothing to run, or a TLS file is missing or for another
    host. Raises TrustError: the TLS certificate is not one of the authority for a gateway. Raises EdgeAdaptError: they
    run already, the registry is empty, or the rounds cannot go on as they are set."""
    require(folder, SETTINGS)
    text = f"the services of {folder} run already: see 'edgeadapt coordinator status {folder}'"
    # A while, because a check whether the lock is held has it for a moment.
    with storage.locked_or(EdgeAdaptError(text, about=SERVICES_LOCK), folder / SERVICES_LOCK, timeout=PROBE):
        try:
            state_dir = CoordinatorStateDir.open(folder)
            settings = ServiceSettings.read(folder / SERVICES)
            state_dir.registry.newest_adapter()
            services = services_of(state_dir, settings, as_json=as_json, stay=stay)
        except EdgeAdaptError as error:
            if not storage.is_locked(folder / LOCK):  # a run, which may outlive the command that began it, goes on
                RunRecord(folder).ended(Ending.FAILED, str(error))
            raise
        _keep_up(state_dir, settings, services, report)
    report(ServiceEvent("rounds", Happening.DONE))


def _keep_up(
    state_dir: CoordinatorStateDir, settings: ServiceSettings, services: Sequence[ServiceProgram], report: Report
) -> None:
    folder, began, saved = state_dir.folder, datetime.now(UTC).isoformat(timespec="seconds"), True

    def changed(shown: list[dict[str, str | int | None]]) -> bool:
        """Write what runs. A full disk ends no service: it is tried again, and reported once."""
        nonlocal saved
        row = {"pid": os.getpid(), "since": began, "stop": settings.stop, "services": shown}
        try:
            storage.replace(folder / RUNNING, json.dumps(row).encode(), storage.PUBLIC)
        except OSError as error:
            if saved:
                report(ServiceEvent("up", Happening.UNSAVED, {"file": RUNNING, "text": error.strerror or str(error)}))
            saved = False
            return False
        saved = True
        return True

    for left in (RUNNING, STOPPING, RELOAD):  # by a killed one; on a full disk it would stay
        (folder / left).unlink(missing_ok=True)
    try:
        changed([])
        patience = Patience(settings.ready, settings.stop, settings.pause, settings.look, settings.failures)
        supervise(services, patience, report, changed, lambda: _end_rounds(state_dir, settings))
    finally:
        _await_rounds(state_dir, settings.stop)
        for left in (RUNNING, STOPPING, RELOAD):
            (folder / left).unlink(missing_ok=True)
        state_dir.registry.close()


def services_of(
    state_dir: CoordinatorStateDir, settings: ServiceSettings, *, as_json: bool = False, stay: bool = False
) -> tuple[ServiceProgram, ...]:
    """List the services in the order of their start. Raises ConfigError: the settings name none, or as
    ``CoordinatorStateDir.read_tls``, or the certificate is for other hosts."""
    folder = state_dir.folder.resolve()
    if not settings.gateway and not settings.superlink:
        text = f"{state_dir.folder / SERVICES} names nothing to run: set gateway or superlink to HOST:PORT"
        raise ConfigError(text, about=SERVICES)
    _, certificate = state_dir.read_tls(datetime.now(UTC))
    log = ("--json",) if as_json else ()
    command = ["edgeadapt.program:main", "coordinator", "run", str(folder), *log]
    services = []
    if settings.superlink:
        address = _within(settings.superlink)
        host = address.rpartition(":")[0].strip("[]")
        if host not in (hosts := hosts_of(to_der(certificate))):
            text = f"{TLS_CERTIFICATE} is for {', '.join(hosts)}, and the SuperLink's own processes reach it at {host}"
            raise ConfigError(f"{text}: let the authority certify that too", about=TLS_CERTIFICATE)
        services.append(_superlink(folder, settings.superlink))
        command += ["--superlink", address, "--root-certificates", str(folder / AUTHORITY)]
    if settings.gateway:
        command += ["--gateway", settings.gateway]
    rounds = ServiceProgram(
        name="rounds",
        command=tuple(command),
        environment=dict(os.environ),
        address=settings.gateway,
        is_ready=lambda: not settings.gateway or _serves_or_waits(state_dir, settings.gateway, PROBE),
        is_alive=lambda: not settings.gateway or _serves_or_waits(state_dir, settings.gateway, ANSWER),
        may_start=lambda: not state_dir.in_use,  # a run may outlive the command that began it
        finishes=True,
        has_more=(lambda: _has_rounds(state_dir)) if stay else None,
        fatal=frozenset({ConfigError.exit_code}),
    )
    return (*services, rounds, *_dashboard(folder, settings, log))


def _has_rounds(state_dir: CoordinatorStateDir) -> bool:
    """Whether the settings, as they are now, name more rounds than are done. While that cannot be read, they do not."""
    with suppress(EdgeAdaptError, OSError):
        settings = FederationSettings.read(state_dir.folder / SETTINGS)
        return replace(state_dir, settings=settings).has_rounds_left
    return False


def running(folder: Path) -> dict[str, Any] | None:
    """Read what ``up`` has written about the services that it runs now; None if it does not run."""
    if not storage.is_locked(folder / SERVICES_LOCK):
        return None
    try:
        row: dict[str, Any] = jsontext.decode(storage.read(folder / RUNNING, MAX_RUNNING))
    except FileNotFoundError:  # it has just begun, or is about to end
        return {"pid": None, "since": None, "stop": 0.0, "services": []}
    return row


def stop(folder: Path) -> bool:
    """Ask ``up`` to stop its services, and wait until it has; return whether it ran. It reads neither settings nor
    registry, which may be what stopped the fleet's work. Raises ConfigError: ``folder`` is not a coordinator's state
    directory; EdgeAdaptError: it did not stop in time."""
    require(folder, SETTINGS)
    asked, end = None, time.monotonic() + SLACK
    while (row := running(folder)) is not None and (asked is None or row["pid"] in (asked, None)):
        if asked is None and row["pid"] is not None:
            asked, end = row["pid"], time.monotonic() + SLACK + row["stop"] * (len(row["services"]) + 1)
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(asked, signal.SIGTERM)
        if time.monotonic() > end:
            text = f"process {asked or 'unknown'}, which runs the services of {folder}, did not stop in time"
            raise EdgeAdaptError(text, about=SERVICES_LOCK)
        time.sleep(PROBE / 10)
    return asked is not None


def _await_rounds(state_dir: CoordinatorStateDir, seconds: float) -> None:
    """Wait until a run that the SuperLink had started is over. It ends when it misses the SuperLink."""
    end = time.monotonic() + seconds
    while state_dir.in_use and time.monotonic() < end:
        time.sleep(PROBE / 10)


def _end_rounds(state_dir: CoordinatorStateDir, settings: ServiceSettings) -> None:
    """Let a run on a SuperLink close its log, for which the SuperLink would give it one second."""
    if settings.superlink:
        with suppress(OSError):  # a full disk: then the log is closed when the next run begins
            (state_dir.folder / STOPPING).touch()
            _await_rounds(state_dir, settings.stop)


def _superlink(folder: Path, address: str) -> ServiceProgram:
    host, _, port = address.rpartition(":")
    home = folder / HOME
    home.mkdir(mode=storage.PRIVATE_FOLDER, exist_ok=True)
    options = {
        "--host": host.strip("[]"),
        "--port": port,
        "--database": folder / DATABASE,
        "--ssl-certfile": folder / TLS_CERTIFICATE,
        "--ssl-keyfile": tls_key_path(folder),
        "--ssl-ca-certfile": folder / AUTHORITY,
    }
    listed = [str(part) for option in options.items() for part in option]
    flags = ("--enable-supernode-auth", "--disable-runtime-dependency-installation")
    # Flower starts its programs by it.
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    own = {"FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "PATH": path}
    return ServiceProgram(
        name="superlink",
        command=("flwr.superlink.cli:flower_superlink", *listed, *flags),
        environment={**os.environ, **own},
        address=address,
        is_ready=lambda: _is_healthy(_within(address), folder / AUTHORITY, PROBE),
        is_alive=lambda: _is_healthy(_within(address), folder / AUTHORITY, ANSWER),
    )


def _dashboard(folder: Path, settings: ServiceSettings, log: tuple[str, ...]) -> tuple[ServiceProgram, ...]:
    if not settings.dashboard:
        return ()
    command = ["edgeadapt.program:main", "coordinator", "dashboard", str(folder), "--listen", settings.dashboard, *log]
    if settings.channels:
        command += ["--channels", str(folder / settings.channels)]
    return (
        ServiceProgram(
            name="dashboard",
            command=tuple(command),
            environment=dict(os.environ),
            address=settings.dashboard,
            is_ready=lambda: _shows(settings.dashboard, PROBE),
            is_alive=lambda: _shows(settings.dashboard, ANSWER),
        ),
    )


def _within(address: str) -> str:
    """Address at which processes of this machine reach what listens at ``address``."""
    host, _, port = address.rpartition(":")
    return f"{EVERYWHERE.get(host, host)}:{port}"


def _answers(address: str, seconds: float) -> bool:
    """Whether a TLS server completes a handshake. The kernel accepts connections to a process that hangs. Whether the
    server's certificate is valid is the devices' question."""
    host, _, port = address.rpartition(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        connection = socket.create_connection((host.strip("[]"), int(port)), timeout=seconds)
        with context.wrap_socket(connection):
            return True
    except OSError:
        return False


def _serves_or_waits(state_dir: CoordinatorStateDir, gateway: str, seconds: float) -> bool:
    """Whether the gateway answers; or another coordinator leads, and this one waits before it listens."""
    return _answers(_within(gateway), seconds) or state_dir.waits()


def _shows(address: str, seconds: float) -> bool:
    """Whether the dashboard that listens at ``address`` answers: without TLS on a loopback address."""
    if not is_loopback(address):
        return _answers(_within(address), seconds)
    host, _, port = address.rpartition(":")
    return _says_ok(http.client.HTTPConnection(host.strip("[]"), int(port), timeout=seconds))


def _is_healthy(address: str, authority: Path, seconds: float) -> bool:
    """Whether a SuperLink with a certificate of this authority says so."""
    host, _, port = address.rpartition(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(authority)
    return _says_ok(http.client.HTTPSConnection(host.strip("[]"), int(port), timeout=seconds, context=context))


def _says_ok(connection: http.client.HTTPConnection) -> bool:
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
