"""Publish an earlier release of a channel again: with the vendor's key, or as it was prepared with that key. Errors are
those of ``ChannelRepository``, besides what a function names."""

from dataclasses import replace
from datetime import datetime

from tuf.api.metadata import Targets

from aggregation.errors import ConfigError, TrustError
from aggregation.pki.identity import IdentityKey, PublicKey
from edgeadapt.formats import storage
from edgeadapt.formats.bundle import manifest_path
from edgeadapt.formats.dsse import MAX_ENVELOPE
from edgeadapt.formats.manifest import AdapterManifest
from edgeadapt.formats.release import RELEASE, Release, target
from edgeadapt.releases.actions import Action
from edgeadapt.releases.drift import JudgedDrift
from edgeadapt.releases.history import audit_repository, rollback_after
from edgeadapt.releases.prepared import RollbackCondition
from edgeadapt.releases.repository import ChannelRepository, Published
from edgeadapt.releases.verdict import JudgedEvaluation


def roll_back(repository: ChannelRepository, channel: str, number: int, key: IdentityKey) -> Published:
    """Publish an earlier release of a channel again, signed with the vendor's key, which devices have pinned.

    Devices refuse an older version of an adapter than they have had, so the adapters are signed again, under the
    version after the highest. Raises ConfigError: there is no such release, or it is the current one; TrustError:
    ``key`` signed neither the release nor the current one: devices would refuse what it signs."""
    with repository.locked():
        old, current = repository.release(channel, number), repository.release(channel)
        if old is None or current is None or old.number == current.number:
            raise ConfigError(f"release {number} is the current one of channel {channel}", about="release")
        try:
            require_signer(repository, channel, current, key.public)
        except TrustError:  # devices may refuse the current one for its signature
            require_signer(repository, channel, old, key.public)
        files = {name: repository.targets.path(channel, name, digest) for name, digest in old.files.items()}
        signed, versions = _signed_again(repository, channel, old, key)
        action = Action("rollback", again=number)
        return Published(channel, repository.add_release(action, channel, files, versions, signed))


def prepare(
    repository: ChannelRepository, channel: str, key: IdentityKey, margin: float, *, drift: bool = False
) -> RollbackCondition:
    """Sign the rollback of the release that a channel rolls out with the vendor's key, and keep it unserved.

    ``margin`` says how far an accuracy may be below the previous release's, and ``drift`` whether worse answers are
    enough: ``accuracy.margin`` and ``rollback_on_drift`` of ``gates.toml``.
    Raises ConfigError: the channel rolls nothing out; TrustError: ``key`` is not the one that signed the release which
    is rolled out."""
    with repository.locked():
        current, rollout = repository.rolled_out(channel)
        old = repository.released(channel, rollout.previous)
        require_signer(repository, channel, current, key.public)
        prepared, served = repository.prepared, repository.targets
        prepared.discard(channel)
        signed, versions = _signed_again(repository, channel, old, key)
        listed = {
            target(channel, name): prepared.targets.write(channel, name, signed[name])
            if name in signed
            else served.stored(channel, name, digest)
            for name, digest in old.files.items()
        }
        digests = {name: listed[target(channel, name)].hashes["sha256"] for name in old.files}
        release = Release(current.number + 1, repository.now.isoformat(timespec="seconds"), digests, versions)
        listed[target(channel, RELEASE)] = prepared.targets.write(channel, RELEASE, release.encode())
        both = dict.fromkeys(sorted(current.adapters.keys() & old.adapters.keys()), (current, old))
        content = {
            name: (repository.manifest(channel, one, name).content, repository.manifest(channel, other, name).content)
            for name, (one, other) in both.items()
        }
        began = int(datetime.fromisoformat(current.made).timestamp() // 86_400) if drift else None
        condition = RollbackCondition(current.number, old.number, margin, content, began)
        metadata = repository.metadata.load(Targets, channel)
        metadata.targets = listed
        condition.put(metadata)
        prepared.write(channel, metadata)
        return condition


def publish_prepared(repository: ChannelRepository, channel: str, judged: JudgedEvaluation | JudgedDrift) -> Published:
    """Publish the prepared rollback of a channel. Needs the key of snapshot and timestamp alone.

    ``judged`` found its newest release worse; the log gets it. Raises ConfigError: no rollback is prepared, or it is
    out of date; DataError: the figures do not give the verdict; TrustError: the rollback is damaged or was prepared for
    another evaluation, the evaluation led to one already, or the repository does not pass its audit."""
    with repository.locked():
        prepared = repository.prepared.accept(channel, repository.released(channel))
        prepared.condition.require(judged)
        records = audit_repository(repository.folder, None).records
        evaluation = judged if isinstance(judged, JudgedEvaluation) else None
        drift = judged if isinstance(judged, JudgedDrift) else None
        if evaluation and (before := rollback_after(evaluation, records)):
            reason = f"round {evaluation.round} led to the rollback of record {before.number} already: evaluate again"
            raise TrustError(reason, about="evaluation")
        release = prepared.release
        for name, content in prepared.files.items():
            repository.targets.write(channel, name, content)
        digest = prepared.metadata.signed.targets[target(channel, RELEASE)].hashes["sha256"]
        action = Action("rollback", channel, None, release.number, digest, dict(release.adapters))
        action = replace(action, again=prepared.condition.again, evaluation=evaluation, drift=drift)
        repository.metadata.commit(action, {}, prepared={channel: prepared.metadata})
        repository.prepared.discard(channel)
        return Published(channel, release)


def note_evaluation(repository: ChannelRepository, channel: str, evaluation: JudgedEvaluation) -> None:
    """Note in the log an evaluation after which the channel's release stays. Raises ConfigError if it has none."""
    with repository.locked():
        current = repository.released(channel)
        adapters = dict(current.adapters)
        action = Action("evaluate", channel, None, current.number, adapters=adapters, evaluation=evaluation)
        repository.metadata.commit(action, {})


def require_signer(repository: ChannelRepository, channel: str, release: Release, key: PublicKey) -> None:
    """Check that a key signed every adapter of a release: devices that have it accept what the key signs."""
    for name in release.adapters:
        path = manifest_path(name).as_posix()
        place = repository.targets.path(channel, path, release.files[path])
        try:
            AdapterManifest.accept(storage.read(place, MAX_ENVELOPE), [key])
        except TrustError as error:
            reason = f"the key did not sign adapter {name!r} of release {release.number} of channel {channel}"
            raise TrustError(f"{reason}: name the vendor's", about="--key") from error


def _signed_again(
    repository: ChannelRepository, channel: str, old: Release, key: IdentityKey
) -> tuple[dict[str, bytes], dict[str, int]]:
    """Sign a release's manifests under the version after the channel's highest: file → content, name → version."""
    releases = repository.releases(channel)
    versions = {name: max(each.adapters.get(name, 0) for each in releases) + 1 for name in old.adapters}
    again = {name: replace(repository.manifest(channel, old, name), version=versions[name]) for name in old.adapters}
    return {manifest_path(name).as_posix(): one.sign(key) for name, one in again.items()}, versions
