"""The files of an audit: a coordinator's logs, the keys to check them with, and its registry.

    transcript/
      authority.pem, coordinator.pem   the keys of the sessions: public, to compare with those that devices pin
      revoked.crl                      the authority's revocation list in the newest session, where there is one
      session-000001.log               see ``aggregation.transcript``; each session's checkpoints name the previous one
      vectors/SHA256.bin               masked vectors, where the operator keeps them

``coordinator.transcripts`` writes this folder, under the names defined here.

The signed records of the rounds in the registry, compared with the logs: which rounds and sessions there were.

Logs name their predecessors, so a log that is left out is missed in the next one; the last one is not. Nor does a log
show that a round in it had another ending. Every record is written before its round's ending is logged, and names the
session and the plan, also of an aborted round."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Self, TypeVar

from aggregation.errors import DataError, TrustError, of_file
from aggregation.pki import Root
from aggregation.pki.identity import PublicKey
from aggregation.pki.revocation import RevocationList
from edgeadapt.auditing.account import Account, audited, require_recorded
from edgeadapt.auditing.auditor import audit, chain
from edgeadapt.auditing.findings import Check, Finding, NotClosedError, Report, RoundSummary, Status
from edgeadapt.auditing.recompute import Recomputation
from edgeadapt.auditing.weaknesses import RepeatedSums, Weaknesses
from edgeadapt.formats import storage
from edgeadapt.formats.manifest import INTERRUPTED, PrivacyBound, RoundRecord, VersionManifest
from edgeadapt.formats.registryfiles import AUTHORITY, DATABASE, PUBLIC_KEY, REGISTRY, REVOKED, SUMS, RegistryFiles
from edgeadapt.formats.registryreader import open_registry_files

VECTORS = "vectors"  # folder
COORDINATOR = "coordinator"  # folder of a run
PLACES = (".", "transcript", f"{COORDINATOR}/transcript")  # in a folder of transcripts, a state directory, a run
LARGEST = 2**22  # bytes of a certificate, a key or a revocation list
_LOGS = "session-*.log"

Pinned = TypeVar("Pinned", Root, PublicKey, RevocationList)


def require_logged(
    before: Sequence[RoundRecord], after: Sequence[RoundRecord], reports: Mapping[str, Report], *, unfinished: bool
) -> None:
    """Check that the logs have each recorded round, once, in its order and as it was recorded, and no other round.

    A coordinator may continue while it is audited. It writes a record before the ending, so what was recorded before
    the logs were read is in them, and what ended in them is recorded after that. Only the round that is under way then
    may have a record and no ending. The log was synced before the record was written, and so ends where that says. A
    round in which the coordinator's process ended has no record: the next start logs it as interrupted. ``before``: all
    rounds, as the registry had them before the logs were read. ``after``: as it had them after that. ``unfinished``:
    the last session is under way. Raises TrustError: the log of a session, a round or its ending is missing, or a round
    has no record."""
    logged = {(report.offer, each.plan): each for report in reports.values() for each in report.rounds}
    *_, last = reports.values()
    open_round = {(last.offer, last.open_plan)} if unfinished else set()
    _require_recorded(before, {report.offer: report.entries for report in reports.values()}, logged)
    recorded = {(record.offer, record.plan) for record in after}
    for (offer, plan), each in logged.items():
        if (offer, plan) not in recorded | open_round and each.reason != INTERRUPTED:
            text = f"a round that the log says {each.ending} is not recorded in the registry"
            raise TrustError(text, about="record")


def require_published(
    records: Sequence[RoundRecord], manifest_of: Callable[[int], VersionManifest | None], reports: Mapping[str, Report]
) -> None:
    """Check that each record and the manifest of its version say the same, and version 0 is of no round.

    ``records``: all rounds whose logs are there. ``manifest_of``: version → its manifest. ``reports``: name → report of
    all logs. A record has the ε of a round, and the offer of its session the δ. Raises TrustError: they do not, or a
    manifest is missing."""
    seed = manifest_of(0)
    if seed is None or seed.round or seed.parent or seed.plan or seed.survivors or seed.metrics or seed.privacy:
        raise TrustError("adapter 0 is missing, or its manifest says that a round made it", about="manifest")
    deltas = {each.offer: each.spec.privacy.delta for each in reports.values() if each.spec and each.spec.privacy}
    for record in records:
        manifest = None if record.version is None else manifest_of(record.version)
        made = record.version is None or (manifest is not None and record.made(manifest))
        stated = (manifest.metrics, manifest.privacy) if manifest else ({}, None)
        bound = _bound(record, deltas.get(record.offer)) if manifest else None
        if not made or (record.metrics, bound) != stated:
            text = f"the record of round {record.round} and the manifest of its adapter contradict each other"
            raise TrustError(text, about="record")


def _bound(record: RoundRecord, delta: float | None) -> PrivacyBound | None:
    return None if record.epsilon is None or delta is None else PrivacyBound(record.epsilon, delta)


def _require_recorded(
    records: Sequence[RoundRecord], sizes: Mapping[str, int], logged: Mapping[tuple[str, str], RoundSummary]
) -> None:
    places, last = {key: place for place, key in enumerate(logged)}, -1
    for record in records:
        if record.offer not in sizes:
            text = f"round {record.round} was recorded, and the log of its session is missing"
            raise TrustError(text, about="session")
        if record.plan is None:
            continue
        summary = logged.get((record.offer, record.plan))
        if _is_cut(sizes[record.offer], record):
            text = f"round {record.round} was recorded, and the end of its session's log was cut off"
            raise TrustError(text, about="session.cut")
        if summary is None or not (_agrees_so_far if summary.open else _agrees)(record, summary):
            text = f"round {record.round} was recorded with another ending, or after other entries, than its log has"
            raise TrustError(text, about="record")
        place = places[record.offer, record.plan]
        if place <= last:
            text = f"round {record.round} was recorded twice, or in another order than the logs have"
            raise TrustError(text, about="record")
        last = place


def _is_cut(size: int, record: RoundRecord) -> bool:
    """Check whether a log of so many entries lacks some that a record names: so one that is open is not just open."""
    return size < record.entries


def _agrees(record: RoundRecord, logged: RoundSummary) -> bool:
    """Check whether a record and a log say the same of a round. Costs and dropouts are the record's only."""
    adapter = (record.version, record.adapter) if record.version is not None else None
    survivors = logged.survivors if logged.result else ()
    groups = logged.groups if logged.result and logged.dealt else ()
    if tuple(each.survivors for each in record.groups) != groups or not _in_time(record, logged):
        return False
    expected = logged.entries, logged.root, logged.reason, logged.result, logged.sum, survivors
    return (record.entries, record.root, record.reason, adapter, record.sum, record.survivors) == expected


def _in_time(record: RoundRecord, logged: RoundSummary) -> bool:
    if record.ended is None:
        return True
    return (logged.began or 0) <= record.ended and (logged.ended is None or record.ended <= logged.ended)


def _agrees_so_far(record: RoundRecord, logged: RoundSummary) -> bool:
    """Check whether an open round's log ends where its record says, and shows that the recorded sum was unmasked."""
    survivors = logged.unmasked if record.version is not None else ()
    return (
        _in_time(record, logged)
        and (record.entries, record.root, record.survivors) == (logged.entries, logged.root, survivors)
        and (record.version is None or len(survivors) > 0)
    )


def log_name(number: int) -> str:
    return f"session-{number:06}.log"


def log_number(path: Path) -> int:
    return int(path.stem.partition("-")[2])


def logs(folder: Path) -> list[Path]:
    """List the logs in a folder of transcripts, in the order of their sessions. A file with another name is not one."""
    named = [path for path in folder.glob(_LOGS) if path.stem.partition("-")[2].isdecimal()]
    return sorted((path for path in named if path.name == log_name(log_number(path))), key=log_number)


def vector_path(folder: Path, digest: bytes) -> Path:
    return folder / f"{digest.hex()}.bin"


@dataclass(frozen=True, slots=True)
class AuditOptions:
    """Holds what an auditor provides. A missing key is taken from the transcript; without the others less is checked.
    ``registry`` is the coordinator's state directory. The sessions took place ``at`` that time; None: when their logs
    say."""

    authority: Path | None = None
    coordinator: Path | None = None
    revoked: Path | None = None
    registry: Path | None = None
    at: datetime | None = None


@dataclass(frozen=True, slots=True)
class AuditInput:
    """Holds logs to check, and what to check them with. ``records`` were read before the logs, which a session
    continues."""

    paths: tuple[Path, ...]  # the logs, in order
    root: Root  # the authority, with the revocation list that counts
    coordinator: PublicKey
    pinned: bool  # authority and coordinator's key come from the auditor, and not from the transcript
    at: datetime | None  # when the sessions took place; None: when their logs say
    registry: RegistryFiles | None  # where the coordinator published its adapters, if it is available
    published: VersionManifest | None  # the newest adapter there
    records: tuple[RoundRecord, ...]
    complete: bool  # these are all the sessions of the coordinator, not a single log

    @classmethod
    def open(cls, path: Path, options: AuditOptions) -> Self:
        """Find the logs, and read the keys.

        ``path`` is a log, a folder of transcripts, a coordinator's state directory, or the folder of a run. Raises
        ConfigError: the folder of ``options.registry`` has no registry; DataError: there is no log, or there are logs
        in several places; or a file is too large; TrustError: a certificate, a key or a list is missing or damaged; or
        the registry is damaged or empty."""
        complete = not path.is_file()
        paths = _find(path) if complete else (path,)
        folder = paths[0].parent
        root = _read(Root.from_pem, options.authority, folder / AUTHORITY, "--authority")
        key = _read(PublicKey.from_pem, options.coordinator, folder / PUBLIC_KEY, "--coordinator")
        pinned = bool(options.authority and options.coordinator)
        has_registry = any((folder.parent / name).exists() for name in (DATABASE, REGISTRY))
        state_dir = options.registry or (folder.parent if has_registry else None)
        root = _with_revocations(root, options, folder, state_dir)
        if state_dir is None:
            return cls(paths, root, key, pinned, options.at, None, None, (), complete)
        registry = open_registry_files(state_dir, [key])
        return cls(paths, root, key, pinned, options.at, registry, *_state(registry), complete)

    def audit(self, *, unfinished: bool) -> dict[str, Report]:
        """Map each log's name to its report, in order. ``unfinished`` accepts that the last one is not closed."""
        vectors = partial(_vector, self.paths[0].parent / VECTORS)
        recomputation = Recomputation(self.registry) if self.registry else None
        reports, sums, spent, weaknesses = dict[str, Report](), RepeatedSums(), Account(), Weaknesses()
        for path in self.paths:
            accepted = unfinished and path == self.paths[-1]
            report = audit(storage.read(path), self.root, self.coordinator, vectors, at=self.at, unfinished=accepted)
            repeats, adapters = _repeats(path.name, report, sums), _adapters(report, recomputation, self.published)
            spent, report = audited(spent, replace(report, findings=(*report.findings, repeats)))
            still = recomputation.still if recomputation else {}
            report = replace(report, findings=(*report.findings, *weaknesses.check(report, still)))
            produced = tuple(replace(each, sums=None) for each in report.produced)  # the sums take memory
            reports[path.name] = replace(report, findings=(*report.findings, adapters), produced=produced)
        return reports

    def require(self, reports: Mapping[str, Report], *, unfinished: bool) -> None:
        """Check that every session passed and that a complete set lacks none. Raises TrustError; NotClosedError if all
        of that holds and the last log has no end, which ``unfinished`` accepts."""
        *_, (latest, last) = reports.items()
        for name, report in reports.items():
            with of_file(name):
                report.require()
        unmade = _unmade(self.registry, self.published) if self.registry and self.published else None
        if self.complete:
            chain(reports, unmade)
        if self.complete and self.registry and self.published:
            _require_logged(self.published, unmade or {}, self.records, reports)
            require_logged(self.records, _state(self.registry)[1], reports, unfinished=not last.closed)
            require_recorded(self.records, reports)
            require_published(self.records, self.registry.manifest, reports)
        if not unfinished and not last.closed:
            text = f"{latest} is not closed: its session is under way, was stopped, or was restored from a backup"
            raise NotClosedError(f"{text} (--unfinished accepts that)", about="log.open")

    @property
    def unread(self) -> tuple[str, ...]:
        """List what lies next to the logs and is not audited: for example a session's log under another name."""
        read = {*(path.name for path in self.paths), AUTHORITY, PUBLIC_KEY, REVOKED, VECTORS}
        return tuple(sorted(path.name for path in self.paths[0].parent.iterdir() if path.name not in read))

    @property
    def fingerprints(self) -> dict[str, str]:
        """Return the authority's SHA-256 and the coordinator's key id, to compare with pinned ones."""
        return {"authority": hashlib.sha256(self.root.der).hexdigest(), "coordinator": self.coordinator.key_id}


def _with_revocations(root: Root, options: AuditOptions, folder: Path, state_dir: Path | None) -> Root:
    """Add the revocation list that the auditor provides, if there is one, to the root.

    Lists have the authority's signature and count upwards, so one in ``folder`` or in the coordinator's state directory
    under a higher number shows that the auditor's is old: it lacks the revocations in between. Raises TrustError: a
    list is damaged, or the auditor's is older than one of the coordinator and than the time of the sessions, or differs
    from one with its number. One that was signed later is not refused: it has the earlier revocations too, but of
    certificates that expired before it was signed."""
    stored = [(None, folder / REVOKED), *([(state_dir / REVOKED,) * 2] if state_dir else [])]
    lists = [_read(root.revocations, given, path, "--revoked") for given, path in stored if path.exists()]
    if options.revoked is None:
        return root
    crl = _read(root.revocations, options.revoked, options.revoked, "--revoked")
    with of_file(options.revoked):
        for known in lists:
            # One that was signed since has all until then. Two under one number are a mistake whenever that was.
            if options.at is None or crl.this_update < options.at or crl.number == known.number:
                crl.newer_than(known)
    return replace(root, revoked=crl)


def _repeats(log: str, report: Report, sums: RepeatedSums) -> Finding:
    if report.failed:
        return Finding(Check.REPEATS, Status.NOT_REACHED, "")
    return sums.check(log, report.rounds)


def _adapters(report: Report, recomputation: Recomputation | None, published: VersionManifest | None) -> Finding:
    if report.failed:
        return Finding(Check.ADAPTERS, Status.NOT_REACHED, "")
    if recomputation is None:
        text = "the published adapters are not available (--registry)"
        return Finding(Check.ADAPTERS, Status.SKIPPED, text, about="--registry")
    finding = recomputation.check(report)
    if finding.status is Status.FAIL or report.open_plan is None or not published or published.plan != report.open_plan:
        return finding
    text = f"{finding.text}. Adapter {published.version} is not audited: its round has no ending in the log yet"
    return replace(finding, status=Status.WARNING, text=text, about="round.open")


def _find(path: Path) -> tuple[Path, ...]:
    if path.name == SUMS or any((path / place / SUMS).is_dir() for place in (".", COORDINATOR)):
        text = f"{path} has no transcript, for its sums have no masks: run the simulation with --engine protocol"
        raise DataError(text, about="transcript")
    logs_by_place = {place: tuple(logs(path / place)) for place in PLACES}
    places = [place for place, paths in logs_by_place.items() if paths]
    if len(places) == 1:
        return logs_by_place[places[0]]
    text = f"{path} has no transcript: name a session's log, a coordinator's state directory, or the folder of a run"
    if places:
        text = f"{path} has logs in {' and in '.join(places)}: name the folder of the coordinator that is to be audited"
    raise DataError(text, about="transcript")


def _read(parse: Callable[[bytes], Pinned], provided: Path | None, stored: Path, option: str) -> Pinned:
    """Read the auditor's file; else the one in the transcript, which must be as the coordinator wrote it."""
    path = provided or stored
    try:
        raw = storage.read(path, LARGEST)
    except FileNotFoundError:
        raise TrustError(f"{path} is missing: name the file with {option}", about=option) from None
    with of_file(path):
        pinned = parse(raw)
    if provided is None and pinned.to_pem() != raw:
        raise TrustError(f"{path} was altered after the coordinator wrote it: copy it again", about=path.name)
    return pinned


def _vector(folder: Path, digest: bytes, size: int) -> bytes | None:
    try:
        return storage.read(vector_path(folder, digest), size)
    except FileNotFoundError:
        return None


def _state(registry: RegistryFiles) -> tuple[VersionManifest, tuple[RoundRecord, ...]]:
    """Read the newest manifest, and the records of all rounds. Raises TrustError if there is none."""
    try:
        newest, records = registry.manifest(), registry.rounds()
    except DataError as error:
        raise TrustError(str(error), about=error.about) from None
    if newest is None:
        raise TrustError(f"{registry.source.name} has no adapter: restore it from a copy", about=DATABASE)
    return newest, records


def _unmade(registry: RegistryFiles, published: VersionManifest) -> dict[int, str]:
    """Map the versions that no round made to their digests. Raises TrustError: one is neither version 0 nor the first
    on another base than the version before it."""
    unmade, before = dict[int, str](), None
    for number in range(published.version + 1):
        manifest = registry.manifest(number)
        if manifest is not None and manifest.plan is None:
            if number and not (before and manifest.begins_after(before)):
                text = f"adapter {number} is of no round, and not the first on another base"
                raise TrustError(text, about="manifest")
            unmade[number] = manifest.sha256
        before = manifest
    return unmade


def _require_logged(
    published: VersionManifest, unmade: Mapping[int, str], records: Sequence[RoundRecord], reports: Mapping[str, Report]
) -> None:
    """Check that the logs have the newest adapter that a round made. Raises TrustError. A session under way records a
    round before it logs the result, so there the open round may have made it."""
    *_, last = reports.values()
    logged = max((report.newest[0] for report in reports.values() if report.newest), default=0)
    under_way = any(record.made(published) for record in records if record.plan == last.open_plan)
    newest = max((number for number in range(published.version + 1) if number not in unmade), default=0)
    if newest > logged + under_way:
        text = f"adapter {newest} was published and is in no log: the log of a session is missing"
        raise TrustError(text, about="session")
