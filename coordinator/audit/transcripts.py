"""Transcripts as an auditor opens them: which logs, whom they must rely on, what was published, and what is wrong."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Self, TypeVar

from adapters import registryfiles, storage
from adapters.registryfiles import RegistryFiles
from aggregation.errors import DataError, TrustError, of_file
from aggregation.pki import Root
from aggregation.pki.identity import PublicKey
from aggregation.pki.revocation import RevocationList
from coordinator.audit.auditor import Check, Finding, Report, Status, audit, chain
from coordinator.audit.recompute import Remake
from coordinator.recorder import vector_path
from coordinator.settings import SETTINGS, FederationSettings
from coordinator.transcripts import AUTHORITY, COORDINATOR, REVOKED, VECTORS, logs

PLACES = (".", "transcript", "coordinator/transcript")  # a folder of transcripts, a coordinator's home, a run
LARGEST = 2**22  # bytes of a certificate, a key or a revocation list

Pinned = TypeVar("Pinned", Root, PublicKey, RevocationList)


@dataclass(frozen=True, slots=True)
class AuditedTranscript:
    """Logs to check, and whom they must rely on.

    Args:
        paths: The logs, in order.
        root: The authority, with the revocation list that counts.
        coordinator: Its key.
        given: The authority and the coordinator's key came from the auditor, and not with the transcript.
        at: When the sessions took place, where that is known.
        adapters: Checks what the coordinator published, where its state directory is at hand.
        whole: These are all the sessions of a coordinator, as far as anyone says.
    """

    paths: tuple[Path, ...]
    root: Root
    coordinator: PublicKey
    given: bool
    at: datetime | None
    adapters: Remake | None
    whole: bool

    @classmethod
    def open(cls, path: Path, given: "Given") -> Self:
        """Find the logs at ``path``.

        Raises:
            DataError: There are none, or the registry given is none.
            TrustError: The authority's certificate or list, or the coordinator's key, is missing or damaged.
        """
        whole = not path.is_file()
        paths = _find(path) if whole else (path,)
        folder = paths[0].parent
        root = _pinned(Root.from_pem, given.authority, folder / AUTHORITY, "--authority")
        key = _pinned(PublicKey.from_pem, given.coordinator, folder / COORDINATOR, "--coordinator")
        if (folder / REVOKED).exists():
            _pinned(root.revocations, None, folder / REVOKED, "--revoked")
        if given.revoked:
            listed = _pinned(root.revocations, given.revoked, given.revoked, "--revoked")
            root = _as_of(replace(root, revoked=listed), given.at)
        beside = folder.parent if (folder.parent / registryfiles.DATABASE).exists() else None
        adapters = _remake(given.registry or beside, key)
        return cls(paths, root, key, bool(given.authority and given.coordinator), given.at, adapters, whole)

    def audit(self, *, unfinished: bool) -> dict[str, Report]:
        """Name of a log → its report; the last one may be ``unfinished``."""
        vectors = partial(_vector, self.paths[0].parent / VECTORS)
        reports = {}
        for path in self.paths:
            last = path == self.paths[-1]
            raw = storage.read(path)
            report = audit(raw, self.root, self.coordinator, vectors, at=self.at, unfinished=unfinished and last)
            finding = _adapters(report, self.adapters)
            made = tuple(replace(each, values=None) for each in report.made)  # which take memory
            reports[path.name] = replace(report, findings=(*report.findings, finding), made=made)
        return reports

    @property
    def relied_on(self) -> dict[str, str]:
        """Fingerprints of the authority's certificate and of the coordinator's key, to compare with pinned ones."""
        return {"authority": hashlib.sha256(self.root.der).hexdigest(), "coordinator": self.coordinator.key_id}


@dataclass(frozen=True, slots=True)
class Given:
    """What an auditor brings along; what it does not, is taken from beside the logs or is not checked."""

    authority: Path | None
    coordinator: Path | None
    revoked: Path | None
    registry: Path | None
    at: datetime | None


def _as_of(root: Root, at: datetime | None) -> Root:
    """The root as it was at that time: what was revoked later still counted."""
    if root.revoked is None or at is None:
        return root
    then = {serial: since for serial, since in root.revoked.revoked.items() if since.at <= at}
    return replace(root, revoked=replace(root.revoked, revoked=then))


def _remake(state_dir: Path | None, key: PublicKey) -> Remake | None:
    if state_dir is None:
        return None
    registry = RegistryFiles.open(state_dir, [key])
    return Remake(registry, FederationSettings.read(state_dir / SETTINGS).server.rule())


def _adapters(report: Report, remake: Remake | None) -> Finding:
    if report.failed:
        return Finding(Check.ADAPTERS, Status.NOT_REACHED, "")
    if remake is None:
        return Finding(Check.ADAPTERS, Status.SKIPPED, "the published adapters are not at hand (--registry)")
    return remake.check(report.made)


def _find(path: Path) -> tuple[Path, ...]:
    for place in PLACES:
        if found := logs(path / place):
            return tuple(found)
    raise DataError(f"{path} holds no transcript: give a session's log, a coordinator's home, or the folder of a run")


def _pinned(read_as: Callable[[bytes], Pinned], given: Path | None, beside: Path, option: str) -> Pinned:
    """What the auditor brought along; else what lies beside the logs, which must be as the coordinator wrote it.

    Raises:
        TrustError: It is missing or damaged.
    """
    path = given or beside
    try:
        raw = storage.read(path, LARGEST)
    except FileNotFoundError:
        raise TrustError(f"{path} is missing: say with {option} where it is") from None
    with of_file(path):
        found = read_as(raw)
    if given is None and found.to_pem() != raw:
        raise TrustError(f"{path} was altered after the coordinator wrote it: get it anew")
    return found


def _vector(folder: Path, digest: bytes) -> bytes | None:
    try:
        return storage.read(vector_path(folder, digest))
    except FileNotFoundError:
        return None


def first_error(opened: AuditedTranscript, reports: Mapping[str, Report], *, unfinished: bool) -> str | None:
    """What is wrong with the sessions, each by itself and all together; None if nothing is."""
    for name, report in reports.items():
        try:
            report.require()
        except TrustError as error:
            return f"{name}: {error}"
    try:
        if opened.whole:
            chain(reports)
        if opened.whole and opened.adapters and not unfinished:
            _complete(opened.adapters.registry, reports)
    except (TrustError, DataError) as error:
        return str(error)
    return None


def _complete(registry: RegistryFiles, reports: Mapping[str, Report]) -> None:
    """Return if the newest adapter of a registry is in the logs: one is logged before it is published."""
    logged = max((made.after[0] for report in reports.values() for made in report.made), default=0)
    newest = registry.manifest()
    if newest is None:
        raise DataError(f"{registry.folder / registryfiles.DATABASE} holds no adapter")
    if newest.version > logged:
        raise TrustError(
            f"adapter {newest.version} was published, and no log says how it was made: a session's log is missing"
        )
