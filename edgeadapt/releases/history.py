"""Check a repository of channels and its log: what an auditor does.

1. Each root is signed by the keys of the previous root and by its own; the auditor's root is one of them.
2. Timestamp, snapshot, targets and channels are signed as the newest root demands.
3. The snapshot names the newest record. From there back, each record has the digest that the next one states, and is
   signed by a key that a root named for the snapshot.
4. The records account for every version of the metadata of every role, once and in order: nothing was signed without a
   record, and no record speaks of metadata that do not exist. A root is in force from the next record on.
5. A record that made a release has the digest that the channel's metadata of that version list. If it states a rollout,
   they list the flags of that rollout; otherwise none.
6. The verdict of each evaluation is the one that its figures give. Metadata that were prepared for a rollback are
   current only by a record with an evaluation that meets the condition which the channel's key signed in them, and
   that led to no rollback before.
7. No record made a release of a channel that was protected then, unless by a promotion whose gates all let it pass, or
   by a rollback. The targets of that time say which channels are protected.

Expired metadata are no failure: the repository is not renewed, but was not altered. A copy of an earlier state of
everything is consistent with itself: compare the number of actions with the one known before."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Root, Snapshot, Targets, Timestamp

from aggregation.errors import DataError, EdgeAdaptError, TrustError, of_file
from aggregation.pki.identity import PublicKey
from edgeadapt.formats import storage
from edgeadapt.formats.dsse import MAX_ENVELOPE
from edgeadapt.formats.release import FLAGS, METADATA, RELEASE, target
from edgeadapt.releases.actions import LOG, ActionRecord, LogHead, action_path, digest_of
from edgeadapt.releases.metadata import MAX_METADATA, PUBLIC, ROOT, SNAPSHOT, TIMESTAMP, TOP, delegations, protected
from edgeadapt.releases.prepared import RollbackCondition
from edgeadapt.releases.verdict import JudgedEvaluation


@dataclass(frozen=True, slots=True)
class RepositoryAudit:
    """Describes a repository that passed. ``unpromoted``: protected channels → their current release, if that was
    published before the protection."""

    records: tuple[ActionRecord, ...]  # all of its log, oldest first
    pinned: bool  # the root comes from the auditor, not from the repository
    unpromoted: dict[str, int]
    unread: tuple[str, ...]  # files in the log that the snapshot does not name: of an action that was killed


def is_repository(folder: Path) -> bool:
    return (folder / PUBLIC / METADATA).is_dir()


def audit_repository(folder: Path, root: Path | None) -> RepositoryAudit:
    """Check a repository, whose keys need not be there. A TrustError's ``about`` names the role or the record. Without
    ``root``, which the auditor trusts, the repository's own roots are not compared with anything."""
    place = folder / PUBLIC / METADATA
    roots = _roots(place, None if root is None else _required(root, MAX_METADATA))
    newest = roots[-1]
    _signed(newest, TIMESTAMP, timestamp := _metadata(Timestamp, place / "timestamp.json"))
    version = timestamp.signed.snapshot_meta.version
    _signed(newest, SNAPSHOT, snapshot := _current(Snapshot, place, SNAPSHOT, version))
    versions = {name.removesuffix(".json"): meta.version for name, meta in snapshot.signed.meta.items()}
    _signed(newest, TOP, top := _current(Targets, place, TOP, versions.pop(TOP, 0)))
    if set(delegations(top.signed)) != set(versions):
        raise TrustError("the snapshot and the targets name different channels", about=SNAPSHOT)
    for channel, number in versions.items():
        _signed(top, channel, _current(Targets, place, channel, number))
    versions |= {TOP: top.signed.version, SNAPSHOT: version, TIMESTAMP: timestamp.signed.version, ROOT: len(roots)}
    try:
        head = LogHead.of(snapshot.signed)
    except DataError as error:
        raise TrustError(str(error), about=error.about) from error
    keys = {keyid: root.signed.keys[keyid] for root in roots for keyid in root.signed.roles[SNAPSHOT].keyids}
    signers = [PublicKey(bytes.fromhex(key.keyval["public"])) for key in keys.values()]
    records = _records(folder, head, signers)
    _require_all(records, versions)
    for record in records:
        _require_release(place, record)
    unpromoted = _require_promoted(place, records, roots)
    _require_used_once(records)
    named = {action_path(folder, record.number).name for record in records}
    unread = sorted(path.name for path in (folder / LOG).glob("*") if path.name not in named)
    return RepositoryAudit(records, root is not None, unpromoted, tuple(unread))


def rollback_after(evaluation: JudgedEvaluation, records: Sequence[ActionRecord]) -> ActionRecord | None:
    """Return the first rollback that an evaluation led to, among ``records``; None if it led to none."""
    for record in records:
        judged = record.action.evaluation  # of the same round, with any margin
        same = judged is not None and (judged.round, judged.version) == (evaluation.round, evaluation.version)
        if record.action.kind == "rollback" and same:
            return record
    return None


def _roots(place: Path, pinned: bytes | None) -> list[Metadata[Root]]:
    roots: list[Metadata[Root]] = []
    raws: list[bytes] = []
    for number in count(1):
        path = place / f"{number}.{ROOT}.json"
        if not path.exists():
            break
        raws.append(_required(path, MAX_METADATA))
        root = _metadata(Root, path)
        if root.signed.version != number:
            raise TrustError(f"{path} is version {root.signed.version}", about=ROOT)
        for signer in (*roots[-1:], root):
            _signed(signer, ROOT, root)
        roots.append(root)
    if not raws or pinned not in (None, *raws):
        reason = "the repository does not have the pinned root: it is another repository, or its roots were replaced"
        raise TrustError(reason, about=ROOT)
    return roots


def _records(folder: Path, head: LogHead, keys: Sequence[PublicKey]) -> tuple[ActionRecord, ...]:
    records: list[ActionRecord] = []
    expected = head.sha256
    for number in range(head.number, 0, -1):
        path = action_path(folder, number)
        try:
            raw = storage.read(path, MAX_ENVELOPE)
        except (OSError, DataError) as error:
            reason = f"{path} cannot be read, and the log has {head.number} records: restore it from a copy"
            raise TrustError(reason, about="log") from error
        if digest_of(raw) != expected:
            reason = f"{path} is not the record that the one after it, or the snapshot, names: it was altered or moved"
            raise TrustError(reason, about="log")
        with of_file(path):
            record = ActionRecord.accept(raw, keys)
        if record.number != number:
            raise TrustError(f"{path} is record {record.number}", about="log")
        records.append(record)
        expected = record.previous
    if expected is not None or not records:
        raise TrustError("the log does not begin with record 1", about="log")
    return tuple(reversed(records))


def _require_all(records: Sequence[ActionRecord], versions: dict[str, int]) -> None:
    """Check that the records account for every version of every role's metadata, once and in order."""
    signed: dict[str, int] = dict.fromkeys(versions, 0)
    for record in records:
        for role, version in record.metadata.items():
            before = signed.get(role, -1)
            if version != before + 1 and not (role == ROOT and version >= before):  # a rotation may have been killed
                reason = f"record {record.number} signed version {version} of {role}, after {before}"
                raise TrustError(reason, about=role)
            signed[role] = version
    for role, version in versions.items():
        if signed[role] != version:
            reason = f"{role} has version {version}, and the log accounts for {signed[role]}"
            reason += ": something was done without it"
            raise TrustError(reason, about=role)


def _require_release(place: Path, record: ActionRecord) -> None:
    """Check that the metadata that the record signed list the release and the rollout that it states."""
    channel, action = record.action.subject, record.action
    if action.sha256 is None or action.kind == "refuse" or channel is None:
        return
    version = record.metadata.get(channel, 0)
    targets = _current(Targets, place, channel, version).signed.targets
    flags = None if action.rollout is None else hashlib.sha256(action.rollout.encode()).hexdigest()
    for name, what, digest in ((RELEASE, "release", action.sha256), (FLAGS, "rollout", flags)):
        listed = targets.get(target(channel, name))
        if (listed and listed.hashes.get("sha256")) != digest:
            reason = f"version {version} of channel {channel} has another {what} than record {record.number} states"
            raise TrustError(reason, about=channel)


def _require_verdict(place: Path, record: ActionRecord, top: Metadata[Targets]) -> None:
    """Check that an evaluation gives its verdict, and meets the condition in the metadata that it made current.
    ``top``: the targets that were in force then."""
    action = record.action
    try:
        if action.evaluation is not None:
            action.evaluation.require()
        if action.drift is not None:
            action.drift.require()
        for role, version in record.metadata.items():
            if role in (ROOT, TOP, SNAPSHOT, TIMESTAMP):
                continue
            _signed(top, role, current := _current(Targets, place, role, version))
            condition = RollbackCondition.of(current.signed)
            if condition is None:
                continue
            if (action.kind, action.subject, action.again) != ("rollback", role, condition.again):
                raise TrustError(f"{action.kind} signed metadata that were prepared for a rollback", about="rollback")
            condition.require(action.evaluation or action.drift)
    except (DataError, TrustError) as error:
        reason = f"record {record.number} of {action.subject or 'all'}: {error}"
        raise TrustError(reason, about=error.about) from error


def _require_used_once(records: Sequence[ActionRecord]) -> None:
    """Check that no evaluation led to two rollbacks: it said nothing of the second release."""
    for record in records:
        if record.action.kind != "rollback" or (evaluation := record.action.evaluation) is None:
            continue
        first = rollback_after(evaluation, records)
        if first is not None and first.number != record.number:
            reason = f"record {record.number} is a rollback for round {evaluation.round}, as record {first.number} was"
            raise TrustError(reason, about="evaluation")


def _require_promoted(place: Path, records: Sequence[ActionRecord], roots: Sequence[Metadata[Root]]) -> dict[str, int]:
    """Check that only promotions and rollbacks made releases of channels that were protected then. Return the channels
    that are protected now → their current release, if no promotion made it."""
    guarded: frozenset[str] = frozenset()
    promoted: dict[str, dict[int, bool]] = {}
    top: Metadata[Targets] | None = None
    for record in records:
        if (version := record.metadata.get(TOP)) is not None:
            top = _current(Targets, place, TOP, version)
            _signed(roots[record.metadata[ROOT] - 1], TOP, top)
            guarded = protected(top.signed)
        if top is None:
            raise TrustError("the log does not begin with the targets", about="log")
        _require_verdict(place, record, top)
        action, channel = record.action, record.action.subject
        if channel is None or action.release is None or action.kind not in ("publish", "promote", "rollback"):
            continue
        passed = action.kind == "promote" and bool(action.gates) and all(each.passed for each in action.gates)
        if channel in guarded and action.kind != "rollback" and not passed:
            reason = f"release {action.release} of channel {channel} passed no gates, and the channel is protected"
            raise TrustError(reason, about=channel)
        releases = promoted.setdefault(channel, {})
        releases[action.release] = passed or releases.get(action.again or 0, False)
    newest = {channel: max(releases) for channel, releases in promoted.items() if channel in guarded}
    return {channel: number for channel, number in newest.items() if not promoted[channel][number]}


def _current(kind: Any, place: Path, role: str, version: int) -> Metadata[Any]:
    metadata = _metadata(kind, place / f"{version}.{role}.json")
    if metadata.signed.version != version:
        raise TrustError(f"{version}.{role}.json is version {metadata.signed.version}", about=role)
    return metadata


def _metadata(kind: Any, path: Path) -> Metadata[Any]:
    raw = _required(path, MAX_METADATA)
    try:
        metadata: Metadata[Any] = Metadata.from_bytes(raw)
    except (RepositoryError, ValueError, TypeError, KeyError) as error:
        raise TrustError(f"{path} is damaged: restore it from a copy", about=path.name) from error
    if not isinstance(metadata.signed, kind):
        raise TrustError(f"{path} is of another role", about=path.name)
    return metadata


def _signed(signer: Metadata[Any], role: str, metadata: Metadata[Any]) -> None:
    try:
        signer.verify_delegate(role, metadata)
    except (RepositoryError, ValueError) as error:
        raise TrustError(f"the metadata of {role} are not signed by its key ({error})", about=role) from error


def _required(path: Path, limit: int) -> bytes:
    try:
        return storage.read(path, limit)
    except (OSError, EdgeAdaptError) as error:
        raise TrustError(f"{path} cannot be read: restore it from a copy", about=path.name) from error
