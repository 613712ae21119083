"""``edgeadapt audit``: check what a coordinator did from its transcripts alone, without torch or Flower."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

import click

from adapters import storage
from aggregation.audit import Check, Finding, Report, Status, audit, chain, many
from aggregation.certificates import Root
from aggregation.errors import DataError, TrustError, of_file
from aggregation.identity import PublicKey
from aggregation.revocation import RevocationList
from aggregation.transcript import read
from coordinator.published import Published
from coordinator.remake import Remake
from coordinator.transcript import AUTHORITY, COORDINATOR, REVOKED, VECTORS, logs, vector_path

FOLDER = click.Path(path_type=Path)
PLACES = (".", "transcript", "coordinator/transcript")  # a folder of transcripts, a coordinator's home, a run
LARGEST = 2**22  # bytes of a certificate, a key or a revocation list
MARK, INDENT, WIDTH = 13, 30, 90  # columns: of a finding's status, before its text, of its text


Pinned = TypeVar("Pinned", Root, PublicKey, RevocationList)


@dataclass(frozen=True, slots=True)
class Transcript:
    """Logs to check, and whom they must rely on.

    Args:
        paths: The logs, in order.
        root: The authority, with the revocation list that counts.
        coordinator: Its key.
        given: The authority and the coordinator's key came from the auditor, and not with the transcript.
        at: When the sessions took place, where that is known.
        published: What the coordinator published, where it is at hand.
        whole: These are all the sessions of a coordinator, as far as anyone says.
    """

    paths: tuple[Path, ...]
    root: Root
    coordinator: PublicKey
    given: bool
    at: datetime | None
    published: Published | None
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
        home = given.registry or (folder.parent if Published.lies_in(folder.parent) else None)
        published = Published.open(home, key) if home else None
        return cls(paths, root, key, bool(given.authority and given.coordinator), given.at, published, whole)

    def audit(self, *, unfinished: bool) -> dict[str, Report]:
        """Name of a log → its report; the last one may be ``unfinished``."""
        vectors = partial(_vector, self.paths[0].parent / VECTORS)
        remake = Remake(self.published) if self.published else None
        reports = {}
        for path in self.paths:
            last = path == self.paths[-1]
            raw = storage.read(path)
            report = audit(raw, self.root, self.coordinator, vectors, at=self.at, unfinished=unfinished and last)
            finding = _adapters(report, remake)
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


class _Moment(click.DateTime):
    """A time in UTC, or the end of a day: a certificate that is made on a day is not yet valid at its beginning."""

    def __init__(self) -> None:
        super().__init__(("%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"))

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        at: datetime = super().convert(value, param, ctx).replace(tzinfo=UTC)
        return at if "T" in str(value) else at.replace(hour=23, minute=59, second=59)


def _options(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object."),
        click.option("--unfinished", is_flag=True, help="Accept a session that is still under way."),
        click.option(
            "--registry",
            type=FOLDER,
            metavar="DIR",
            help="The coordinator's home, to check the adapters too. Default: the one that the logs lie in.",
        ),
        click.option(
            "--at",
            type=_Moment(),
            metavar="DATE",
            help="When the sessions took place (UTC), to check the dates of certificates; a day without a time is its "
            "end. Default: not checked.",
        ),
        click.option(
            "--revoked",
            type=FOLDER,
            metavar="FILE",
            help="The authority's revocation list; with --at, what was revoked later counts. Default: not checked.",
        ),
        click.option(
            "--coordinator", type=FOLDER, metavar="FILE", help="Its public key, PEM. Default: beside the logs."
        ),
        click.option(
            "--authority", type=FOLDER, metavar="FILE", help="Its certificate, PEM. Default: beside the logs."
        ),
        click.argument("path", type=click.Path(exists=True, path_type=Path)),
    ):
        command = option(command)
    return command


@click.group("audit", context_settings={"help_option_names": ["-h", "--help"]})
def audit_command() -> None:
    """Check from its transcripts that a coordinator kept to the protocol."""


@audit_command.command()
@_options
def verify(path: Path, unfinished: bool, as_json: bool, **options: Any) -> None:
    """Check every session at PATH, and exit with 4 if one does not hold.

    PATH is a session's log, a coordinator's home, or the folder of a run.

    \b
    Examples:
      edgeadapt audit verify runs/demo
      edgeadapt audit verify runs/demo --authority pinned/authority.pem --coordinator pinned/coordinator.pem
      edgeadapt audit verify runs/demo --at 2026-11-25 --revoked runs/demo/revoked.crl
      edgeadapt audit verify transcript/session-000001.log --json
    """
    opened = Transcript.open(path, Given(**options))
    reports = opened.audit(unfinished=unfinished)
    error = _first_error(opened, reports, unfinished=unfinished)
    if as_json:
        click.echo(json.dumps({**_json(opened, reports), "ok": error is None, "error": error}))
    else:
        click.echo("\n".join(_told(opened, reports)))
    _end(error, as_json)


@audit_command.command(short_help="List the rounds at PATH, who was counted and who dropped out.")
@_options
@click.option("--entries", is_flag=True, help="List every message too.")
def show(path: Path, unfinished: bool, as_json: bool, entries: bool, **options: Any) -> None:
    """List the rounds at PATH: who was in the plan, who was counted, who dropped out, what came of it.

    \b
    Examples:
      edgeadapt audit show runs/demo
      edgeadapt audit show transcript/session-000001.log --entries
    """
    opened = Transcript.open(path, Given(**options))
    reports = opened.audit(unfinished=unfinished)
    error = _first_error(opened, reports, unfinished=unfinished)
    if as_json:
        click.echo(json.dumps({**_json(opened, reports), "ok": error is None, "error": error}))
    else:
        click.echo("\n".join(_shown(opened, reports, entries)))
    _end(error, as_json)


def _end(error: str | None, as_json: bool) -> None:
    if error is None:
        return
    if as_json:  # the one object on standard output has said it
        click.echo(f"edgeadapt: {error}", err=True)
        click.get_current_context().exit(TrustError.exit_code)
    raise TrustError(error)


def _first_error(opened: Transcript, reports: Mapping[str, Report], *, unfinished: bool) -> str | None:
    for name, report in reports.items():
        try:
            report.require()
        except TrustError as error:
            return f"{name}: {error}"
    try:
        if opened.whole:
            chain(reports)
        if opened.whole and opened.published and not unfinished:
            _complete(opened.published, reports)
    except (TrustError, DataError) as error:
        return str(error)
    return None


def _complete(published: Published, reports: Mapping[str, Report]) -> None:
    """Return if the newest adapter of a registry is in the logs: one is logged before it is published."""
    logged = max((made.after[0] for report in reports.values() for made in report.made), default=0)
    if published.newest > logged:
        raise TrustError(
            f"adapter {published.newest} was published, and no log says how it was made: a session's log is missing"
        )


def _told(opened: Transcript, reports: Mapping[str, Report]) -> Iterator[str]:
    for name, report in reports.items():
        size = ((len(report.participation), "device"), (len(report.rounds), "round"), (report.entries, "message"))
        yield f"{name}  {', '.join(many(*each) for each in size)}"
        yield from (_line(finding) for finding in report.findings)
        yield ""
    findings = [finding.status for report in reports.values() for finding in report.findings]
    counts = ((status, findings.count(status)) for status in Status)
    yield f"checks: {', '.join(f'{count} {status.value}' for status, count in counts if count)}"
    whose = "you gave" if opened.given else "came with the transcript: compare them with those that devices pin"
    yield f"checked with the keys that {whose}"
    yield from (f"  {party:11} {fingerprint}" for party, fingerprint in opened.relied_on.items())
    missing = [] if opened.at else ["dates of certificates (--at DATE)"]
    missing += [] if opened.root.revoked else ["revocation (--revoked FILE)"]
    if missing:
        yield f"not checked: {', '.join(missing)}"


def _line(finding: Finding) -> str:
    words = click.wrap_text(finding.text, width=WIDTH).replace("\n", "\n" + " " * INDENT)
    return f"  {finding.status.value:{MARK}}{finding.check.value:{INDENT - MARK - 2}}{words}".rstrip()


def _shown(opened: Transcript, reports: Mapping[str, Report], entries: bool) -> Iterator[str]:
    for path, (name, report) in zip(opened.paths, reports.items(), strict=True):
        yield name
        if report.lost:
            yield f"  before the first round: {_lost(report.lost)}"
        for each in report.rounds:
            survived = f"{len(each.survivors)} of {len(each.planned)} survived"
            notes = [_lost(each.lost)] if each.lost else []
            notes += [f"wrong shares from {', '.join(each.blamed)}"] if each.blamed else []
            yield "  ".join([f"  round {each.round:>3}", survived, each.ending, *notes])
        often = [f"{device} {count}" for device, count in report.participation.items()]
        yield f"  sums that a device is in: {', '.join(often)}"
        for entry in read(path.read_bytes()).entries if entries else ():
            yield f"  {entry.place}: {len(entry.message):,} bytes"


def _lost(lost: Mapping[str, tuple[str, ...]]) -> str:
    return f"lost {'; '.join(', '.join(devices) + f' at {step}' for step, devices in lost.items())}"


def _json(opened: Transcript, reports: Mapping[str, Report]) -> dict[str, Any]:
    return {
        "relied_on": {**opened.relied_on, "given": opened.given},
        "sessions": [
            {
                "log": name,
                "entries": report.entries,
                "checks": [_finding(finding) for finding in report.findings],
                "lost": report.lost,
                "rounds": [asdict(each) for each in report.rounds],
                "participation": report.participation,
            }
            for name, report in reports.items()
        ],
    }


def _finding(finding: Finding) -> dict[str, Any]:
    place = asdict(finding.place) if finding.place else None
    return {"check": finding.check.value, "status": finding.status.value, "text": finding.text, "place": place}
