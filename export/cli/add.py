"""``edgeadapt bundle add``: add an adapter to a bundle."""

import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from aggregation.errors import ConfigError
from aggregation.pki.identity import IdentityKey
from edgeadapt import commandline
from edgeadapt.bases.base import find_base
from edgeadapt.commandline import FOLDER, as_json, print_result
from edgeadapt.formats.bundle import TRUST, Bundle, VerifiedBase
from edgeadapt.formats.calibration import BINS, FOLDS, Calibration
from edgeadapt.formats.keyfiles import read_key, read_public_keys
from edgeadapt.formats.manifest import AdapterManifest, BaseManifest, Format
from edgeadapt.formats.storage import real
from edgeadapt.methods.peft.dora import magnitudes
from export.bundle.sources import Origin, as_slots
from export.bundle.write import (
    add,
    check_base,
    check_place,
    create,
    device_inputs,
    folder_above,
    next_version,
    stated_adapter,
    stated_manifest,
)
from export.cli.options import (
    PROFILE,
    from_folder,
    from_registry,
    learning,
    origin_of,
    pinned,
    profiled,
    progress,
    signed_by,
    the_labels,
    which,
)

if TYPE_CHECKING:  # imports torch
    from export.onnx.exported import ExportedBase


@click.command()
@from_registry
@from_folder
@which
@pinned
@the_labels
@commandline.adapter("name", "The adapter's name on devices.", default="global", show_default=True, former="--name")
@click.option(
    "--format", "form", default="int8", type=click.Choice(["fp32", "fp16", "int8", "int4"]), help="Default: int8."
)
@click.option(
    "--calibrate",
    "held_out",
    type=FOLDER,
    metavar="FILE",
    help="Fit the probabilities to held-out phrases: lines of a label, a tab and a phrase.",
)
@click.option(
    "--base",
    "base_name",
    metavar="NAME|DIR",
    help="Export this base too, if the bundle does not exist yet. DoRA needs its weights.",
)
@profiled
@commandline.bundle("Where the adapter is added or replaced.", new=True)
@signed_by
@commandline.quiet
@as_json
def add_adapter(
    registry: Path | None,
    peft_folder: Path | None,
    version: int | None,
    trust: Path | None,
    labels: Path | None,
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
    """
    signer = read_key(key_file)
    added = add_to(
        bundle,
        origin_of(registry, peft_folder, version, trust, labels),
        signer,
        name=name,
        form=form,
        base_name=base_name,
        profile=profile,
        held_out=held_out,
        counted=registry is not None or version is not None,
    )
    manifest, row = added.manifest, {"bundle": str(bundle), **asdict(added.manifest)}
    size = f"{manifest.size:,} bytes{added.trains}"
    line = f"{bundle}: {name} version {manifest.version}, {form}, rank {manifest.rank}, {size}"
    if added.calibration:
        row["calibration"] = asdict(added.calibration)
        line = f"{line}\n{_summary(added.calibration)}"
    print_result(row, line, as_json)


@dataclass(frozen=True, slots=True)
class Added:
    manifest: AdapterManifest
    calibration: Calibration | None
    trains: str  # completes a line about a new bundle: whether devices can train it


def add_to(
    bundle: Path,
    origin: Origin,
    signer: IdentityKey,
    *,
    name: str,
    form: Format,
    base_name: str | None,
    profile: str | None,
    held_out: Path | None,
    counted: bool,
) -> Added:
    """Add an adapter to a bundle; with ``base_name``, also to a new one.

    ``counted``: the version of ``origin`` was chosen, and is not the next one of the bundle. Errors name options.
    """
    origin = _resolved(origin, base_name)
    examples = _examples(held_out, origin)
    if base_name is None and profile is not None:
        raise ConfigError(
            "--profile is for --base; the base in the bundle has its own: leave it out", about="--profile"
        )
    if base_name is not None and stated_manifest(bundle) is None:
        exported = _exported(bundle, base_name, profile or PROFILE, origin)
        trains = learning(exported, origin.peft_config)
        calibration = _calibrated(exported.folder, exported.manifest, origin, form, examples)
        temperature = calibration.temperature if calibration else 1.0
        manifest = create(bundle, exported, origin, name=name, form=form, key=signer, temperature=temperature)
        return Added(manifest, calibration, trains)
    if base_name is not None:
        check_base(bundle, find_base(base_name), profile)
    calibrates = examples and stated_manifest(bundle) is not None  # else `add` refuses
    verified = _base(bundle, signer) if calibrates else None
    calibration = _calibrated(verified.folder, verified.manifest, origin, form, examples) if verified else None
    if verified:
        verified.check()
    temperature = calibration.temperature if calibration else 1.0
    if not counted:
        origin = replace(origin, version=next_version(bundle, name, origin, temperature))
    _warn(bundle, name, origin, temperature)
    return Added(add(bundle, origin, name=name, form=form, key=signer, temperature=temperature), calibration, "")


def _resolved(origin: Origin, base_name: str | None) -> Origin:
    """Turn ``origin`` into what slots take, with what depends on the weights of the base."""
    origin = as_slots(origin)
    if not magnitudes(origin.tensors):
        return origin
    if base_name is None:
        raise ConfigError(
            "the scales of DoRA are computed with the base's weights: name the base of its training with --base",
            about="--base",
        )
    from export.bundle.base import resolved  # torch

    return resolved(origin, find_base(base_name))


def _exported(bundle: Path, base_name: str, profile: str, origin: Origin) -> "ExportedBase":
    """Export a base that has what ``origin`` needs, for a new bundle."""
    check_place(bundle)
    from export.bundle.base import export_named, wanted  # torch, after what can be refused without it

    want = wanted(find_base(base_name), origin)
    if want.task == "text-classification" and not origin.labels:
        raise ConfigError("name the labels of the adapter's head, in order, with --labels", about="--labels")
    with progress(f"exporting {base_name} as {profile}") as report:
        return export_named(base_name, profile, want, folder_above(bundle), report)


def _base(bundle: Path, signer: IdentityKey) -> VerifiedBase:
    """Open the base in a bundle, which the key that signs the adapter or one in ``trust.pem`` signed."""
    pinned = real(bundle).parent / TRUST
    return Bundle(bundle, (signer.public, *(read_public_keys(pinned) if pinned.exists() else ()))).base()


def _examples(held_out: Path | None, origin: Origin) -> list[tuple[str, int]]:
    if held_out is None:
        return []
    if not origin.labels:
        reason = "--calibrate is for classifiers, and this adapter has no labels: leave it out, or name them (--labels)"
        raise ConfigError(reason, about="--calibrate")
    from export.parity.compare import read_examples

    return read_examples(held_out, origin.labels)


def _calibrated(
    folder: Path, base: BaseManifest, origin: Origin, form: Format, examples: list[tuple[str, int]]
) -> Calibration | None:
    if not examples:
        return None
    from export.parity.compare import (
        OnnxRunner,  # torch, after what can be refused without it
        fit_temperature,
    )

    inputs, runner = device_inputs(origin, base, form), OnnxRunner.open(folder, base)
    label = f"calibrating on {len(examples)} phrases"
    with click.progressbar(length=len(examples), label=label, file=sys.stderr, hidden=commandline.is_quiet()) as bar:
        return fit_temperature(runner, inputs, examples, lambda: bar.update(1))


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


def _warn(bundle: Path, name: str, origin: Origin, temperature: float) -> None:
    before = stated_adapter(bundle, name)
    if before is None or (before.version, before.source) != (origin.version, origin.sha256):
        return
    if before.temperature != temperature:
        reason = f"devices that accepted version {before.version} of {name!r} before refuse another temperature of it"
        click.echo(f"{reason}; calibrate a version when it is first exported", err=True)
