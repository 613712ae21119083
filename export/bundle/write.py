"""The bundle that a device opens: one base, any number of adapters, each described by a signed manifest.
``edgeadapt.formats.bundle`` names its files and reads them. A bundle is only ever replaced whole
(``edgeadapt.formats.storage.staged``)."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from shutil import copyfile

from aggregation.errors import ConfigError, DataError, TrustError
from aggregation.pki.identity import IdentityKey
from edgeadapt.bases.base import Base
from edgeadapt.formats.bundle import (
    ADAPTERS,
    BASE,
    BASE_MANIFEST,
    GENERATION,
    MAX_HELD_FILE,
    POLICY,
    TOKENIZER,
    Bundle,
    adapter_names,
    adapter_path,
    manifest_path,
)
from edgeadapt.formats.dsse import MAX_ENVELOPE
from edgeadapt.formats.files import sha256
from edgeadapt.formats.graphinputs import BY_COLUMN, check_slots, to_inputs, virtual_tokens
from edgeadapt.formats.layout import Layout, Tensors
from edgeadapt.formats.manifest import AdapterManifest, BaseManifest, Card, Format, PrivacyBound, Task, check_labels
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.formats.policy import Policy
from edgeadapt.formats.storage import link_files, link_or_copy, locked_folder, read, staged, write_files
from edgeadapt.methods.peft.inputs import LABELS, AdapterInputs
from export.bundle import adapter
from export.bundle.sources import Origin, fitted
from export.onnx.exported import ExportedBase


@dataclass(frozen=True, slots=True)
class AdapterSource:
    name: str  # "global", or the owner's name for a private one
    tensors: Tensors = field(repr=False)  # under peft's names
    labels: tuple[str, ...]  # the head's rows, in order
    version: int
    sha256: str  # digest of the safetensors blob that the tensors come from
    parent: str | None = None  # the blob digest of the global version that a private adapter started from
    peft_config: PeftConfig | None = None  # without it, an export to peft folds the scaling into B
    temperature: float = 1.0  # divides a classifier's logits (``edgeadapt.formats.calibration``)
    adapter_inputs: AdapterInputs | None = None  # the tensors' model's; None: the exported base's
    privacy: PrivacyBound | None = None  # bound on the sums that it was made from; None: nothing bounds it
    policy: Policy | None = None  # of the bundle, from now on; None: its own, if it has one
    card: Card | None = None  # of who releases it


def write_bundle(
    out: Path,
    exported: ExportedBase,
    sources: Sequence[AdapterSource],
    *,
    key: IdentityKey,
    form: Format = "int8",
    once: bool = False,
) -> None:
    """Write a bundle to ``out``, replacing an older bundle, and sign its manifests.

    Adapters in ``out`` for the same base stay, unless one of ``sources`` has their name: a household keeps its private
    adapter when the shared one is updated. With ``once``, no other bundle gets this export: its files become the
    bundle's without being copied. Raises ConfigError: ``out`` is something other than a bundle, or keeps adapters that
    would no longer fit the base; an adapter's name cannot be a file's; or an adapter of a language model lacks its
    ``adapter_inputs``. DataError: an adapter does not fit the base, or has labels that do not match the rows of its
    head or that devices refuse. TrustError: as ``_under_policy``. At any error the
    content of ``out`` is unchanged."""
    with locked_folder(out) as whole:
        exported = _under_policy(whole, exported, key)
        check_place(whole)
        manifest = exported.manifest
        files = {BASE_MANIFEST.as_posix(): manifest.sign(key)}
        limit = partial(_longest, manifest.task, exported.read)
        for source in sources:
            inputs = source.adapter_inputs or exported.adapter_inputs
            if source.adapter_inputs is None and manifest.task == "text-generation":
                reason = f"adapter {source.name!r} lacks adapter_inputs, which hold the scaling of its layers"
                raise ConfigError(reason, about="adapter_inputs")
            files |= _adapter_files(source, inputs, manifest, limit, key, form)
        kept = _kept(whole, manifest, {source.name for source in sources})
        with staged(whole, replaces=True) as stage:
            if kept:
                link_files(whole / ADAPTERS, stage / ADAPTERS)
            (stage / BASE).mkdir()
            for name in manifest.files:
                (link_or_copy if once else copyfile)(exported.folder / name, stage / BASE / name)
            write_files(stage, files)


def _under_policy(out: Path, exported: ExportedBase, key: IdentityKey) -> ExportedBase:
    """Keep the policy of a bundle in ``out`` with the same base: its adapters were released with it. Raises TrustError:
    another key signed that bundle."""
    old, new = stated_manifest(out), exported.manifest
    if POLICY in new.files or old is None or old.base_digest != new.base_digest or POLICY not in old.files:
        return exported
    return exported.with_file(POLICY, Bundle(out, (key.public,)).base().files[POLICY])


def _kept(out: Path, manifest: BaseManifest, replaced: set[str]) -> bool:
    """Whether the adapters in ``out`` are for the base of ``manifest``; those that are ``replaced`` need not fit it."""
    old = stated_manifest(out)
    if old is None or old.base_digest != manifest.base_digest:
        return False
    names = set(adapter_names(out)) - replaced
    if names and old.slots != manifest.slots:
        raise ConfigError(
            f"the adapters in {out} ({', '.join(sorted(names))[:200]}) were made for a base with other slots, and "
            "devices would refuse them; name another folder, or the same --targets and --head",
            about="slots",
        )
    return True


def add(
    bundle: Path, origin: Origin, *, name: str, form: Format, key: IdentityKey, temperature: float = 1.0
) -> AdapterManifest:
    """Add ``origin`` to ``bundle`` under ``name``, and return its manifest. Does not import torch. Raises ConfigError:
    the adapter is for another base, or its labels are missing. DataError: it does not fit the base, or devices would
    refuse its version as a rollback."""
    manifest = _stated(bundle)
    origin = fitted(origin, manifest.base_digest, manifest.slots)
    before = stated_adapter(bundle, name)
    if before is not None and before.version > origin.version:
        reason = f"{bundle} holds version {before.version} of {name!r}; devices refuse the older {origin.version}"
        raise DataError(reason, about="version")
    source = source_of(name, origin, temperature=temperature)
    add_adapter(bundle, AdapterInputs.of_tensors(origin.peft_config, origin.tensors), source, key=key, form=form)
    return _written(bundle, name)


def next_version(bundle: Path, name: str, origin: Origin, temperature: float = 1.0) -> int:
    """Choose the version under which devices accept ``origin``, of a source that counts no versions, as ``name``. It is
    the one after the bundle's, the bundle's own if that has this content already, and 1 in a new bundle."""
    before = stated_adapter(bundle, name)
    if before is None:
        return 1
    policy = sha256(origin.policy.encode()) if origin.policy else before.policy
    held, content = (
        (before.source, before.labels, before.peft_config, before.temperature, before.policy),
        (origin.sha256, origin.labels, origin.peft_config, temperature, policy),
    )
    return before.version if held == content else before.version + 1


def create(
    bundle: Path,
    exported: ExportedBase,
    origin: Origin,
    *,
    name: str,
    form: Format,
    key: IdentityKey,
    temperature: float = 1.0,
) -> AdapterManifest:
    """Write a bundle of ``exported`` and of ``origin`` under ``name``, and return the adapter's manifest. ``exported``
    is used up: its files become the bundle's. Raises ConfigError, DataError: as ``write_bundle``, or the adapter is for
    another base."""
    origin = fitted(origin, exported.manifest.base_digest, exported.manifest.slots)
    if origin.policy:
        origin.policy.check_labels(origin.labels)
        exported = exported.with_file(POLICY, origin.policy.encode())
    write_bundle(bundle, exported, [source_of(name, origin, temperature=temperature)], key=key, form=form, once=True)
    return _written(bundle, name)


def check_base(bundle: Path, base: Base, profile: str | None) -> None:
    """Check that ``bundle`` holds ``base``, in ``profile`` if it is not None. Raises ConfigError."""
    manifest = _stated(bundle)
    if (base.digest, profile or manifest.profile) != (manifest.base_digest, manifest.profile):
        raise ConfigError(
            f"{bundle} holds the base {manifest.base_digest[:12]} as {manifest.profile}, not {base.digest[:12]} as "
            f"{profile or manifest.profile}; name another bundle",
            about="--base",
        )


def device_inputs(origin: Origin, base: BaseManifest, form: Format) -> Tensors:
    """Encode an adapter and read its graph inputs back, as a device does. Raises ConfigError, DataError: the adapter is
    for another base, or does not fit it."""
    origin = fitted(origin, base.base_digest, base.slots)
    inputs = AdapterInputs.of_tensors(origin.peft_config, origin.tensors)
    return adapter.decode(adapter.encode(*adapter.completed(origin.tensors, inputs, base.slots), form), form)


def source_of(name: str, origin: Origin, *, parent: str | None = None, temperature: float = 1.0) -> AdapterSource:
    """Make ``origin`` an adapter ``name`` of a bundle; ``parent`` and ``temperature`` as ``AdapterSource`` has them.
    Raises DataError: the tensors of ``origin`` are not those of its configuration."""
    return AdapterSource(
        name,
        origin.tensors,
        origin.labels,
        origin.version,
        origin.sha256,
        parent,
        origin.peft_config,
        temperature,
        AdapterInputs.of_tensors(origin.peft_config, origin.tensors),
        origin.privacy if parent is None else None,  # nothing bounds what a device fitted to its own examples
        origin.policy,
        origin.card,
    )


def _written(bundle: Path, name: str) -> AdapterManifest:
    if (after := stated_adapter(bundle, name)) is None:
        raise DataError(
            f"{bundle} lost its adapter {name!r} while it was written; is another export running?", about="adapters"
        )
    return after


def add_adapter(
    bundle: Path, inputs: AdapterInputs, source: AdapterSource, *, key: IdentityKey, form: Format = "int8"
) -> None:
    """Add or replace one adapter in a bundle, such as a household's private one, signed by the device's own key.

    ``inputs``: of the model that the adapter was trained in. A policy of ``source`` is the bundle's from now on.

    Raises ConfigError: no adapter has a label of the policy; TrustError: another key signed the bundle whose policy is
    changed. At an error the bundle is unchanged."""
    with locked_folder(bundle) as whole:
        manifest = _stated(whole)
        limit = partial(_longest, manifest.task, lambda name: read(whole / BASE / name, MAX_HELD_FILE))
        files = dict[str, bytes]()
        if source.policy:
            manifest, files = _governed(whole, manifest, source.policy, source.labels, key)
        files |= _adapter_files(source, inputs, manifest, limit, key, form)
        with staged(whole, replaces=True) as stage:
            link_files(whole, stage)
            write_files(stage, files)


def _governed(
    bundle: Path, base: BaseManifest, policy: Policy, labels: Sequence[str], key: IdentityKey
) -> tuple[BaseManifest, dict[str, bytes]]:
    """Return the base manifest of a bundle under a policy, and the files that are signed again. ``labels``: of the
    adapter that is added."""
    held, raw = Bundle(bundle, (key.public,)), policy.encode()
    stated = [one for one in (stated_adapter(bundle, name) for name in adapter_names(bundle)) if one]
    shared = [held.adapter_manifest(one.name) for one in stated if one.parent is None]
    policy.check_labels([*labels, *(label for one in shared for label in one.labels)])
    base = replace(base, files=base.files | {POLICY: sha256(raw)})
    again = [replace(one, policy=sha256(raw), version=one.version + 1) for one in shared if one.policy != sha256(raw)]
    files = {manifest_path(one.name): one.sign(key) for one in again}
    files |= {BASE_MANIFEST: base.sign(key), BASE / POLICY: raw}
    return base, {path.as_posix(): content for path, content in files.items()}


def copy_bundle(bundle: Path, out: Path) -> None:
    """Copy with hard links, replacing an older bundle; at an error ``out`` is unchanged."""
    _stated(bundle)
    with locked_folder(out) as whole:
        check_place(whole)
        with staged(whole, replaces=True) as stage:
            link_files(bundle, stage)


def _longest(task: Task, content: Callable[[str], bytes]) -> int:
    if task == "text-generation":
        return int(json.loads(content(GENERATION))["model"]["context_length"])
    return int(json.loads(content(TOKENIZER))["truncation"]["max_length"])


def _adapter_files(
    source: AdapterSource,
    inputs: AdapterInputs,
    base: BaseManifest,
    limit: Callable[[], int],
    key: IdentityKey,
    form: Format,
) -> dict[str, bytes]:
    tensors, inputs = adapter.completed(source.tensors, inputs, base.slots)
    blob = adapter.encode(tensors, inputs, form)
    filled = to_inputs(tensors, inputs.scaling)
    sizes = check_slots(filled, base.slots)
    if sizes.get(LABELS, 2) < 2:
        raise DataError(
            f"adapter {source.name!r} has a head of one row; a device chooses among at least two labels", about="head"
        )
    if sizes.get(LABELS, len(source.labels)) != len(source.labels):
        raise DataError(
            f"adapter {source.name!r} has {len(source.labels)} labels for {sizes[LABELS]} rows of its head; name each "
            "row, in order (--labels)",
            about="labels",
        )
    check_labels(source.name, source.labels)
    if (count := virtual_tokens(filled)) and count >= (longest := limit()):
        raise DataError(
            f"adapter {source.name!r} has {count} virtual tokens, which leave no room for a text: the base reads at "
            f"most {longest} tokens",
            about="num_virtual_tokens",
        )
    ranks = [value.shape[1] for name, value in filled.items() if name.endswith(BY_COLUMN)]
    if (rank := max(ranks, default=0)) > base.max_rank:
        reason = f"adapter {source.name!r} has rank {rank}, the base takes at most {base.max_rank} (--max-rank)"
        raise DataError(reason, about="rank")
    manifest = AdapterManifest(
        name=source.name,
        sha256=sha256(blob),
        size=len(blob),
        format=form,
        base_digest=base.base_digest,
        layout_digest=Layout.of(tensors).digest,
        version=source.version,
        source=source.sha256,
        peft_config=source.peft_config,
        parent=source.parent,
        rank=rank,
        labels=source.labels,
        temperature=source.temperature,
        privacy=source.privacy,
        policy=base.files.get(POLICY),
        card=source.card,
    )
    contents = {adapter_path(source.name): blob, manifest_path(source.name): manifest.sign(key)}
    return {path.as_posix(): content for path, content in contents.items()}


def check_place(out: Path) -> None:
    """Check that a bundle can be written to ``out``: it is new, empty or a bundle. Raises ConfigError: it is something
    else, or the folder that would hold it cannot be written to."""
    if out.exists() and not (out / BASE_MANIFEST).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not a bundle; name another folder", about=out.name)
    above = folder_above(out)
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{above} is not a folder that can be written to; name another place than {out}", about=above.name
        )


def folder_above(out: Path) -> Path:
    """Find the folder above a bundle that is to be written, or the nearest one that exists, on the same disk."""
    return next(folder for folder in out.resolve().parents if folder.exists())


def stated_manifest(bundle: Path) -> BaseManifest | None:
    """Read the base manifest, unverified, for the exporter alone: a device verifies it. None without a bundle."""
    try:
        return BaseManifest.unverified(read(bundle / BASE_MANIFEST, MAX_ENVELOPE))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except TrustError as error:
        raise DataError(
            f"{bundle / BASE_MANIFEST} is damaged; move {bundle} away and export again", about=BASE_MANIFEST.name
        ) from error


def stated_adapter(bundle: Path, name: str) -> AdapterManifest | None:
    """Read the adapter's manifest, unverified, only to refuse a rollback early: a device compares versions itself."""
    try:
        return AdapterManifest.unverified(read(bundle / manifest_path(name), MAX_ENVELOPE))
    except FileNotFoundError:
        return None
    except TrustError:
        return None  # damaged: it is about to be replaced


def _stated(bundle: Path) -> BaseManifest:
    if (manifest := stated_manifest(bundle)) is None:
        raise ConfigError(
            f"{bundle} is not a bundle: it has no {BASE_MANIFEST}; make one with 'edgeadapt bundle make', or give "
            "--base",
            about=BASE_MANIFEST.name,
        )
    return manifest
