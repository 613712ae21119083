"""Where the versions of a registry are from, in which releases of which channels they are, and what changed in them.

The digest of the file that a release's adapter was exported from tells its version. Every document is verified: the
manifests and the chain of round records with the coordinator's key.

Versions are compared tensor by tensor, layer by layer, and in the manifests. The tensors A and B of LoRA have no
meaning of their own: ``(2A, B/2)`` is the same adapter. So each layer that has both is compared by its update
``ΔW = s B A`` too."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from aggregation.errors import ConfigError, DataError, TrustError
from edgeadapt.formats import registryfiles
from edgeadapt.formats.graphinputs import LORA_A, LORA_B, input_name
from edgeadapt.formats.keyfiles import read_public_keys
from edgeadapt.formats.layout import Floats, Tensors
from edgeadapt.formats.manifest import AdapterManifest, PrivacyBound, RoundRecord, VersionManifest
from edgeadapt.formats.registryfiles import PUBLIC_KEY, RegistryFiles
from edgeadapt.formats.registryreader import open_registry_files
from edgeadapt.releases.repository import ChannelRepository


@dataclass(frozen=True, slots=True)
class TensorChange:
    """Compares a tensor or a layer's update in both versions. ``before``, ``after``: Frobenius norms, weight units."""

    name: str  # peft's name of the tensor; for an update the layer's path
    shape: tuple[int, ...]  # in both
    before: float
    after: float
    change: float  # the norm of the difference
    cosine: float | None  # of the angle between the two, -1 to 1; None if one of them is zero

    @classmethod
    def of(cls, name: str, old: Floats, new: Floats) -> Self:
        first, two = (np.asarray(each, np.float64).ravel() for each in (old, new))
        before, after = float(np.linalg.norm(first)), float(np.linalg.norm(two))
        cosine = float(np.clip(first @ two / (before * after), -1, 1)) if before and after else None
        return cls(name, tuple(old.shape), before, after, float(np.linalg.norm(two - first)), cosine)


@dataclass(frozen=True, slots=True)
class VersionDifference:
    """Compares version ``after`` with version ``before``.

    Args:
        tensors: In both versions, with one shape.
        updates: Of layers with LoRA in both, ``s B A``.
        total: All of ``tensors`` as one vector; None if there are none.
        added, removed: Names of tensors that only one of the two has, or that have another shape.
        labels_moved: The labels are the same, in another order.
    """

    before: int
    after: int
    same_base: bool
    tensors: tuple[TensorChange, ...]
    updates: tuple[TensorChange, ...]
    total: TensorChange | None
    added: tuple[str, ...]
    removed: tuple[str, ...]
    labels_added: tuple[str, ...]
    labels_removed: tuple[str, ...]
    labels_moved: bool
    peft_config: bool
    metrics: Mapping[str, tuple[float | None, float | None]]
    privacy: tuple[PrivacyBound | None, PrivacyBound | None]


def difference(old: VersionManifest, new: VersionManifest, before: Tensors, after: Tensors) -> VersionDifference:
    """Compare two versions by their manifests and tensors. Raises DataError if a layer of LoRA has no scaling."""
    both = [name for name in before if name in after and before[name].shape == after[name].shape]
    changes = tuple(TensorChange.of(name, before[name], after[name]) for name in both)
    flat = [np.concatenate([each[name].ravel() for name in both]) if both else None for each in (before, after)]
    total = None if flat[0] is None or flat[1] is None else TensorChange.of("all", flat[0], flat[1])
    first, second = _updates(old, before), _updates(new, after)
    alike = [name for name in first if name in second and first[name].shape == second[name].shape]
    return VersionDifference(
        before=old.version,
        after=new.version,
        same_base=old.base_digest == new.base_digest,
        tensors=changes,
        updates=tuple(TensorChange.of(name, first[name], second[name]) for name in alike),
        total=total,
        added=tuple(sorted(after.keys() - set(both))),
        removed=tuple(sorted(before.keys() - set(both))),
        labels_added=tuple(label for label in new.labels if label not in old.labels),
        labels_removed=tuple(label for label in old.labels if label not in new.labels),
        labels_moved=old.labels != new.labels and sorted(old.labels) == sorted(new.labels),
        peft_config=old.peft_config == new.peft_config,
        metrics={name: (old.metrics.get(name), new.metrics.get(name)) for name in sorted({*old.metrics, *new.metrics})},
        privacy=(old.privacy, new.privacy),
    )


def _updates(manifest: VersionManifest, tensors: Tensors) -> dict[str, Floats]:
    updates = {}
    for layer in (name.removesuffix(LORA_A) for name in tensors if name.endswith(LORA_A)):
        a, b, path = tensors[layer + LORA_A], tensors.get(layer + LORA_B), input_name(layer)
        if b is not None and a.ndim == b.ndim == 2:
            updates[path] = np.float32(manifest.peft_config.scaling_of(path)) * (b @ a)
    return updates


@dataclass(frozen=True, slots=True)
class ReleasedAdapter:
    """Holds a release of a channel, and one adapter of it; ``current``: the channel offers it now."""

    channel: str
    release: int
    made: str  # when, ISO 8601
    current: bool
    adapter: AdapterManifest


@dataclass(frozen=True, slots=True)
class GovernedVersion:
    """Holds a version with what made it and where it went. ``releases``: the releases that have it, oldest first; None
    if no repository was named."""

    manifest: VersionManifest
    signed_by: str  # id of the coordinator's key
    record: RoundRecord | None  # the record of the round that made it; None for version 0, or the first on its base
    releases: tuple[ReleasedAdapter, ...] | None


@dataclass(frozen=True, slots=True)
class Lineage:
    """Holds all versions of a registry, oldest first."""

    state_dir: Path
    registry: RegistryFiles
    versions: tuple[GovernedVersion, ...]

    @classmethod
    def read(cls, state_dir: Path, trust: Path | None, repository: ChannelRepository | None) -> Self:
        """Read and verify a state directory, which is not changed.

        ``trust`` is a file with the coordinator's public key; by default that of the state directory. Raises
        ConfigError: there is no registry; DataError: the registry is empty or cannot be read, or there is no key or
        more than one; TrustError: a document is missing or damaged, or signed by another key; or a version is not made
        from the previous one, by a round that is recorded."""
        registryfiles.require(state_dir)
        keys = read_public_keys(trust or state_dir / PUBLIC_KEY)
        if len(keys) > 1:
            reason = f"{trust} has {len(keys)} keys, and a coordinator has one"
            raise DataError(reason, about="--trust")
        registry = open_registry_files(state_dir, keys)
        manifests, records = _manifests(state_dir, registry), registry.rounds()
        released = None if repository is None else releases_of(repository)
        made = {record.version: record for record in records}
        before: VersionManifest | None = None
        versions = []
        for manifest in manifests:
            record = made.get(manifest.version)
            follows = manifest.parent == (before and before.sha256)
            if before is None or manifest.begins_after(before):
                recorded = record is None
            else:
                recorded = record is not None and record.made(manifest)
            if not (follows and recorded):
                text = f"{registry.source.name}: version {manifest.version} is not what a recorded round made"
                reason = f"{text} from the version before it: restore the registry from a copy"
                raise TrustError(reason, about="record")
            places = None if released is None else tuple(each for each in released if is_from(each.adapter, manifest))
            versions.append(GovernedVersion(manifest, keys[0].key_id, record, places))
            before = manifest
        return cls(state_dir, registry, tuple(versions))

    def version(self, number: int) -> GovernedVersion:
        if not 0 <= number < len(self.versions):
            reason = f"{self.state_dir} has no version {number}; the newest is {len(self.versions) - 1}"
            raise ConfigError(reason, about="version")
        return self.versions[number]


def is_from(adapter: AdapterManifest, version: VersionManifest) -> bool:
    return (adapter.source, adapter.base_digest) == (version.sha256, version.base_digest)


def releases_of(repository: ChannelRepository) -> tuple[ReleasedAdapter, ...]:
    released = []
    for channel in repository.channels:
        releases, rollout = repository.releases(channel), repository.rollout(channel)
        offered = {rollout.previous} if rollout else set()
        offered |= {releases[-1].number} if releases else set()
        for release in releases:
            adapters = (repository.manifest(channel, release, name) for name in sorted(release.adapters))
            current = release.number in offered
            released += [ReleasedAdapter(channel, release.number, release.made, current, each) for each in adapters]
    return tuple(released)


def _manifests(state_dir: Path, registry: RegistryFiles) -> Sequence[VersionManifest]:
    """Read the manifests of all versions, from version 0 on. Raises DataError if there is no version."""
    newest = registry.manifest()
    if newest is None:
        reason = f"the registry in {state_dir} is empty: publish a first adapter with 'edgeadapt coordinator publish'"
        raise DataError(reason, about="registry")
    manifests = []
    for number in range(newest.version):
        manifest = registry.manifest(number)
        if manifest is None:
            text = f"{registry.source.name} has no version {number}: restore the registry from a copy"
            raise TrustError(text, about="version")
        manifests.append(manifest)
    return [*manifests, newest]
