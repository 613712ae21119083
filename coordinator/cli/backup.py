"""``edgeadapt coordinator backup`` and ``restore``: a coordinator as one file."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from coordinator.cli.options import as_json, directory
from edgeadapt.formats import storage

if TYPE_CHECKING:
    from coordinator.archive import Report
    from coordinator.backup import Backup

FILE = click.Path(path_type=Path, dir_okay=False)


@click.command(short_help="Copy the coordinator to a file, while it runs.")
@directory
@click.option("--out", type=FILE, required=True, metavar="FILE", help="The archive; a new file.")
@click.option(
    "--keys", is_flag=True, help="With signing.pem, tls.key and next.tls.key: keep the archive as safe as them."
)
@click.option(
    "--standby", is_flag=True, help="For a second machine with the same registry: settings and certificates alone."
)
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
    from coordinator.backup import back_up, back_up_for_standby
    from coordinator.statedir import CoordinatorStateDir
    from edgeadapt.formats.registrystores import is_local, shown

    opened = CoordinatorStateDir.open(state_dir)
    with _progress(f"copying {state_dir}") as report:
        archived = (back_up_for_standby if standby else back_up)(opened, out, keys=keys, report=report)
    _print(archived, "archive", out, as_json)
    if standby and is_local(url := opened.registry.engine.url):  # a proxy on both machines, or a mistake
        click.echo(
            f"{shown(url)} is an address of this machine: the other one must reach that database by it", err=True
        )


@click.command(short_help="Make a state directory from a backup.")
@directory
@click.option("--archive", type=FILE, required=True, metavar="FILE", help="From 'edgeadapt coordinator backup'.")
@click.option("--key", type=FILE, metavar="FILE", help="signing.pem, if the archive does not have it.")
@click.option(
    "--coordinator",
    type=FILE,
    metavar="FILE",
    help="coordinator.pem, as devices pin it. Default: that of --key, or else the archive's own, whose signature then "
    "shows only that nothing is damaged.",
)
@click.option("--database", default="", metavar="URL", help="Keep the registry in this PostgreSQL database, a new one.")
@click.option("--blobs", default="", metavar="URL", help="Keep the adapters here. Default: in DIR.")
@as_json
def restore(
    state_dir: Path,
    archive: Path,
    key: Path | None,
    coordinator: Path | None,
    database: str,
    blobs: str,
    as_json: bool,
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
    from aggregation.errors import of_file
    from aggregation.pki.identity import PublicKey
    from coordinator.backup import restore
    from edgeadapt.formats.keyfiles import MAX_PEM
    from edgeadapt.formats.registryfiles import RegistrySettings

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
    _print(restored, "state", state_dir, as_json)


def _print(made: "Backup", what: str, place: Path, as_json: bool) -> None:
    newest = made.manifest
    row = {"version": newest.version, "round": newest.round, "files": made.files, "bytes": made.size}
    if as_json:
        click.echo(json.dumps({what: str(place), **row, "registry": newest.registry, "key": made.key_id}))
        return
    version = "no version" if newest.version is None else f"version {newest.version}"
    click.echo(f"{place}: {version}, round {newest.round}, {made.files} files, {made.size:,} bytes")
    if newest.registry is not None:
        click.echo(f"registry     {newest.registry}")
    click.echo(f"coordinator  {made.key_id}")


@contextmanager
def _progress(label: str) -> Iterator["Report"]:
    """Show a bar on standard error; it moves where that is a terminal."""
    with click.progressbar(length=1, label=label, file=sys.stderr) as bar:

        def report(done: int, total: int) -> None:
            bar.length = total
            bar.update(done)

        yield report
