"""``edgeadapt export adapter``: add an adapter to a bundle."""

from dataclasses import asdict, replace
from pathlib import Path

import click

from adapters.base import find_base
from adapters.keyfiles import read_key
from adapters.manifest import AdapterManifest, Format
from aggregation.errors import ConfigError
from aggregation.pki.identity import IdentityKey
from export.bundle.sources import Origin
from export.bundle.write import add, check_base, check_place, create, next_version, stated_manifest
from export.cli.options import (
    FOLDER,
    PROFILE,
    from_folder,
    from_registry,
    origin_of,
    out_json,
    pinned,
    print_result,
    profiled,
    signed_by,
    status,
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
@click.option("--base", "base_name", metavar="NAME|DIR", help="Export this base too, if BUNDLE does not exist yet.")
@profiled
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
    base_name: str | None,
    profile: str | None,
    bundle: Path,
    key_file: Path,
    as_json: bool,
) -> None:
    """Add an adapter to a bundle: a version of a registry, or a folder that peft saved.

    With --base, one command makes the whole bundle: the base gets what the adapter needs.

    \b
    Examples:
      edgeadapt export adapter --registry runs/demo/coordinator --bundle bundle --key vendor.pem
      edgeadapt export adapter --registry fleet --version 3 --format int4 --bundle bundle --key vendor.pem
      edgeadapt export adapter --peft my-lora --base my-base --labels labels.txt --bundle bundle --key vendor.pem
      edgeadapt export adapter --peft my-lora --name poet --version 2 --bundle chat --key vendor.pem
    """
    signer = read_key(key_file)
    origin = origin_of(registry, peft_folder, version, trust, labels)
    if registry is None and version is None:
        origin = replace(origin, version=next_version(bundle, name, origin))
    if base_name is None and profile is not None:
        raise ConfigError(
            "--profile is for --base; the base in the bundle has its own: leave it out", about="--profile"
        )
    if base_name is not None and stated_manifest(bundle) is None:
        manifest = _whole(bundle, base_name, profile or PROFILE, origin, name=name, form=form, key=signer)
    else:
        if base_name is not None:
            check_base(bundle, find_base(base_name), profile)
        manifest = add(bundle, origin, name=name, form=form, key=signer)
    print_result(
        {"bundle": str(bundle), **asdict(manifest)},
        f"{bundle}: {name} version {manifest.version}, {form}, rank {manifest.rank}, {manifest.size:,} bytes",
        as_json,
    )


def _whole(
    bundle: Path, base_name: str, profile: str, origin: Origin, *, name: str, form: Format, key: IdentityKey
) -> AdapterManifest:
    """A new bundle of a base that has what ``origin`` needs, and of ``origin``."""
    check_place(bundle)
    from export.bundle.base import export_named, wanted  # torch, after what can be refused without it

    want = wanted(find_base(base_name), origin)
    if want.task == "text-classification" and not origin.labels:
        raise ConfigError("name the labels of the adapter's head, in order, with --labels", about="--labels")
    with status(f"exporting {base_name} as {profile}, which takes from seconds to a minute"):
        exported = export_named(base_name, profile, want)
    return create(bundle, exported, origin, name=name, form=form, key=key)
