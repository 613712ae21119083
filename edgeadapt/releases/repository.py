"""A repository of The Update Framework (TUF 1.0): bundles for devices, by channel, with roles that sign them.

::

    DIR/log/N.json         what was done, a signed record for each action (``actions``)
    DIR/prepared/          rollbacks that are signed and not served (``prepared``)
    DIR/keys/ID.pem        Ed25519 keys of the roles; those of root and targets belong elsewhere when they are not used
    DIR/public/            what is served: static files, from any web server, object store or folder
        metadata/          N.ROLE.json, and timestamp.json
        targets/           CHANNEL/DIGEST.NAME; in a staged rollout flags.json, and the previous release as previous-…

*root* names the keys of the other roles, *targets* those of the channels; each channel is a delegated role that may
sign files under its name only; *snapshot* and *timestamp* share a key and say what is current. Files are written before
the metadata that name them, and ``timestamp.json`` last: a kill leaves the old repository or the new one."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from tuf.api.metadata import Root, TargetFile, Targets

from aggregation.entropy import Entropy
from aggregation.errors import ConfigError, DataError
from aggregation.pki.identity import PublicKey
from edgeadapt.formats import storage
from edgeadapt.formats.bundle import BASE, BASE_MANIFEST, MAX_BASE_FILE, TRUST, Bundle, adapter_names, adapter_path
from edgeadapt.formats.bundle import manifest_path as manifest_of
from edgeadapt.formats.dsse import MAX_ENVELOPE
from edgeadapt.formats.keyfiles import read_public_keys
from edgeadapt.formats.manifest import AdapterManifest
from edgeadapt.formats.release import (
    ALL,
    CANARY,
    FLAGS,
    MAX_FLAGS,
    MAX_RELEASE,
    RELEASE,
    STABLE,
    TARGETS,
    Release,
    Rollout,
    check_channel,
    previous,
    target,
)
from edgeadapt.releases.actions import Action, GateResult
from edgeadapt.releases.metadata import (
    KEYS,
    MAX_METADATA,
    PROTECTED,
    PUBLIC,
    ROOT,
    SNAPSHOT,
    TIMESTAMP,
    TOP,
    RoleMetadata,
    TargetFiles,
    delegations,
    protected,
)
from edgeadapt.releases.prepared import PreparedRollbacks


@dataclass(frozen=True, slots=True)
class Published:
    channel: str
    release: Release
    private: tuple[str, ...] = ()
    rollout: Rollout | None = None


@dataclass(frozen=True, slots=True)
class ChannelRepository:
    """Manages a repository in a folder. ``now`` dates what is signed; ``by`` names the signer in the log. Methods raise
    ConfigError if a channel does not exist or a key that must sign is not in DIR/keys, DataError or TrustError if the
    repository is damaged, and OSError if files cannot be written; it is then unchanged."""

    folder: Path
    now: datetime
    by: str = ""

    @classmethod
    def create(
        cls, folder: Path, entropy: Entropy, now: datetime, channels: Sequence[str] = (CANARY, STABLE), *, by: str = ""
    ) -> "ChannelRepository":
        """Make a repository with a key for each role, in an empty folder, or leave nothing."""
        names = [check_channel(name) for name in channels]
        with storage.new_folder(folder, mode=storage.PRIVATE_FOLDER) as stage:
            repository = cls(stage, now, by)
            for part in (repository.metadata.place, repository.targets.folder, stage / KEYS):
                part.mkdir(parents=True)
            root, top, online = Root(consistent_snapshot=True), Targets(), repository.metadata.new_key(entropy)
            offline = {role: repository.metadata.new_key(entropy) for role in (ROOT, TOP)}
            for role, key in {**offline, SNAPSHOT: online, TIMESTAMP: online}.items():
                root.add_key(key.public_key, role)
            first = {name: repository.metadata.delegate(top, name, entropy) for name in names}
            repository.metadata.commit(Action("init"), first, root, top)
        return cls(folder, now, by)

    @classmethod
    def open(cls, folder: Path, now: datetime, *, by: str = "") -> "ChannelRepository":
        if not cls.exists(folder):
            raise ConfigError(f"{folder} has no repository of channels: make one with 'edgeadapt release init'")
        return cls(folder, now, by)

    @staticmethod
    def exists(folder: Path) -> bool:
        return (RoleMetadata(folder, datetime.min).place / "timestamp.json").is_file()

    @property
    def metadata(self) -> RoleMetadata:
        return RoleMetadata(self.folder, self.now, self.by)

    @property
    def targets(self) -> TargetFiles:
        return TargetFiles(self.folder / PUBLIC / TARGETS, MAX_BASE_FILE)

    @property
    def prepared(self) -> PreparedRollbacks:
        return PreparedRollbacks(self.metadata, self.targets)

    @property
    def channels(self) -> tuple[str, ...]:
        return tuple(sorted(delegations(self.metadata.load(Targets, TOP))))

    @property
    def protected(self) -> frozenset[str]:
        return protected(self.metadata.load(Targets, TOP))

    def root(self) -> bytes:
        return storage.read(self.metadata.path(ROOT, self.metadata.version(ROOT)), MAX_METADATA)

    def release(self, channel: str, number: int | None = None) -> Release | None:
        """Read a release of a channel, by default the current one; None if it has none."""
        if channel not in self.channels:
            names = ", ".join(self.channels)
            raise ConfigError(f"there is no channel {channel!r}; the channels are {names}", about="channel")
        for version in range(self.metadata.version(channel), 0, -1):
            current = self._release_of(channel, self.metadata.load(Targets, channel, version))
            if number is None or (current and current.number == number):
                return current
        raise ConfigError(f"channel {channel} has no release {number}", about="release")

    def released(self, channel: str, number: int | None = None) -> Release:
        """Read a release as ``release`` does. Raises ConfigError if the channel has none."""
        if (release := self.release(channel, number)) is None:
            raise ConfigError(f"channel {channel} has no release", about="channel")
        return release

    def releases(self, channel: str) -> tuple[Release, ...]:
        versions = range(1, self.metadata.version(channel) + 1)
        read = (self._release_of(channel, self.metadata.load(Targets, channel, version)) for version in versions)
        return tuple({release.number: release for release in read if release}.values())

    def manifest(self, channel: str, release: Release, name: str) -> AdapterManifest:
        path = manifest_of(name).as_posix()
        place = self.targets.path(channel, path, release.files[path])
        try:
            return AdapterManifest.unverified(storage.read(place, MAX_ENVELOPE))
        except OSError as error:
            raise DataError(f"{place} is missing: restore the repository", about=place.name) from error

    def publish(self, channel: str, bundle: Path, trusted: Sequence[PublicKey]) -> Published:
        """Make ``bundle`` the next release of ``channel``. Private adapters in it are left out. Raises ConfigError: the
        channel is protected, the bundle has no adapter to publish, or devices would refuse one: its content differs and
        its version is not above that of the current release; TrustError: None of ``trusted`` signed the bundle."""
        with self.locked():
            current = self.release(channel)
            if channel in self.protected:
                remedy = f"publish to another channel, then 'edgeadapt release promote {self.folder} FROM {channel}'"
                raise ConfigError(f"channel {channel} is protected: {remedy}", about="channel")
            checked = Bundle(bundle, tuple(trusted))
            base = checked.base().manifest
            manifests = {name: checked.adapter(name, base).manifest for name in adapter_names(bundle)}
            private = tuple(name for name, manifest in manifests.items() if manifest.parent is not None)
            shared = {name: manifest for name, manifest in manifests.items() if name not in private}
            if not shared:
                raise ConfigError(f"{bundle} has no adapter that is not private: there is nothing to publish")
            if current:
                for name in shared.keys() & current.adapters.keys():
                    _require_newer(shared[name], self.manifest(channel, current, name))
            names = [BASE_MANIFEST, *(BASE / name for name in base.files)]
            names += [path for name in shared for path in (manifest_of(name), adapter_path(name))]
            files = {path.as_posix(): bundle / path for path in names}
            versions = {name: one.version for name, one in shared.items()}
            return Published(channel, self.add_release(Action("publish"), channel, files, versions), private)

    def assemble(self, channel: str, release: Release, bundle: Path) -> None:
        bundle.mkdir()
        for name, digest in release.files.items():
            (bundle / name).parent.mkdir(exist_ok=True)
            place = self.targets.path(channel, name, digest)
            if not place.is_file():
                raise DataError(f"{place} is missing: restore the repository", about=place.name)
            storage.link_or_copy(place, bundle / name)

    def promote(
        self,
        source: str,
        number: int,
        channel: str,
        gates: Sequence[GateResult],
        *,
        share: int = ALL,
        languages: Sequence[str] = (),
    ) -> Published:
        """Make release ``number`` of ``source``, its current one, the next of ``channel``.

        ``gates`` goes into the log; a protected channel demands some, all passed. Devices outside ``share`` and
        ``languages`` (``Rollout``) get the previous release. Raises ConfigError: the release is no longer the current
        one, devices would refuse it, or the channel is protected and the gates did not all let it pass; or a rollout is
        asked for while another one is under way, or without a previous release."""
        with self.locked():
            candidate, current = self.release(source), self.release(channel)
            if candidate is None or candidate.number != number:
                reason = f"release {number} is not the current one of channel {source}: repeat the promotion"
                raise ConfigError(reason, about="channel")
            if channel in self.protected and not (gates and all(each.passed for each in gates)):
                reason = f"channel {channel} is protected, and the release did not pass its gates"
                raise ConfigError(reason, about="gates")
            if current:
                for name in candidate.adapters.keys() & current.adapters.keys():
                    _require_newer(self.manifest(source, candidate, name), self.manifest(channel, current, name))
            files = {name: self.targets.path(source, name, digest) for name, digest in candidate.files.items()}
            rollout = self._first_stage(channel, current, share, languages)
            action = Action("promote", source=source, gates=tuple(gates), rollout=rollout)
            return Published(channel, self.add_release(action, channel, files, candidate.adapters), rollout=rollout)

    def compared(self, channel: str, name: str) -> tuple[str, str]:
        """Return an adapter's ``AdapterManifest.content`` in the release that a channel rolls out, and in the previous
        one. Raises ConfigError: it rolls nothing out, or the adapter is not in both or is the same in both."""
        _, rollout = self.rolled_out(channel)
        both = [self.release(channel, number) for number in (rollout.release, rollout.previous)]
        contents = [self.manifest(channel, each, name).content for each in both if each and name in each.adapters]
        if len(contents) < len(both) or contents[0] == contents[1]:
            reason = f"the two releases of {channel} have no adapter {name!r} that can be compared: name one, --adapter"
            raise ConfigError(reason, about="adapter")
        return contents[0], contents[1]

    def rollout(self, channel: str) -> Rollout | None:
        """Read who gets the current release of a channel; None if all devices do."""
        listed = self.metadata.load(Targets, channel).targets.get(target(channel, FLAGS))
        if listed is None:
            return None
        return Rollout.decode(storage.read(self.targets.path(channel, FLAGS, listed.hashes["sha256"]), MAX_FLAGS))

    def rolled_out(self, channel: str) -> tuple[Release, Rollout]:
        """Read the current release of a channel, and who gets it. Raises ConfigError: all devices do."""
        release, rollout = self.release(channel), self.rollout(channel)
        if release is None or rollout is None:
            reason = f"channel {channel} rolls nothing out: begin with 'edgeadapt release promote … --share'"
            raise ConfigError(reason, about="rollout")
        return release, rollout

    def set_rollout(self, channel: str, share: int, languages: Sequence[str] = (), *, again: bool = False) -> Published:
        """Change who gets the release that a channel rolls out. No device that has it goes back. A prepared rollback
        stays prepared, and ends with the rollout, which all devices complete. With ``again`` it will be prepared again,
        and is not read. Raises ConfigError if the channel rolls nothing out."""
        with self.locked():
            release, before = self.rolled_out(channel)
            ready = None if again else self.prepared.read(channel)
            rollout = Rollout.of(before.release, before.previous, share, languages)
            signed = self.metadata.load(Targets, channel)
            if rollout is None:
                names = {target(channel, name) for name in (*release.files, RELEASE)}
                signed.targets = {path: each for path, each in signed.targets.items() if path in names}
            else:
                signed.targets[target(channel, FLAGS)] = self.targets.write(channel, FLAGS, rollout.encode())
            digest = signed.targets[target(channel, RELEASE)].hashes["sha256"]
            action = Action("rollout", channel, None, release.number, digest, dict(release.adapters), rollout=rollout)
            self.metadata.commit(action, {channel: signed})
            if rollout is None:
                self.prepared.discard(channel)
            else:
                self.prepared.sign_again(channel, ready, release)
            return Published(channel, release, rollout=rollout)

    def refuse(self, source: str, release: Release, channel: str, gates: Sequence[GateResult]) -> None:
        with self.locked():
            adapters = dict(release.adapters)
            action = Action("refuse", channel, source, release.number, adapters=adapters, gates=tuple(gates))
            self.metadata.commit(action, {})

    def add_channel(self, channel: str, entropy: Entropy) -> None:
        """Add a channel with a key of its own. Raises ConfigError if it exists or cannot have its name."""
        with self.locked():
            if check_channel(channel) in self.channels:
                raise ConfigError(f"there is a channel {channel} already", about="channel")
            top = self.metadata.load(Targets, TOP)
            first = self.metadata.delegate(top, channel, entropy)
            self.metadata.commit(Action("add", channel), {channel: first}, top=top)

    def protect(self, channel: str, *, on: bool = True) -> None:
        """Let only promotions make the releases of a channel, from now on; or, with ``on=False``, publications too."""
        with self.locked():
            self.release(channel)
            top = self.metadata.load(Targets, TOP)
            fields = delegations(top)[channel].unrecognized_fields
            if on:
                fields[PROTECTED] = True
            else:
                fields.pop(PROTECTED, None)
            self.metadata.commit(Action("protect" if on else "unprotect", channel), {}, top=top)

    def renew(self, *, everything: bool = False) -> None:
        """Sign snapshot and timestamp again for another ``DAYS``, with their key alone. With ``everything``, sign the
        other roles too, for ``LONG_DAYS``, with all keys."""
        with self.locked():
            if everything:
                signed = {name: self.metadata.load(Targets, name) for name in self.channels}
                root, top = self.metadata.load(Root, ROOT), self.metadata.load(Targets, TOP)
                ready = {name: self.prepared.read(name) for name in signed}
                self.metadata.commit(Action("renew"), signed, root, top)
                for name, prepared in ready.items():
                    self.prepared.sign_again(name, prepared, self.release(name))
            else:
                self.metadata.commit(Action("renew"), {})

    def rotate(self, role: str, entropy: Entropy) -> bool:
        """Replace the key of a role or channel; return whether a prepared rollback was discarded.

        ``snapshot`` stands for both roles that share a key. Devices follow by themselves: a new root is signed by the
        old key too. The old key's file is deleted. A rollback that was prepared with a channel's old key is discarded,
        because a thief of that key could have replaced it."""
        with self.locked():
            if role not in (ROOT, TOP, SNAPSHOT, TIMESTAMP, *self.channels):
                raise ConfigError(f"there is no role or channel {role!r}", about="role")
            root, top = self.metadata.load(Root, ROOT), self.metadata.load(Targets, TOP)
            new, action, discarded = self.metadata.new_key(entropy), Action("rotate", role), False
            roles = (SNAPSHOT, TIMESTAMP) if role in (SNAPSHOT, TIMESTAMP) else (role,)
            if role in self.channels:
                old = list(delegations(top)[role].keyids)
                for keyid in old:
                    top.revoke_key(keyid, role)
                top.add_key(new.public_key, role)
                self.metadata.commit(action, {role: self.metadata.load(Targets, role)}, top=top)
                discarded = self.prepared.discard(role)
            else:
                signers, old = self.metadata.signers(root.roles[ROOT].keyids), list(root.roles[roles[0]].keyids)
                for name in roles:
                    for keyid in old:
                        root.revoke_key(keyid, name)
                    root.add_key(new.public_key, name)
                self.metadata.commit(action, {}, root, top if role == TOP else None, signers)
            for keyid in old:
                self.metadata.key_file(keyid).unlink(missing_ok=True)
            return discarded

    # Files.

    def locked(self) -> AbstractContextManager[None]:
        return storage.locked(self.folder / ".lock")

    def _first_stage(
        self, channel: str, current: Release | None, share: int, languages: Sequence[str]
    ) -> Rollout | None:
        number = 0 if current is None else current.number
        rollout = Rollout.of(number + 1, number, share, languages)
        if rollout is not None and current is None:
            reason = f"channel {channel} has no release that the other devices could have: promote to all first"
            raise ConfigError(reason, about="rollout")
        if rollout is not None and self.rollout(channel) is not None:
            reason = f"channel {channel} still rolls out release {number}"
            remedy = "complete that with 'edgeadapt release rollout … --share 100', or roll back"
            raise ConfigError(f"{reason}: {remedy}", about="rollout")
        return rollout

    def add_release(
        self,
        action: Action,
        channel: str,
        files: Mapping[str, Path],
        adapters: Mapping[str, int],
        instead: Mapping[str, bytes] | None = None,
    ) -> Release:
        """Add files and sign them as the next release; ``instead`` has the content of some of them. The log gets
        ``action`` with the release. During a rollout the previous release stays on offer."""
        kept, digests, listed = self.targets, {}, {}
        for name, path in files.items():
            content = (instead or {}).get(name)
            stored = kept.store(channel, name, path) if content is None else kept.write(channel, name, content)
            digests[name], listed[target(channel, name)] = stored.hashes["sha256"], stored
        last = self.release(channel)
        moment = self.now.isoformat(timespec="seconds")
        release = Release(last.number + 1 if last else 1, moment, digests, dict(adapters))
        listed[target(channel, RELEASE)] = self.targets.write(channel, RELEASE, release.encode())
        if action.rollout is not None and last is not None:
            listed |= self._keep(channel, last, digests, action.rollout)
        signed = self.metadata.load(Targets, channel)
        signed.targets = listed
        digest = listed[target(channel, RELEASE)].hashes["sha256"]
        done = replace(action, subject=channel, release=release.number, sha256=digest, adapters=release.adapters)
        self.metadata.commit(done, {channel: signed})
        self.prepared.discard(channel)  # it is the previous release's
        return release

    def _keep(self, channel: str, last: Release, digests: Mapping[str, str], rollout: Rollout) -> dict[str, TargetFile]:
        """Return a rollout's targets: the flags, and what of the previous release is not in the new one."""
        own = [name for name, digest in last.files.items() if digests.get(name) != digest]
        kept = self.targets
        stored = [kept.store(channel, previous(name), kept.path(channel, name, last.files[name])) for name in own]
        stored.append(kept.write(channel, previous(RELEASE), last.encode()))
        stored.append(kept.write(channel, FLAGS, rollout.encode()))
        return {each.path: each for each in stored}

    # Releases.

    def _release_of(self, channel: str, signed: Targets) -> Release | None:
        file = signed.targets.get(target(channel, RELEASE))
        if file is None:
            return None
        return Release.decode(storage.read(self.targets.path(channel, RELEASE, file.hashes["sha256"]), MAX_RELEASE))


def pinned_keys(bundle: Path, trust: Path | None) -> tuple[PublicKey, ...]:
    """Read the keys that sign ``bundle``, by default those next to it. Raises as ``read_public_keys``."""
    return read_public_keys(trust or storage.real(bundle).parent / TRUST)


def _require_newer(new: AdapterManifest, current: AdapterManifest) -> None:
    """Check that devices that have ``current`` would accept ``new``."""
    if new.base_digest == current.base_digest and (
        new.version < current.version or (new.version == current.version and new.content != current.content)
    ):
        reason = f"devices have version {current.version} of adapter {new.name!r} and would refuse this version "
        reason += f"{new.version}: export it under the version {current.version + 1} or later"
        raise ConfigError(reason, about="adapter-manifest.version")
