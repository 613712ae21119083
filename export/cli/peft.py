"""``edgeadapt bundle peft``: write an adapter as a PEFT folder."""

from pathlib import Path

import click
from click.core import ParameterSource

from aggregation.errors import ConfigError
from edgeadapt import commandline
from edgeadapt.bases.base import find_base
from edgeadapt.commandline import FOLDER, as_json, print_result
from edgeadapt.formats.bundle import TRUST, Bundle
from edgeadapt.formats.keyfiles import read_public_keys
from edgeadapt.formats.layout import Tensors
from edgeadapt.formats.manifest import BaseManifest
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.formats.storage import real
from edgeadapt.methods.peft.dora import scaled_layers
from edgeadapt.methods.peft.folder import to_peft
from export.bundle.adapter import unfolded
from export.cli.options import from_registry, origin_of, pinned, which


@click.command()
@from_registry
@which
@commandline.bundle("Without --registry: the bundle that has the adapter.", new=True)
@commandline.adapter("name", "Which adapter of the bundle.", default="global", show_default=True, former="--name")
@pinned
@click.option(
    "--base", "base_name", metavar="NAME|DIR", help="The base of a bundle's DoRA adapter, which needs its weights."
)
@click.option("--out", type=FOLDER, required=True, metavar="DIR", help="A new folder.")
@as_json
def peft(
    registry: Path | None,
    version: int | None,
    bundle: Path,
    name: str,
    trust: Path | None,
    base_name: str | None,
    out: Path,
    as_json: bool,
) -> None:
    """Write an adapter as a folder that plain peft opens with PeftModel.from_pretrained.

    \b
    Examples:
      edgeadapt bundle peft --registry runs/demo/coordinator --out my-lora
      edgeadapt bundle peft --bundle bundle --adapter global --out my-lora
    """
    source = click.get_current_context().get_parameter_source("bundle")
    nowhere = source is ParameterSource.DEFAULT and not bundle.exists()
    if nowhere if registry is None else source is ParameterSource.COMMANDLINE:
        raise ConfigError("name one source: --registry DIR or --bundle DIR", about="--registry")
    if registry is None:
        if version is not None:
            raise ConfigError(
                "--version is for a registry; a bundle holds one version of each adapter", about="--version"
            )
        read = Bundle(bundle, read_public_keys(trust or real(bundle).parent / TRUST))
        manifest = read.base_manifest()
        adapter = read.adapter(name, manifest)
        tensors, config = unfolded(adapter)
        if scaled_layers(tensors, config):
            tensors = _with_magnitudes(tensors, config, manifest, len(adapter.manifest.labels), base_name)
    else:
        origin = origin_of(registry, None, version, trust, None)
        tensors, config = origin.tensors, origin.peft_config
    to_peft(tensors, config, out)
    print_result({"out": str(out), "tensors": len(tensors)}, f"{out}: {len(tensors)} tensors, for peft", as_json)


def _with_magnitudes(
    tensors: Tensors, config: PeftConfig, manifest: BaseManifest, labels: int, base_name: str | None
) -> Tensors:
    """Restore the tensors of a DoRA adapter as peft has them."""
    if base_name is None:
        raise ConfigError(
            "the magnitudes of DoRA are computed with the base's weights: name the base of the bundle with --base",
            about="--base",
        )
    base = find_base(base_name)
    if base.digest != manifest.base_digest:
        raise ConfigError(
            f"{base_name} is the base {base.digest[:12]}, the bundle holds {manifest.base_digest[:12]}: name the base "
            "that was exported",
            about="--base",
            value=base.digest,
        )
    from export.bundle.base import as_trained  # torch

    return as_trained(tensors, config, base, manifest.task, labels)
