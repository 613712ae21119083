"""Adding an adapter to a bundle, with all that the bundle needs for it: ``edgeadapt bundle add`` and ``export``."""

import re
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from aggregation.errors import ConfigError
from aggregation.pki.identity import IdentityKey
from edgeadapt import commandline
from edgeadapt.bases.base import find_base
from edgeadapt.commandline import status
from edgeadapt.formats.bundle import TRUST, Bundle, VerifiedBase
from edgeadapt.formats.calibration import Calibration
from edgeadapt.formats.keyfiles import read_public_keys
from edgeadapt.formats.manifest import AdapterManifest, BaseManifest, Card, Format
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.formats.policy import Policy
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

if TYPE_CHECKING:  # imports torch
    from export.onnx.exported import ExportedBase

PROFILE = "native-int8"  # by default


@dataclass(frozen=True, slots=True)
class Added:
    manifest: AdapterManifest
    config: PeftConfig
    calibration: Calibration | None
    exported: "ExportedBase | None" = None  # of a new bundle
    warning: str = ""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Errors name these as options of ``edgeadapt bundle add``."""

    name: str  # on devices
    form: Format
    base_name: str | None = None  # export it too, if the bundle does not exist yet
    profile: str | None = None
    held_out: Path | None = None  # phrases to which the probabilities are fitted
    counted: bool = False  # the version of the origin was chosen, and is not the next one of the bundle
    policy: Path | None = None  # what the bundle may answer from now on
    card: Path | None = None  # what is stated of the adapter


def add_to(bundle: Path, origin: Origin, signer: IdentityKey, wanted: Wanted) -> Added:
    """Add an adapter to a bundle; with ``base_name``, also to a new one. Raises ConfigError, DataError, TrustError: the
    adapter does not fit the base, the bundle or what is wanted."""
    name, form, base_name, profile = wanted.name, wanted.form, wanted.base_name, wanted.profile
    origin = _resolved(origin, base_name)
    if wanted.policy:
        origin = replace(origin, policy=Policy.read(wanted.policy))
    if wanted.card:
        origin = replace(origin, card=read_card(wanted.card))
    examples = _examples(wanted.held_out, origin)
    if base_name is None and profile is not None:
        raise ConfigError(
            "--profile is for --base; the base in the bundle has its own: leave it out", about="--profile"
        )
    if base_name is not None and stated_manifest(bundle) is None:
        exported = _exported(bundle, base_name, profile or PROFILE, origin)
        calibration = _calibrated(exported.folder, exported.manifest, origin, form, examples)
        temperature = calibration.temperature if calibration else 1.0
        manifest = create(bundle, exported, origin, name=name, form=form, key=signer, temperature=temperature)
        return Added(manifest, origin.peft_config, calibration, exported)
    if base_name is not None:
        check_base(bundle, find_base(base_name), profile)
    calibrates = examples and stated_manifest(bundle) is not None  # else `add` refuses
    verified = _base(bundle, signer) if calibrates else None
    calibration = _calibrated(verified.folder, verified.manifest, origin, form, examples) if verified else None
    if verified:
        verified.check()
    temperature = calibration.temperature if calibration else 1.0
    before = stated_adapter(bundle, name)  # under another policy, the same version of a registry has the next number
    same = before is not None and (origin.policy or before.policy) and before.source == origin.sha256
    if same or not wanted.counted:
        origin = replace(origin, version=next_version(bundle, name, origin, temperature))
    warning = _warning(bundle, name, origin, temperature)
    manifest = add(bundle, origin, name=name, form=form, key=signer, temperature=temperature)
    return Added(manifest, origin.peft_config, calibration, warning=warning)


def read_card(path: Path) -> Card:
    """Read ``card.toml``. Raises ConfigError as ``Card.read``, or the license is not an SPDX expression, as far as the
    installed packages tell."""
    card = Card.read(path)
    with suppress(ModuleNotFoundError):
        from cyclonedx.spdx import is_expression  # with edgeadapt[governance]

        listed = re.sub(r"\bLicenseRef-[A-Za-z0-9.-]+", "MIT", card.license)  # such names are the owner's own
        if not is_expression(listed):
            reason = f"{path}: license {card.license!r} is not in SPDX: write Apache-2.0, LicenseRef-Ours or the like"
            raise ConfigError(reason, about="license")
    return card


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
    check_place(bundle)
    from export.bundle.base import export_named, wanted  # torch, after what can be refused without it

    want = wanted(find_base(base_name), origin)
    if want.task == "text-classification" and not origin.labels:
        raise ConfigError("name the labels of the adapter's head, in order, with --labels", about="--labels")
    with status(f"exporting {base_name} as {profile}") as report:
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


def _warning(bundle: Path, name: str, origin: Origin, temperature: float) -> str:
    """Say that devices will refuse the version that is added, if they have it with another temperature."""
    before = stated_adapter(bundle, name)
    if before is None or (before.version, before.source) != (origin.version, origin.sha256):
        return ""
    if before.temperature == temperature:
        return ""
    reason = f"devices that accepted version {before.version} of {name!r} before refuse another temperature of it"
    return f"{reason}; calibrate a version when it is first exported"
