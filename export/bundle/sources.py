"""The sources of an adapter to be exported: a version in a coordinator's registry, or a PEFT folder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from aggregation.errors import ConfigError, DataError
from edgeadapt.formats import registryfiles
from edgeadapt.formats.keyfiles import read_key, read_public_keys
from edgeadapt.formats.layout import Tensors
from edgeadapt.formats.manifest import Card, PrivacyBound, Task
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.formats.policy import Policy
from edgeadapt.formats.registryfiles import SIGNING_KEY
from edgeadapt.formats.registryreader import open_registry_files
from edgeadapt.methods.peft.folder import read_peft
from edgeadapt.methods.peft.inputs import is_saved
from edgeadapt.methods.peft.lowrank import as_lora, trimmed
from edgeadapt.methods.peft.methods import from_peft_tensors

TASKS: dict[str, Task] = {"SEQ_CLS": "text-classification", "CAUSAL_LM": "text-generation"}  # by peft's task types


@dataclass(frozen=True, slots=True)
class Origin:
    peft_config: PeftConfig
    labels: tuple[str, ...]  # the head's rows, in order
    version: int
    sha256: str  # digest of the safetensors file that the tensors come from
    base_digest: str | None  # None: the source does not state it
    base: str | None  # the source's name or folder of the base; a hint
    task: Task | None  # what it was trained for, if the source states it
    tensors: Tensors = field(repr=False)  # under peft's names
    shares_a: bool = False  # VeRA as LoRA: A may have more columns than a layer reads (``lowrank.trimmed``)
    privacy: PrivacyBound | None = None  # bound on the sums that it was made from, as its version's manifest states it
    policy: Policy | None = None  # of the bundle, from now on; None: its own, if it has one
    card: Card | None = None  # of who releases it


def as_slots(origin: Origin) -> Origin:
    """Turn another method of low rank into LoRA, as the slots of a base take it. Raises ConfigError, DataError as
    ``lowrank.as_lora``."""
    config, tensors = as_lora(origin.peft_config, origin.tensors)
    if config is origin.peft_config:
        return origin
    return replace(origin, peft_config=config, tensors=tensors, shares_a=origin.peft_config.peft_type == "VERA")


def fitted(origin: Origin, base_digest: str, slots: Mapping[str, Sequence[str]]) -> Origin:
    """Prepare ``origin`` for a base with these slots. Raises ConfigError: the adapter is for another base."""
    if origin.base_digest not in (None, base_digest):
        raise ConfigError(
            f"the adapter was made for the base {str(origin.base_digest)[:12]}, not for {base_digest[:12]}; export "
            "that base, or name another bundle (what learned a task of a package has none)",
            about="base_digest",
        )
    return replace(origin, tensors=trimmed(origin.tensors, slots)) if origin.shares_a else origin


def origin_of(
    registry: Path | None, folder: Path | None, version: int | None, trust: Path | None, labels: Sequence[str] = ()
) -> Origin:
    """Read the adapter in a registry, or else in a PEFT folder. Errors name options of the command line."""
    if folder is not None and registry is None:
        return from_peft(folder, 1 if version is None else version, tuple(labels))
    if registry is None or folder is not None:
        raise ConfigError("name one source of the adapter: --registry DIR or --peft DIR", about="--registry")
    if labels:
        raise ConfigError("--labels is for a PEFT folder; a registry states its labels itself", about="--labels")
    return from_registry(registry, version, trust)


def from_registry(state_dir: Path, version: int | None, trust: Path | None) -> Origin:
    """Read a version, by default the newest, of the registry in a coordinator's state directory. Writes nothing.
    ``trust``: the public keys that may have signed it; by default the coordinator's own. Raises TrustError: manifest or
    file are not what a trusted key signed, or no round is recorded that made the version."""
    registryfiles.require(state_dir)  # first: without a registry the key is missing too
    trusted = read_public_keys(trust) if trust else (read_key(state_dir / SIGNING_KEY).public,)
    registry = open_registry_files(state_dir, trusted)
    manifest = registry.recorded(version)
    if manifest is None:
        which = "is empty" if version is None else f"has no version {version}"
        raise DataError(f"the registry in {state_dir} {which}", about="version")
    tensors = from_peft_tensors(registry.tensors(manifest), manifest.peft_config, {})
    return Origin(
        manifest.peft_config,
        manifest.labels,
        manifest.version,
        manifest.sha256,
        manifest.base_digest,
        None,
        None,
        tensors,
        privacy=manifest.privacy,
    )


def from_peft(folder: Path, version: int, labels: tuple[str, ...]) -> Origin:
    """Read the adapter in a PEFT folder, from ``save_pretrained``, as ``version`` on devices. ``labels``: of its head's
    rows, in order; peft does not store them. Raises ConfigError, DataError as ``read_peft``."""
    read = read_peft(folder)
    if labels and not any(is_saved(name) for name in read.tensors):
        raise ConfigError(
            f"the adapter in {folder} has no head, so labels have no meaning: leave out --labels", about="labels"
        )
    task = TASKS.get(read.task_type or "")
    return Origin(read.peft_config, labels, version, read.sha256, None, read.base, task, read.tensors)
