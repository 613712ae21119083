"""``edgeadapt export adapter``: add an adapter to a bundle."""

from dataclasses import asdict
from pathlib import Path

import click

from adapters.keyfiles import read_key
from adapters.manifest import Format
from export.bundle.write import add
from export.cli.options import (
    FOLDER,
    from_folder,
    from_registry,
    origin_of,
    out_json,
    pinned,
    print_result,
    signed_by,
    the_labels,
    which,
)


@click.command()
@from_registry
@from_folder
@which
@pinned
@the_labels
@click.option("--name", default="global", metavar="NAME", help="The adapter's name on devices. Default: global.")
@click.option(
    "--format", "form", default="int8", type=click.Choice(["fp32", "fp16", "int8", "int4"]), help="Default: int8."
)
@click.option("--bundle", type=FOLDER, required=True, metavar="BUNDLE", help="Where the adapter is added or replaced.")
@signed_by
@out_json
def adapter(
    registry: Path | None,
    peft_folder: Path | None,
    version: int | None,
    trust: Path | None,
    labels: Path | None,
    name: str,
    form: Format,
    bundle: Path,
    key_file: Path,
    as_json: bool,
) -> None:
    """Add an adapter to a bundle: a version of a registry, or a folder that peft saved.

    \b
    Examples:
      edgeadapt export adapter --registry runs/demo/coordinator --bundle bundle --key vendor.pem
      edgeadapt export adapter --registry fleet --version 3 --format int4 --bundle bundle --key vendor.pem
      edgeadapt export adapter --peft my-lora --name poet --version 2 --bundle chat --key vendor.pem
    """
    signer = read_key(key_file)
    origin = origin_of(registry, peft_folder, version, trust, labels)
    manifest = add(bundle, origin, name=name, form=form, key=signer)
    print_result(
        {"bundle": str(bundle), **asdict(manifest)},
        f"{bundle}: {name} version {manifest.version}, {form}, rank {manifest.rank}, {manifest.size:,} bytes",
        as_json,
    )
