"""``edgeadapt bundle add``: add an adapter to a bundle."""

from dataclasses import asdict
from pathlib import Path

import click

from edgeadapt import commandline
from edgeadapt.commandline import as_json, option, path_option, print_result
from edgeadapt.formats.calibration import BINS, FOLDS, Calibration
from edgeadapt.formats.keyfiles import read_key
from edgeadapt.formats.manifest import Format
from edgeadapt.formats.storage import read_lines
from export.addition import Wanted, add_to
from export.bundle.sources import origin_of
from export.cli import options


@click.command()
@options.from_registry
@options.from_folder
@options.which
@options.pinned
@options.the_labels
@options.the_policy
@options.the_card
@commandline.adapter("name", "The adapter's name on devices.", default="global", show_default=True)
@option("--format", "Default: int8.", name="form", default="int8", type=click.Choice(["fp32", "fp16", "int8", "int4"]))
@path_option(
    "--calibrate", "Fit the probabilities to held-out phrases: lines of a label, a tab and a phrase.", name="held_out"
)
@option(
    "--base NAME|DIR",
    "Export this base too, if the bundle does not exist yet. DoRA needs its weights.",
    name="base_name",
)
@options.profiled
@commandline.bundle("Where the adapter is added or replaced.", new=True)
@options.signed_by
@commandline.quiet
@as_json
def add_adapter(
    registry: Path | None,
    peft_folder: Path | None,
    version: int | None,
    trust: Path | None,
    labels: Path | None,
    policy: Path | None,
    card: Path | None,
    name: str,
    form: Format,
    held_out: Path | None,
    base_name: str | None,
    profile: str | None,
    bundle: Path,
    key_file: Path,
    as_json: bool,
) -> None:
    """Add an adapter to a bundle: a version of a registry, or a folder that peft saved.

    With --base, one command makes the whole bundle: the base gets what the adapter needs. With --calibrate, one
    temperature calibrates a classifier's probabilities, and the calibration error is printed: how far they are from the
    share of right answers.

    \b
    Examples:
      edgeadapt bundle add --registry runs/demo/coordinator --bundle bundle --key vendor.pem
      edgeadapt bundle add --registry fleet --version 3 --format int4 --bundle bundle --key vendor.pem
      edgeadapt bundle add --peft my-lora --base my-base --labels labels.txt --bundle bundle --key vendor.pem
      edgeadapt bundle add --peft my-lora --adapter poet --version 2 --bundle chat --key vendor.pem
      edgeadapt bundle add --registry fleet --calibrate held-out.tsv --bundle bundle --key vendor.pem
      edgeadapt bundle add --registry fleet --policy policy.toml --card card.toml --bundle bundle --key vendor.pem
    """
    signer = read_key(key_file)
    counted = registry is not None or version is not None
    origin = origin_of(registry, peft_folder, version, trust, read_lines(labels, "label") if labels else ())
    added = add_to(bundle, origin, signer, Wanted(name, form, base_name, profile, held_out, counted, policy, card))
    if added.warning:
        click.echo(added.warning, err=True)
    manifest, row = added.manifest, {"bundle": str(bundle), **asdict(added.manifest)}
    row["card"] = manifest.card and dict(manifest.card)
    trains = options.learning(added.exported, added.config) if added.exported else ""
    size = f"{manifest.size:,} bytes{trains}"
    line = f"{bundle}: {name} version {manifest.version}, {form}, rank {manifest.rank}, {size}"
    if added.calibration:
        row["calibration"] = asdict(added.calibration)
        line = f"{line}\n{_summary(added.calibration)}"
    print_result(row, line, as_json)


def _summary(found: Calibration) -> str:
    """Summarize in a line for a person, and say what to do where the temperature is of little use."""
    line = (
        f"temperature {found.temperature:g} from {found.count} phrases, {found.correct} answered right; "
        f"calibration error {found.before:.1%} before, {found.after:.1%} after "
        f"({FOLDS}-fold cross-validation, {BINS} bins of equal mass)"
    )
    if found.correct == found.count:
        return f"{line}\nall are answered right, so they do not show how sure to be: give harder phrases"
    if found.after >= found.before:
        return f"{line}\nthe temperature does not help: export without --calibrate, or give more phrases"
    return line
