"""``edgeadapt bundle list`` and ``convert``: the adapters of a bundle, each verified."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from aggregation.errors import ConfigError, DataError, EdgeAdaptError
from client.cli import options
from client.inference.library import Composition, Library
from edgeadapt import commandline
from edgeadapt.formats import container, storage


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
        click.echo(json.dumps({"adapters": rows}, ensure_ascii=False))
    else:
        for adapter in rows:
            click.echo(_described(adapter))
    if refused := [adapter["name"] for adapter in rows if "refused" in adapter]:
        reason = f"{len(refused)} of {len(rows)} adapters failed verification: {', '.join(refused)}; copy them again"
        raise DataError(reason, about="bundle.adapters", value=refused)


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
        "sha256": manifest.sha256,
        "labels": list(manifest.labels),
    }


def _described(adapter: dict[str, Any]) -> str:
    if "refused" in adapter:
        return f"{adapter['name']}  refused: {adapter['refused']}"
    privacy = f"{_privacy(adapter['privacy'])}  " if adapter["kind"] == "global" else ""
    labels = f"{len(adapter['labels'])} labels  " if adapter["labels"] else ""
    return (
        f"{adapter['name']}  {adapter['kind']}  version {adapter['version']}  {adapter['format']}  "
        f"rank {adapter['rank']}  {labels}{privacy}{adapter['bytes']:,} bytes  {adapter['sha256'][:12]}"
    )


def _privacy(bound: dict[str, float] | None) -> str:
    """State what an adapter may say about one device whose updates are in it."""
    if bound is None:
        return click.style("privacy none", bold=True)
    return f"epsilon {bound['epsilon']:.2f} for delta {bound['delta']:g}"


@click.command()
@commandline.bundle()
@options.trust
@commandline.adapter(
    "name", "One, or NAME:WEIGHT+NAME for several as one. Default: the personal adapter, else the global one."
)
@click.option("--out", type=commandline.FILE, required=True, metavar="FILE", help="The new .onnx_adapter file.")
@commandline.as_json
def convert(bundle: Path, trust: Path | None, name: str | None, out: Path, as_json: bool) -> None:
    """Verify an adapter, and write it in 32-bit floats, which onnxruntime-genai and ONNX Runtime load.

    The new file is not signed, and no device accepts it in a bundle.

    \b
    Examples:
      edgeadapt bundle convert --bundle chat --out global.onnx_adapter
      edgeadapt bundle convert --bundle chat --adapter global:0.5+anna --out both.onnx_adapter
    """
    library = Library.open(bundle, trust)
    adapter = library.load(Composition.of(name or library.default()))
    blob = container.pack(adapter.inputs)
    try:
        storage.create(out, blob, storage.PRIVATE)
    except FileExistsError as error:
        raise ConfigError(f"{out} exists: name a new file", about=out.name) from error
    except OSError as error:
        raise ConfigError(f"{out} cannot be written ({error.strerror})", about=out.name) from error
    row = {"file": str(out), "adapter": adapter.name, "version": adapter.version, "bytes": len(blob)}
    line = f"{out}: {adapter.name} version {adapter.version}, fp32, {len(blob):,} bytes"
    click.echo(json.dumps(row, ensure_ascii=False) if as_json else line)
