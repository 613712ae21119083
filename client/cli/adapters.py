"""``edgeadapt device adapters``: what a bundle holds, each adapter verified."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from aggregation.errors import DataError, EdgeAdaptError
from client.cli import options

if TYPE_CHECKING:  # importing these takes most of a start, and `--help` needs none of it
    from client.inference.library import Library


@click.command()
@options.bundle
@options.trust
@options.as_json
def adapters(bundle: Path, trust: Path | None, as_json: bool) -> None:
    """List the adapters of a bundle, each verified; one that must not be used is listed with the reason.

    \b
    Example:
      edgeadapt device adapters --bundle runs/demo/bundle
    """
    from client.inference.library import Library

    library = Library.open(bundle, trust)
    rows = [_verified(library, name) for name in library.names()]
    if as_json:
        click.echo(json.dumps({"adapters": rows}, ensure_ascii=False))
    else:
        for row in rows:
            click.echo(_described(row))
    if refused := [row["name"] for row in rows if "refused" in row]:
        raise DataError(f"{len(refused)} of {len(rows)} adapters must not be used: {', '.join(refused)}")


def _verified(library: "Library", name: str) -> dict[str, Any]:
    try:
        sidecar = library.trust.adapter(library.bundle, library.base, name).sidecar
    except EdgeAdaptError as error:
        return {"name": name, "refused": str(error)}
    return {
        "name": name,
        "private": sidecar.parent is not None,
        "version": sidecar.version,
        "format": sidecar.format,
        "rank": sidecar.rank,
        "bytes": sidecar.size,
        "sha256": sidecar.sha256,
        "labels": list(sidecar.labels),
    }


def _described(row: dict[str, Any]) -> str:
    if "refused" in row:
        return f"{row['name']}  refused: {row['refused']}"
    kind = "private" if row["private"] else "shared"
    intents = f"{len(row['labels'])} intents  " if row["labels"] else ""
    return (
        f"{row['name']}  {kind}  version {row['version']}  {row['format']}  rank {row['rank']}  "
        f"{intents}{row['bytes']:,} bytes  {row['sha256'][:12]}"
    )
