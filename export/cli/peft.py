"""``edgeadapt export peft``: write an adapter as a PEFT folder."""

from pathlib import Path

import click

from adapters.bundle import TRUST, Bundle
from adapters.keyfiles import read_public_keys
from adapters.peft.folder import to_peft
from aggregation.errors import ConfigError
from export.bundle.adapter import unfolded
from export.cli.options import FOLDER, from_registry, origin_of, out_json, pinned, print_result, which


@click.command()
@from_registry
@which
@click.option("--bundle", type=FOLDER, metavar="BUNDLE", help="Instead of a registry: an exported adapter.")
@click.option("--name", default="global", metavar="NAME", help="Of the bundle's adapter. Default: global.")
@pinned
@click.option("--out", type=FOLDER, required=True, metavar="DIR", help="A new folder.")
@out_json
def peft(
    registry: Path | None,
    version: int | None,
    bundle: Path | None,
    name: str,
    trust: Path | None,
    out: Path,
    as_json: bool,
) -> None:
    """Write an adapter as a folder that plain peft opens with PeftModel.from_pretrained.

    \b
    Examples:
      edgeadapt export peft --registry runs/demo/coordinator --out my-lora
      edgeadapt export peft --bundle bundle --name global --out my-lora
    """
    if (registry is None) == (bundle is None):
        raise ConfigError("name one source: --registry DIR or --bundle BUNDLE", about="--registry")
    if bundle is not None:
        if version is not None:
            raise ConfigError(
                "--version is for a registry; a bundle holds one version of each adapter", about="--version"
            )
        read = Bundle(bundle, read_public_keys(trust or bundle.resolve().parent / TRUST))
        tensors, config = unfolded(read.adapter(name, read.base_manifest()))
    else:
        origin = origin_of(registry, None, version, trust, None)
        tensors, config = origin.tensors, origin.peft_config
    to_peft(tensors, config, out)
    print_result({"out": str(out), "tensors": len(tensors)}, f"{out}: {len(tensors)} tensors, for peft", as_json)
