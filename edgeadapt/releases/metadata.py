"""The signed metadata of a repository's roles, the keys that sign them, and the log of what was done. ``commit`` signs
the next version of what changed. Files are written before the metadata that name them, and ``timestamp.json`` last: a
kill leaves the old repository or the new one."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from securesystemslib.signer import CryptoSigner
from tuf.api import metadata as tuf
from tuf.api.exceptions import RepositoryError

from aggregation.entropy import Entropy
from aggregation.errors import ConfigError, DataError
from aggregation.pki.identity import IdentityKey
from edgeadapt.formats import storage
from edgeadapt.formats.keyfiles import read_key
from edgeadapt.formats.release import METADATA, STABLE, target
from edgeadapt.releases.actions import Action, ActionRecord, LogHead, action_path, digest_of

ROOT, TOP, SNAPSHOT, TIMESTAMP = "root", "targets", "snapshot", "timestamp"
DAYS = {SNAPSHOT: 30, TIMESTAMP: 7}  # a device that was shown old metadata notices after them
LONG_DAYS = 365  # the keys of these roles are offline
PUBLIC, KEYS = "public", "keys"
MAX_METADATA = 2**22  # bytes
PROTECTED = "x-edgeadapt-protected"  # field of a channel in the targets: only promotions make its releases
ROLLBACK = "x-edgeadapt-rollback"  # field of a channel's metadata that were prepared: on what they may be published
S = TypeVar("S", bound=tuf.Signed)


@dataclass(frozen=True, slots=True)
class TargetFiles:
    """Keeps files among the targets in ``folder``, each once, as ``CHANNEL/DIGEST.NAME`` (consistent snapshots)."""

    folder: Path
    limit: int  # bytes of a file

    def path(self, channel: str, name: str, digest: str) -> Path:
        folder, _, last = target(channel, name).rpartition("/")
        return self.folder / folder / f"{digest}.{last}"

    def stored(self, channel: str, name: str, digest: str) -> tuf.TargetFile:
        """Describe a file that is there. Raises DataError if it is not."""
        place = self.path(channel, name, digest)
        if not place.is_file():
            raise DataError(f"{place} is missing: restore the repository", about=place.name)
        return tuf.TargetFile(place.stat().st_size, {"sha256": digest}, target(channel, name))

    def store(self, channel: str, name: str, path: Path) -> tuf.TargetFile:
        """Copy a file, up to the size of a bundle's file, among the targets, under the digest of what was copied."""
        work = self.folder / ".incoming"
        shutil.copyfile(path, work)  # a link would change with a file that is written again
        digest, size = storage.file_sha256(work), work.stat().st_size
        if size > self.limit:
            raise DataError(f"{path} has {size} bytes, more than a bundle's file can have", about=path.name)
        place = self.path(channel, name, digest)
        place.parent.mkdir(parents=True, exist_ok=True)
        work.chmod(storage.PUBLIC)
        with work.open("r+b") as file:
            storage.flush(file)
        work.replace(place)
        storage.sync(place.parent)
        return tuf.TargetFile(size, {"sha256": digest}, target(channel, name))

    def write(self, channel: str, name: str, content: bytes) -> tuf.TargetFile:
        described = tuf.TargetFile.from_data(target(channel, name), content, ["sha256"])
        place = self.path(channel, name, described.hashes["sha256"])
        place.parent.mkdir(parents=True, exist_ok=True)
        storage.replace(place, content, storage.PUBLIC)
        return described


@dataclass(frozen=True, slots=True)
class RoleMetadata:
    """Manages the repository in ``folder``. ``now`` dates what is signed; ``by`` names the signer in the log. Methods
    raise ConfigError if a key that must sign is missing, and DataError if metadata are missing or damaged."""

    folder: Path
    now: datetime
    by: str = ""

    @property
    def place(self) -> Path:
        return self.folder / PUBLIC / METADATA

    def path(self, role: str, version: int) -> Path:
        """Locate one version of a role's metadata; ``timestamp.json`` has one name for all."""
        return self.place / ("timestamp.json" if role == TIMESTAMP else f"{version}.{role}.json")

    def version(self, role: str) -> int:
        """Return the current version of a role; 0 before the first."""
        if role == ROOT:
            return max((int(path.name.partition(".")[0]) for path in self.place.glob("*.root.json")), default=0)
        if not self.path(TIMESTAMP, 0).exists():
            return 0
        timestamp = _read(tuf.Timestamp, self.path(TIMESTAMP, 0))
        if role == TIMESTAMP:
            return timestamp.version
        version = timestamp.snapshot_meta.version
        if role == SNAPSHOT:
            return version
        stated = _read(tuf.Snapshot, self.path(SNAPSHOT, version)).meta.get(f"{role}.json")
        return stated.version if stated else 0

    def load(self, kind: type[S], role: str, version: int | None = None) -> S:
        return _read(kind, self.path(role, version or self.version(role)))

    def roles(self) -> Iterator[tuple[str, int, datetime, tuple[Path, ...]]]:
        """Yield role, version, when its metadata expire, and the files of its keys."""
        root, delegated = self.load(tuf.Root, ROOT), delegations(self.load(tuf.Targets, TOP))
        for role in (ROOT, TOP, SNAPSHOT, TIMESTAMP, *sorted(delegated)):
            keyids = (delegated[role] if role in delegated else root.roles[role]).keyids
            signed = self.load(tuf.Signed, role)  # type: ignore[type-abstract]
            yield role, signed.version, signed.expires, tuple(map(self.key_file, keyids))

    def commit(
        self,
        action: Action,
        channels: Mapping[str, tuf.Targets],
        root: tuf.Root | None = None,
        top: tuf.Targets | None = None,
        also: Sequence[CryptoSigner] = (),
        *,
        prepared: Mapping[str, tuf.Metadata[tuf.Targets]] | None = None,
    ) -> None:
        """Sign and write the next version of each role that is given, then of snapshot and timestamp.

        The action's record is written first, and the snapshot names it. Nothing is written if a key is missing.
        ``also``: further signers of the root, whose keys it no longer names. ``prepared``: name → the next version of a
        channel's metadata, which are signed already."""
        keys, delegated = root or self.load(tuf.Root, ROOT), delegations(top or self.load(tuf.Targets, TOP))
        snapshot = self.load(tuf.Snapshot, SNAPSHOT) if self.version(SNAPSHOT) else tuf.Snapshot()
        timestamp = self.load(tuf.Timestamp, TIMESTAMP) if self.version(TIMESTAMP) else tuf.Timestamp()
        changed: list[tuple[str, tuf.Signed]] = [(ROOT, root)] if root else []
        changed += [*([(TOP, top)] if top else []), *channels.items(), (SNAPSHOT, snapshot), (TIMESTAMP, timestamp)]
        signers = []
        for role, signed in changed:
            signed.unrecognized_fields.pop(ROLLBACK, None)  # from the previous version
            signed.version, signed.expires = self.version(role) + 1, self._expiry(role)
            if role not in (ROOT, SNAPSHOT, TIMESTAMP):
                snapshot.meta[f"{role}.json"] = tuf.MetaFile(signed.version)
            signers.append(self.signers((delegated[role] if role in delegated else keys.roles[role]).keyids))
        ready = {} if prepared is None else prepared
        for role, metadata in ready.items():
            snapshot.meta[f"{role}.json"] = tuf.MetaFile(metadata.signed.version)
        timestamp.snapshot_meta = tuf.MetaFile(snapshot.version)
        versions = {role: metadata.signed.version for role, metadata in ready.items()}
        versions |= {ROOT: self.version(ROOT), **{role: signed.version for role, signed in changed}}
        self._log(action, snapshot, versions, keys)
        for role, metadata in ready.items():
            storage.replace(self.path(role, metadata.signed.version), metadata.to_bytes(), storage.PUBLIC)
        for (role, signed), own in zip(changed, signers, strict=True):  # all keys are there
            document: tuf.Metadata[Any] = tuf.Metadata(cast(Any, signed))
            for signer in (*own, *(also if role == ROOT else ())):
                document.sign(signer, append=True)
            storage.replace(self.path(role, signed.version), document.to_bytes(), storage.PUBLIC)

    def prepare(self, channel: str, signed: tuf.Targets) -> tuf.Metadata[tuf.Targets]:
        """Sign the next version of a channel's metadata by its key, for a later ``commit``."""
        signed.version, signed.expires = self.version(channel) + 1, self._expiry(channel)
        document = tuf.Metadata(signed)
        for signer in self.signers(delegations(self.load(tuf.Targets, TOP))[channel].keyids):
            document.sign(signer, append=True)
        return document

    def _expiry(self, role: str) -> datetime:
        return self.now.replace(microsecond=0) + timedelta(days=DAYS.get(role, LONG_DAYS))

    def _log(self, action: Action, snapshot: tuf.Snapshot, versions: Mapping[str, int], keys: tuf.Root) -> None:
        last = LogHead.of(snapshot)
        moment = self.now.isoformat(timespec="seconds")
        record = ActionRecord(last.number + 1, last.sha256, moment, self.by, dict(versions), action)
        raw = record.sign(read_key(self.key_file(keys.roles[SNAPSHOT].keyids[0])))
        path = action_path(self.folder, record.number)
        path.parent.mkdir(exist_ok=True)
        storage.replace(path, raw, storage.PUBLIC)
        LogHead(record.number, digest_of(raw)).put(snapshot)

    def new_key(self, entropy: Entropy) -> CryptoSigner:
        key = IdentityKey.generate(entropy)
        signer = _signer(key)
        storage.create(self.key_file(signer.public_key.keyid), key.to_pem())
        return signer

    def key_file(self, keyid: str) -> Path:
        return self.folder / KEYS / f"{keyid[:16]}.pem"

    def signers(self, keyids: Sequence[str]) -> list[CryptoSigner]:
        keys = []
        for keyid in keyids:
            if not self.key_file(keyid).is_file():
                reason = f"{self.key_file(keyid)} must sign this and is not there: bring the key back for it"
                raise ConfigError(reason, about="keys")
            keys.append(_signer(read_key(self.key_file(keyid))))
        return keys

    def delegate(self, top: tuf.Targets, channel: str, entropy: Entropy) -> tuf.Targets:
        """Let a new channel sign its files; return its first, empty metadata. ``stable`` is protected."""
        key = self.new_key(entropy)
        patterns = [target(channel, pattern) for pattern in ("*", "*/*")]  # a star does not match a slash
        fields = {PROTECTED: True} if channel == STABLE else {}
        role = tuf.DelegatedRole(channel, [], 1, terminating=True, paths=patterns, unrecognized_fields=fields)
        delegations = top.delegations or tuf.Delegations({}, {})
        delegations.roles = {**(delegations.roles or {}), channel: role}
        top.delegations = delegations
        top.add_key(key.public_key, channel)
        return tuf.Targets()


def delegations(top: tuf.Targets) -> Mapping[str, tuf.DelegatedRole]:
    return (top.delegations and top.delegations.roles) or {}


def protected(top: tuf.Targets) -> frozenset[str]:
    """List the channels whose releases only promotions make."""
    return frozenset(name for name, role in delegations(top).items() if role.unrecognized_fields.get(PROTECTED) is True)


def _signer(key: IdentityKey) -> CryptoSigner:
    return CryptoSigner(Ed25519PrivateKey.from_private_bytes(key.raw))


def _read(kind: type[S], path: Path) -> S:
    """Read metadata that this repository wrote; signatures are for those who get them from elsewhere."""
    try:
        signed = tuf.Metadata.from_bytes(storage.read(path, MAX_METADATA)).signed
    except (OSError, RepositoryError) as error:
        raise DataError(f"{path} is missing or damaged: restore the repository", about=path.name) from error
    if not isinstance(signed, kind):
        raise DataError(f"{path} is of another role: restore the repository", about=path.name)
    return signed
