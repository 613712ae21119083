"""A repository of The Update Framework (TUF 1.0): bundles for devices, by channel, with roles that sign them.

::

    DIR/keys/ID.pem        Ed25519 keys of the roles; those of root and targets belong elsewhere when they are not used
    DIR/public/            what is served: static files, from any web server, object store or folder
        metadata/          N.ROLE.json, and timestamp.json
        targets/           CHANNEL/DIGEST.release.json, CHANNEL/base/DIGEST.NAME, CHANNEL/adapters/DIGEST.NAME

The roles: *root* names the keys of the others, *targets* those of the channels, each channel is a delegated role with
the only right to sign files under its name, and *snapshot* and *timestamp*, which share a key, say which of all these
are current. Files are written before the metadata that name them, and ``timestamp.json`` last: a kill at any instant
leaves the repository of before or that of after.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from securesystemslib.signer import CryptoSigner
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Root,
    Signed,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)

from adapters import storage
from adapters.bundle import BASE, BASE_MANIFEST, MAX_BASE_FILE, TRUST, Bundle, adapter_names, adapter_path
from adapters.bundle import manifest_path as manifest_of
from adapters.dsse import MAX_ENVELOPE
from adapters.keyfiles import read_key, read_public_keys
from adapters.manifest import AdapterManifest
from adapters.release import (
    CANARY,
    MAX_RELEASE,
    METADATA,
    RELEASE,
    STABLE,
    TARGETS,
    Release,
    check_channel,
    target,
)
from aggregation.entropy import Entropy
from aggregation.errors import ConfigError, DataError
from aggregation.pki.identity import IdentityKey, PublicKey

ROOT, TOP, SNAPSHOT, TIMESTAMP = "root", "targets", "snapshot", "timestamp"
DAYS = {SNAPSHOT: 30, TIMESTAMP: 7}  # for which metadata are valid; a device that was shown old ones notices after them
LONG_DAYS = 365  # of the roles whose keys are offline
PUBLIC, KEYS = "public", "keys"
MAX_METADATA = 2**22  # bytes
S = TypeVar("S", bound=Signed)


@dataclass(frozen=True, slots=True)
class Published:
    """A new release, and the adapters of the bundle that stayed out because they are private."""

    channel: str
    release: Release
    private: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ChannelRepository:
    """A repository in a folder. ``now`` dates what is signed."""

    folder: Path
    now: datetime

    @classmethod
    def create(
        cls, folder: Path, entropy: Entropy, now: datetime, channels: Sequence[str] = (CANARY, STABLE)
    ) -> "ChannelRepository":
        """Make a repository with a key for each role.

        Raises:
            ConfigError: The folder is not empty, or a channel cannot have its name.
            OSError: It cannot be written; nothing is left.
        """
        names = [check_channel(name) for name in channels]
        with storage.new_folder(folder, mode=storage.PRIVATE_FOLDER) as stage:
            made = cls(stage, now)
            for part in (made.metadata, made.targets, stage / KEYS):
                part.mkdir(parents=True)
            root, top, online = Root(consistent_snapshot=True), Targets(), made._new_key(entropy)
            keys = {ROOT: made._new_key(entropy), TOP: made._new_key(entropy), SNAPSHOT: online, TIMESTAMP: online}
            for role, key in keys.items():
                root.add_key(key.public_key, role)
            made._commit({name: made._delegate(top, name, entropy) for name in names}, root, top)
        return cls(folder, now)

    @classmethod
    def open(cls, folder: Path, now: datetime) -> "ChannelRepository":
        """Open a repository.

        Raises:
            ConfigError: The folder has none.
        """
        opened = cls(folder, now)
        if not (opened.metadata / "timestamp.json").is_file():
            raise ConfigError(f"{folder} has no repository of channels: make one with 'edgeadapt channel init'")
        return opened

    @property
    def metadata(self) -> Path:
        """The folder of the signed metadata."""
        return self.folder / PUBLIC / METADATA

    @property
    def targets(self) -> Path:
        """The folder of the files."""
        return self.folder / PUBLIC / TARGETS

    @property
    def channels(self) -> tuple[str, ...]:
        """The names of the channels, sorted."""
        return tuple(sorted(_delegations(self._load(Targets, TOP))))

    def root(self) -> bytes:
        """The newest root metadata, which devices pin. Raises as ``release``."""
        return storage.read(self._path(ROOT, self._version(ROOT)), MAX_METADATA)

    def release(self, channel: str, number: int | None = None) -> Release | None:
        """A release of a channel, by default the current one; None if it has none.

        Raises:
            ConfigError: There is no such channel, or it never had that release.
            DataError, TrustError: The repository is damaged.
        """
        if channel not in self.channels:
            known = ", ".join(self.channels)
            raise ConfigError(f"there is no channel {channel!r}; the channels are {known}", about="channel")
        for version in range(self._version(channel), 0, -1):
            found = self._release_of(channel, self._load(Targets, channel, version))
            if number is None or (found and found.number == number):
                return found
        raise ConfigError(f"channel {channel} has no release {number}", about="release", value=number)

    def releases(self, channel: str) -> tuple[Release, ...]:
        """All releases of a channel, oldest first. Raises as ``release``."""
        versions = range(1, self._version(channel) + 1)
        found = (self._release_of(channel, self._load(Targets, channel, version)) for version in versions)
        return tuple({release.number: release for release in found if release}.values())

    def manifest(self, channel: str, release: Release, name: str) -> AdapterManifest:
        """Of an adapter in a release of this repository, as it was verified when it was published.

        Raises:
            DataError, TrustError: It is missing or damaged.
        """
        path = manifest_of(name).as_posix()
        place = self._file(channel, path, release.files[path])
        try:
            return AdapterManifest.unverified(storage.read(place, MAX_ENVELOPE))
        except OSError as error:
            raise DataError(f"{place} is missing: restore the repository", about=place.name) from error

    def publish(self, channel: str, bundle: Path, trusted: Sequence[PublicKey]) -> Published:
        """Make ``bundle`` the next release of ``channel``. Private adapters in it are left out.

        Raises:
            ConfigError: There is no such channel, the bundle has no adapter to publish, or devices would refuse one:
                its version is not above that of the current release, and its content is another one.
            DataError, TrustError: The bundle or the repository is damaged, or none of ``trusted`` signed it.
            OSError: The files cannot be written. The repository is unchanged.
        """
        with self._locked():
            current = self.release(channel)
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
            release = self._add(channel, files, {name: one.version for name, one in shared.items()})
            return Published(channel, release, private)

    def promote(self, source: str, channel: str) -> Published:
        """Make the current release of ``source`` the next one of ``channel``.

        Raises:
            ConfigError: There is no such channel, ``source`` has no release, or as ``publish``.
            DataError, TrustError: The repository is damaged.
            OSError: As ``publish``.
        """
        with self._locked():
            found, current = self.release(source), self.release(channel)
            if found is None:
                raise ConfigError(f"channel {source} has no release to promote", about="channel", value=source)
            if current:
                for name in found.adapters.keys() & current.adapters.keys():
                    _require_newer(self.manifest(source, found, name), self.manifest(channel, current, name))
            files = {name: self._file(source, name, digest) for name, digest in found.files.items()}
            return Published(channel, self._add(channel, files, found.adapters))

    def roll_back(self, channel: str, number: int, key: IdentityKey) -> Published:
        """Publish an earlier release of a channel again.

        Devices refuse an older version of an adapter than they have had, so the adapters are signed again, under the
        version after the highest.

        Args:
            channel: The channel.
            number: Of the release.
            key: The vendor's, which devices have pinned for bundles.

        Raises:
            ConfigError: There is no such channel or release, or it is the current one.
            DataError, TrustError: The repository is damaged.
            OSError: As ``publish``.
        """
        with self._locked():
            old, current = self.release(channel, number), self.release(channel)
            if old is None or current is None or old.number == current.number:
                raise ConfigError(f"release {number} is the current one of channel {channel}", about="release")
            files = {name: self._file(channel, name, digest) for name, digest in old.files.items()}
            again = {
                name: replace(self.manifest(channel, old, name), version=self._highest(channel, name) + 1)
                for name in old.adapters
            }
            signed = {manifest_of(name).as_posix(): one.sign(key) for name, one in again.items()}
            versions = {name: one.version for name, one in again.items()}
            return Published(channel, self._add(channel, files, versions, signed))

    def add_channel(self, channel: str, entropy: Entropy) -> None:
        """Add a channel with a key of its own. Raises ConfigError if it exists or cannot have its name."""
        with self._locked():
            if check_channel(channel) in self.channels:
                raise ConfigError(f"there is a channel {channel} already", about="channel", value=channel)
            top = self._load(Targets, TOP)
            self._commit({channel: self._delegate(top, channel, entropy)}, top=top)

    def renew(self, *, everything: bool = False) -> None:
        """Sign snapshot and timestamp again, which then are valid for another ``DAYS``. Needs their key alone.

        ``everything``: the other roles too, for ``LONG_DAYS``, with all keys.

        Raises:
            ConfigError: A key that must sign is not in DIR/keys.
        """
        with self._locked():
            if everything:
                signed = {name: self._load(Targets, name) for name in self.channels}
                self._commit(signed, self._load(Root, ROOT), self._load(Targets, TOP))
            else:
                self._commit({})

    def rotate(self, role: str, entropy: Entropy) -> None:
        """Replace the key of a role or channel; ``snapshot`` stands for both roles that share a key.

        Devices follow by themselves: a new root is signed by the old key too. The old key's file is deleted.

        Raises:
            ConfigError: There is no such role or channel, or a key that must sign is not in DIR/keys.
        """
        with self._locked():
            if role not in (ROOT, TOP, SNAPSHOT, TIMESTAMP, *self.channels):
                raise ConfigError(f"there is no role or channel {role!r}", about="role", value=role)
            root, top, new = self._load(Root, ROOT), self._load(Targets, TOP), self._new_key(entropy)
            roles = (SNAPSHOT, TIMESTAMP) if role in (SNAPSHOT, TIMESTAMP) else (role,)
            if role in self.channels:
                old = list(_delegations(top)[role].keyids)
                for keyid in old:
                    top.revoke_key(keyid, role)
                top.add_key(new.public_key, role)
                self._commit({role: self._load(Targets, role)}, top=top)
            else:
                signers, old = self._signers(root.roles[ROOT].keyids), list(root.roles[roles[0]].keyids)
                for each in roles:
                    for keyid in old:
                        root.revoke_key(keyid, each)
                    root.add_key(new.public_key, each)
                self._commit({}, root, top if role == TOP else None, signers)
            for keyid in old:
                self._key_file(keyid).unlink(missing_ok=True)

    def roles(self) -> Iterator[tuple[str, int, datetime, tuple[Path, ...]]]:
        """Role, version, when its metadata expire, and the files of its keys."""
        root, delegated = self._load(Root, ROOT), _delegations(self._load(Targets, TOP))
        for role in (ROOT, TOP, SNAPSHOT, TIMESTAMP, *sorted(delegated)):
            keyids = (delegated[role] if role in delegated else root.roles[role]).keyids
            found = self._load(Signed, role)  # type: ignore[type-abstract]
            yield role, found.version, found.expires, tuple(map(self._key_file, keyids))

    # Files.

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with storage.locked(self.folder / ".lock"):
            yield

    def _file(self, channel: str, name: str, digest: str) -> Path:
        folder, _, last = target(channel, name).rpartition("/")
        return self.targets / folder / f"{digest}.{last}"

    def _highest(self, channel: str, name: str) -> int:
        """The highest version of an adapter in any release of a channel."""
        return max(release.adapters.get(name, 0) for release in self.releases(channel))

    def _add(
        self,
        channel: str,
        files: Mapping[str, Path],
        adapters: Mapping[str, int],
        instead: Mapping[str, bytes] | None = None,
    ) -> Release:
        """Add files and sign them as the next release; ``instead`` has the content of some of them."""
        digests, listed = {}, {}
        for name, path in files.items():
            content = (instead or {}).get(name)
            stored = self._store(channel, name, path) if content is None else self._write(channel, name, content)
            digests[name], listed[target(channel, name)] = stored.hashes["sha256"], stored
        last = self.release(channel)
        made = self.now.isoformat(timespec="seconds")
        release = Release(last.number + 1 if last else 1, made, digests, dict(adapters))
        listed[target(channel, RELEASE)] = self._write(channel, RELEASE, release.encode())
        signed = self._load(Targets, channel)
        signed.targets = listed
        self._commit({channel: signed})
        return release

    def _store(self, channel: str, name: str, path: Path) -> TargetFile:
        """Copy a file among the targets, under the digest of what was copied."""
        work = self.targets / ".incoming"
        shutil.copyfile(path, work)  # a link would change with a file that is written again
        digest, size = storage.file_sha256(work), work.stat().st_size
        if size > MAX_BASE_FILE:
            raise DataError(f"{path} has {size} bytes, more than a bundle's file can have", about=path.name)
        place = self._file(channel, name, digest)
        place.parent.mkdir(parents=True, exist_ok=True)
        work.chmod(storage.PUBLIC)
        with work.open("r+b") as file:
            storage.flush(file)
        work.replace(place)
        storage.sync(place.parent)
        return TargetFile(size, {"sha256": digest}, target(channel, name))

    def _write(self, channel: str, name: str, content: bytes) -> TargetFile:
        described = TargetFile.from_data(target(channel, name), content, ["sha256"])
        place = self._file(channel, name, described.hashes["sha256"])
        place.parent.mkdir(parents=True, exist_ok=True)
        storage.replace(place, content, storage.PUBLIC)
        return described

    # Metadata and keys.

    def _new_key(self, entropy: Entropy) -> CryptoSigner:
        key = IdentityKey.generate(entropy)
        signer = _signer(key)
        storage.create(self._key_file(signer.public_key.keyid), key.to_pem())
        return signer

    def _key_file(self, keyid: str) -> Path:
        return self.folder / KEYS / f"{keyid[:16]}.pem"

    def _signers(self, keyids: Sequence[str]) -> list[CryptoSigner]:
        found = []
        for keyid in keyids:
            if not self._key_file(keyid).is_file():
                reason = f"{self._key_file(keyid)} must sign this and is not there: bring the key back for it"
                raise ConfigError(reason, about="keys", value=keyid)
            found.append(_signer(read_key(self._key_file(keyid))))
        return found

    def _delegate(self, top: Targets, channel: str, entropy: Entropy) -> Targets:
        """Give a new channel the right to sign its files; its first, empty metadata."""
        key = self._new_key(entropy)
        patterns = [target(channel, pattern) for pattern in ("*", "*/*")]  # a star does not match a slash
        role = DelegatedRole(channel, [], 1, terminating=True, paths=patterns)
        delegations = top.delegations or Delegations({}, {})
        delegations.roles = {**(delegations.roles or {}), channel: role}
        top.delegations = delegations
        top.add_key(key.public_key, channel)
        return Targets()

    def _commit(
        self,
        channels: Mapping[str, Targets],
        root: Root | None = None,
        top: Targets | None = None,
        also: Sequence[CryptoSigner] = (),
    ) -> None:
        """Sign and write the next version of each role that is given, then of snapshot and timestamp.

        ``also``: further signers of the root, whose keys it no longer names.
        """
        keys, delegated = root or self._load(Root, ROOT), _delegations(top or self._load(Targets, TOP))
        snapshot = self._load(Snapshot, SNAPSHOT) if self._version(SNAPSHOT) else Snapshot()
        timestamp = self._load(Timestamp, TIMESTAMP) if self._version(TIMESTAMP) else Timestamp()
        changed: list[tuple[str, Signed]] = [(ROOT, root)] if root else []
        changed += [*([(TOP, top)] if top else []), *channels.items(), (SNAPSHOT, snapshot), (TIMESTAMP, timestamp)]
        signers = []
        for role, signed in changed:
            signed.version = self._version(role) + 1
            signed.expires = self.now.replace(microsecond=0) + timedelta(days=DAYS.get(role, LONG_DAYS))
            if role not in (ROOT, SNAPSHOT, TIMESTAMP):
                snapshot.meta[f"{role}.json"] = MetaFile(signed.version)
            signers.append(self._signers((delegated[role] if role in delegated else keys.roles[role]).keyids))
        timestamp.snapshot_meta = MetaFile(snapshot.version)
        for (role, signed), own in zip(changed, signers, strict=True):  # all keys are there
            metadata: Metadata[Any] = Metadata(cast(Any, signed))
            for signer in (*own, *(also if role == ROOT else ())):
                metadata.sign(signer, append=True)
            storage.replace(self._path(role, signed.version), metadata.to_bytes(), storage.PUBLIC)

    def _path(self, role: str, version: int) -> Path:
        return self.metadata / ("timestamp.json" if role == TIMESTAMP else f"{version}.{role}.json")

    def _version(self, role: str) -> int:
        """The current version of a role; 0 before the first."""
        if role == ROOT:
            return max((int(path.name.partition(".")[0]) for path in self.metadata.glob("*.root.json")), default=0)
        if not self._path(TIMESTAMP, 0).exists():
            return 0
        timestamp = self._read(Timestamp, self._path(TIMESTAMP, 0))
        if role == TIMESTAMP:
            return timestamp.version
        version = timestamp.snapshot_meta.version
        if role == SNAPSHOT:
            return version
        known = self._read(Snapshot, self._path(SNAPSHOT, version)).meta.get(f"{role}.json")
        return known.version if known else 0

    def _load(self, kind: type[S], role: str, version: int | None = None) -> S:
        return self._read(kind, self._path(role, version or self._version(role)))

    @staticmethod
    def _read(kind: type[S], path: Path) -> S:
        """Metadata that this repository wrote; signatures are for those who get them from elsewhere."""
        try:
            signed = Metadata.from_bytes(storage.read(path, MAX_METADATA)).signed
        except (OSError, RepositoryError) as error:
            raise DataError(f"{path} is missing or damaged: restore the repository", about=path.name) from error
        if not isinstance(signed, kind):
            raise DataError(f"{path} is of another role: restore the repository", about=path.name)
        return signed

    def _release_of(self, channel: str, signed: Targets) -> Release | None:
        found = signed.targets.get(target(channel, RELEASE))
        if found is None:
            return None
        return Release.decode(storage.read(self._file(channel, RELEASE, found.hashes["sha256"]), MAX_RELEASE))


def pinned_keys(bundle: Path, trust: Path | None) -> tuple[PublicKey, ...]:
    """The keys that sign ``bundle``, in ``trust`` or in ``trust.pem`` next to it. Raises as ``read_public_keys``."""
    return read_public_keys(trust or bundle.resolve().parent / TRUST)


def _signer(key: IdentityKey) -> CryptoSigner:
    return CryptoSigner(Ed25519PrivateKey.from_private_bytes(key.raw))


def _delegations(top: Targets) -> Mapping[str, DelegatedRole]:
    """The channels by name."""
    return (top.delegations and top.delegations.roles) or {}


def _require_newer(new: AdapterManifest, current: AdapterManifest) -> None:
    """Return if devices that have ``current`` would accept ``new``."""
    if new.base_digest == current.base_digest and (
        new.version < current.version or (new.version == current.version and new.content != current.content)
    ):
        raise ConfigError(
            f"devices have version {current.version} of adapter {new.name!r} and would refuse this version "
            f"{new.version}: export it under the version {current.version + 1} or later",
            about="adapter-manifest.version",
            value=new.version,
        )
