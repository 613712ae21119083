"""``edgeadapt device convert``: a verified adapter as a file for other programs."""

import json
from pathlib import Path

import click

from aggregation.errors import ConfigError
from client.cli import options


@click.command()
@options.bundle
@options.trust
@click.option("--adapter", "name", metavar="NAME", help="A name or a composition. Default: as for 'infer'.")
@click.option("--out", type=options.FILE, required=True, metavar="FILE", help="The new .onnx_adapter file.")
@options.as_json
def convert(bundle: Path, trust: Path | None, name: str | None, out: Path, as_json: bool) -> None:
    """Verify an adapter, and write it in 32-bit floats, which onnxruntime-genai and ONNX Runtime load.

    The new file is not signed, and no device accepts it in a bundle.

    \b
    Examples:
      edgeadapt device convert --bundle chat --out global.onnx_adapter
      edgeadapt device convert --bundle chat --adapter global:0.5+anna --out both.onnx_adapter
    """
    from adapters import container, storage
    from client.inference.library import Composition, Library

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
