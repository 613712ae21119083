"""``edgeadapt release sbom``: the bill of materials of a version."""

from datetime import UTC, datetime
from pathlib import Path

import click

from edgeadapt.cli.versions import NUMBER, open_lineage, where
from edgeadapt.commandline import as_json, print_result
from edgeadapt.formats import storage


@click.command()
@where
@click.argument("version", type=NUMBER, metavar="VERSION")
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Default: standard output."
)
@as_json
def sbom(
    state_dir: Path, releases: Path | None, trust: Path | None, version: int, out: Path | None, as_json: bool
) -> None:
    """Print the software bill of materials of a version of DIR: always JSON, CycloneDX 1.6.

    It has the adapter, the versions that it was made from and its base, with digests; with --releases the exported
    files; and the packages of the bare install on this machine.

    \b
    Examples:
      edgeadapt release sbom fleet 3
      edgeadapt release sbom fleet 3 --releases releases --out adapter-3.cdx.json
    """
    from edgeadapt.releases.sbom import bill_of_materials

    lineage = open_lineage(state_dir, releases, trust)
    lineage.version(version)
    text = bill_of_materials(lineage.versions[: version + 1], datetime.now(UTC))
    if out is None:
        click.echo(text)
    else:
        storage.replace(out, text.encode(), storage.PUBLIC)
        print_result({"file": str(out)}, f"{out}: CycloneDX 1.6", as_json)
