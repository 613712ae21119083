"""``edgeadapt bundle list``: the adapters of a bundle, each verified."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from aggregation.errors import DataError, EdgeAdaptError
from client.cli import options
from client.inference.library import Library
from edgeadapt import commandline


@click.command()
@commandline.bundle()
@options.trust
@commandline.as_json
def adapters(bundle: Path, trust: Path | None, as_json: bool) -> None:
    """List and verify the adapters of a bundle. An adapter that fails verification is listed with the reason.

    \b
    Example:
      edgeadapt bundle list --bundle runs/demo/bundle
    """
    library = Library.open(bundle, trust)
    rows = [_verified(library, name) for name in library.names()]
    if as_json:
        click.echo(json.dumps({"adapters": rows}, ensure_ascii=False, default=dict))
    else:
        for adapter in rows:
            click.echo(_described(adapter))
    if refused := [adapter["name"] for adapter in rows if "refused" in adapter]:
        reason = f"{len(refused)} of {len(rows)} adapters failed verification: {', '.join(refused)}; copy them again"
        raise DataError(reason, about="bundle.adapters")


def _verified(library: Library, name: str) -> dict[str, Any]:
    try:
        manifest = library.trust.adapter(name, library.base).manifest
    except EdgeAdaptError as error:
        return {"name": name, "refused": str(error)}
    return {
        "name": name,
        "kind": "global" if manifest.parent is None else "personal",
        "version": manifest.version,
        "format": manifest.format,
        "rank": manifest.rank,
        "bytes": manifest.size,
        "privacy": asdict(manifest.privacy) if manifest.privacy else None,
        "card": manifest.card,
        "sha256": manifest.sha256,
        "labels": list(manifest.labels),
    }


def _described(adapter: dict[str, Any]) -> str:
    if "refused" in adapter:
        return f"{adapter['name']}  refused: {adapter['refused']}"
    privacy = f"{_privacy(adapter['privacy'])}  " if adapter["kind"] == "global" else ""
    labels = f"{len(adapter['labels'])} labels  " if adapter["labels"] else ""
    card = f"\n  {adapter['card']}" if adapter["card"] else ""
    return (
        f"{adapter['name']}  {adapter['kind']}  version {adapter['version']}  {adapter['format']}  "
        f"rank {adapter['rank']}  {labels}{privacy}{adapter['bytes']:,} bytes  {adapter['sha256'][:12]}{card}"
    )


def _privacy(bound: dict[str, float] | None) -> str:
    """State what an adapter may say about one device whose updates are in it."""
    if bound is None:
        return click.style("privacy none", bold=True)
    return f"epsilon {bound['epsilon']:.2f} for delta {bound['delta']:g}"
