"""Where the versions of a registry are from, and in which releases of which channels they are.

The digest of the file that a release's adapter was exported from tells its version. Every document is verified: the
manifests and the chain of round records with the coordinator's key.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from aggregation.errors import ConfigError, DataError, TrustError
from edgeadapt.formats import registryfiles
from edgeadapt.formats.keyfiles import read_public_keys
from edgeadapt.formats.manifest import AdapterManifest, VersionManifest
from edgeadapt.formats.registryfiles import PUBLIC_KEY, RegistryFiles
from edgeadapt.formats.registryreader import open_registry_files
from edgeadapt.formats.roundrecord import RoundRecord
from edgeadapt.releases.repository import ChannelRepository


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
        from the previous one, by a round that is recorded.
        """
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
    """Check whether an adapter of a release was exported from this version."""
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
