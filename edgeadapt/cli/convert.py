"""``edgeadapt bundle convert``: write an adapter for other programs, PEFT or ONNX Runtime. What is written is not
signed, and no device accepts it in a bundle."""

from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from aggregation.errors import ConfigError
from edgeadapt import commandline
from edgeadapt.commandline import as_json, number_option, option, path_option, print_result
from edgeadapt.formats import container, storage

if TYPE_CHECKING:  # needs an extra
    from edgeadapt.formats.layout import Tensors
    from edgeadapt.formats.manifest import BaseManifest
    from edgeadapt.formats.peftconfig import PeftConfig

GLOBAL = "global"


@click.command()
@commandline.bundle("Without --registry: the bundle that has the adapter.", new=True)
@commandline.adapter(
    "name",
    "Of the bundle; for onnx also NAME:WEIGHT+NAME, several as one.  [default: for onnx the personal adapter, else the "
    "global one; for peft global]",
)
@option(
    "--format",
    "A file in 32-bit floats, for ONNX Runtime and onnxruntime-genai; or a folder for PeftModel.from_pretrained.",
    name="form",
    type=click.Choice(["onnx", "peft"]),
    default="onnx",
    show_default=True,
)
@path_option("--registry", "With --format peft: a coordinator's state directory.", metavar="DIR")
@number_option("--version", "With --registry. Default: the newest.", 0, 2**63 - 1, metavar="N")
@path_option("--trust", "Public keys. Default: the registry's own, or trust.pem in the folder that holds the bundle.")
@option("--base NAME|DIR", "With --format peft: the base of a DoRA adapter, which needs its weights.")
@path_option("--out", "The new .onnx_adapter file, or folder.", required=True, metavar="FILE|DIR")
@as_json
def convert(
    bundle: Path,
    name: str | None,
    form: str,
    registry: Path | None,
    version: int | None,
    trust: Path | None,
    base: str | None,
    out: Path,
    as_json: bool,
) -> None:
    """Verify an adapter, and write it for other programs: for ONNX Runtime, or as a folder that plain peft opens.

    \b
    Examples:
      edgeadapt bundle convert --bundle chat --out global.onnx_adapter
      edgeadapt bundle convert --bundle chat --adapter global:0.5+anna --out both.onnx_adapter
      edgeadapt bundle convert --format peft --bundle bundle --out my-lora
      edgeadapt bundle convert --format peft --registry runs/demo/coordinator --out my-lora
    """
    source = click.get_current_context().get_parameter_source("bundle")
    nowhere = source is ParameterSource.DEFAULT and not bundle.exists()
    if nowhere if registry is None else source is ParameterSource.COMMANDLINE:
        raise ConfigError("name one source: --registry DIR or --bundle DIR", about="--registry")
    if registry is None and version is not None:
        raise ConfigError("--version is for a registry; a bundle holds one version of each adapter", about="--version")
    if form == "peft":
        from edgeadapt.methods.peft.folder import to_peft

        if registry is None:
            tensors, config = _of_bundle(bundle, name or GLOBAL, trust, base)
        else:
            from export.bundle.sources import origin_of

            origin = origin_of(registry, None, version, trust)
            tensors, config = origin.tensors, origin.peft_config
        to_peft(tensors, config, out)
        print_result({"out": str(out), "tensors": len(tensors)}, f"{out}: {len(tensors)} tensors, for peft", as_json)
        return
    if registry or base:
        text = "--registry and --base go with --format peft; a bundle has what ONNX Runtime needs"
        raise ConfigError(text, about="--registry" if registry else "--base")
    _to_onnx(bundle, name, trust, out, as_json)


def _to_onnx(bundle: Path, name: str | None, trust: Path | None, out: Path, as_json: bool) -> None:
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
    print_result(row, f"{out}: {adapter.name} version {adapter.version}, fp32, {len(blob):,} bytes", as_json)


def _of_bundle(bundle: Path, name: str, trust: Path | None, base: str | None) -> "tuple[Tensors, PeftConfig]":
    from edgeadapt.formats.bundle import TRUST, Bundle
    from edgeadapt.formats.keyfiles import read_public_keys
    from edgeadapt.methods.peft.dora import scaled_layers
    from export.bundle.adapter import unfolded

    read = Bundle(bundle, read_public_keys(trust or storage.real(bundle).parent / TRUST))
    manifest = read.base_manifest()
    adapter = read.adapter(name, manifest)
    tensors, config = unfolded(adapter)
    if scaled_layers(tensors, config):
        tensors = _with_magnitudes(tensors, config, manifest, len(adapter.manifest.labels), base)
    return tensors, config


def _with_magnitudes(
    tensors: "Tensors", config: "PeftConfig", manifest: "BaseManifest", labels: int, base_name: str | None
) -> "Tensors":
    if base_name is None:
        reason = "the magnitudes of DoRA are computed with the base's weights: name the base of the bundle with --base"
        raise ConfigError(reason, about="--base")
    from edgeadapt.bases.base import find_base

    base = find_base(base_name)
    if base.digest != manifest.base_digest:
        raise ConfigError(
            f"{base_name} is the base {base.digest[:12]}, the bundle holds {manifest.base_digest[:12]}: name the base "
            "that was exported",
            about="--base",
        )
    from export.bundle.base import as_trained  # torch

    return as_trained(tensors, config, base, manifest.task, labels)
