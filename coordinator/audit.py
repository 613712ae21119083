"""``edgeadapt audit``: check what a coordinator did from its transcripts alone, without torch or Flower."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import click

from aggregation.audit import Finding, Report, audit, chain
from aggregation.certificates import Root
from aggregation.errors import DataError, TrustError
from aggregation.identity import PublicKey
from aggregation.transcript import read
from coordinator.transcript import AUTHORITY, COORDINATOR, VECTORS, logs, vector_path

FOLDER = click.Path(path_type=Path)
PLACES = (".", "transcript", "coordinator/transcript")  # a folder of transcripts, a coordinator's home, a run
MARK, INDENT, WIDTH = 13, 30, 90  # columns: of a finding's status, before its text, of its text


@dataclass(frozen=True, slots=True)
class Transcript:
    """Logs to check, and whom they must rely on.

    ``given``: the authority and the coordinator's key came from the auditor, and not with the transcript.
    """

    paths: tuple[Path, ...]
    root: Root
    coordinator: PublicKey
    given: bool

    @classmethod
    def open(cls, path: Path, authority: Path | None, coordinator: Path | None) -> Self:
        """Find the logs at ``path``.

        Raises:
            DataError: There are none.
            TrustError: The authority's certificate or the coordinator's key is missing or damaged.
        """
        paths = (path,) if path.is_file() else _find(path)
        folder = paths[0].parent
        root = Root.from_pem(_read(authority or folder / AUTHORITY, "--authority"))
        key = PublicKey.from_pem(_read(coordinator or folder / COORDINATOR, "--coordinator"))
        return cls(paths, root, key, authority is not None and coordinator is not None)

    def audit(self, *, unfinished: bool) -> dict[str, Report]:
        """Name of a log → its report; the last one may be ``unfinished``."""
        vectors = partial(_vector, self.paths[0].parent / VECTORS)
        return {
            path.name: audit(
                path.read_bytes(),
                self.root,
                self.coordinator,
                vectors,
                unfinished=unfinished and path == self.paths[-1],
            )
            for path in self.paths
        }

    @property
    def relied_on(self) -> dict[str, str]:
        """Fingerprints of the authority's certificate and of the coordinator's key, to compare with pinned ones."""
        return {"authority": hashlib.sha256(self.root.der).hexdigest(), "coordinator": self.coordinator.key_id}


def _find(path: Path) -> tuple[Path, ...]:
    for place in PLACES:
        if found := logs(path / place):
            return tuple(found)
    raise DataError(f"{path} holds no transcript: give a session's log, a coordinator's home, or the folder of a run")


def _read(path: Path, option: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise TrustError(f"{path} is missing: say with {option} where it is") from None


def _vector(folder: Path, digest: bytes) -> bytes | None:
    try:
        return vector_path(folder, digest).read_bytes()
    except FileNotFoundError:
        return None


def _options(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object."),
        click.option("--unfinished", is_flag=True, help="Accept a session that is still under way."),
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
@click.pass_context
def verify(
    context: click.Context,
    path: Path,
    authority: Path | None,
    coordinator: Path | None,
    unfinished: bool,
    as_json: bool,
) -> None:
    """Check every session at PATH, and exit with 4 if one does not hold.

    PATH is a session's log, a coordinator's home, or the folder of a run.

    \b
    Examples:
      edgeadapt audit verify runs/demo
      edgeadapt audit verify runs/demo --authority pinned/authority.pem --coordinator pinned/coordinator.pem
      edgeadapt audit verify transcript/session-000001.log --json
    """
    opened = Transcript.open(path, authority, coordinator)
    reports = opened.audit(unfinished=unfinished)
    error = _first_error(opened, reports)
    if as_json:
        click.echo(json.dumps({**_json(opened, reports), "ok": error is None, "error": error}))
    else:
        click.echo("\n".join(_told(opened, reports)))
    _end(context, error, as_json)


@audit_command.command()
@_options
@click.option("--entries", is_flag=True, help="List every message too.")
@click.pass_context
def show(
    context: click.Context,
    path: Path,
    authority: Path | None,
    coordinator: Path | None,
    unfinished: bool,
    as_json: bool,
    entries: bool,
) -> None:
    """List the rounds at PATH: who was in the plan, who was counted, who dropped out, what came of it.

    \b
    Examples:
      edgeadapt audit show runs/demo
      edgeadapt audit show transcript/session-000001.log --entries
    """
    opened = Transcript.open(path, authority, coordinator)
    reports = opened.audit(unfinished=unfinished)
    error = _first_error(opened, reports)
    if as_json:
        click.echo(json.dumps({**_json(opened, reports), "ok": error is None, "error": error}))
    else:
        click.echo("\n".join(_shown(opened, reports, entries)))
    _end(context, error, as_json)


def _end(context: click.Context, error: str | None, as_json: bool) -> None:
    if error is None:
        return
    if as_json:  # the one object on standard output has said it
        click.echo(f"edgeadapt: {error}", err=True)
        context.exit(TrustError.exit_code)
    raise TrustError(error)


def _first_error(opened: Transcript, reports: Mapping[str, Report]) -> str | None:
    for name, report in reports.items():
        try:
            report.require()
        except TrustError as error:
            return f"{name}: {error}"
    try:
        if len(opened.paths) > 1:
            chain(reports)
    except TrustError as error:
        return str(error)
    return None


def _told(opened: Transcript, reports: Mapping[str, Report]) -> Iterator[str]:
    for name, report in reports.items():
        yield f"{name}  {len(report.participation)} devices, {len(report.rounds)} rounds, {report.entries} messages"
        yield from (_line(finding) for finding in report.findings)
        yield ""
    whose = "you gave" if opened.given else "came with the transcript: compare them with those that devices pin"
    yield f"checked with the keys that {whose}"
    yield from (f"  {party:11} {fingerprint}" for party, fingerprint in opened.relied_on.items())


def _line(finding: Finding) -> str:
    words = click.wrap_text(finding.text, width=WIDTH).replace("\n", "\n" + " " * INDENT)
    return f"  {finding.status.value:{MARK}}{finding.check.value:{INDENT - MARK - 2}}{words}".rstrip()


def _shown(opened: Transcript, reports: Mapping[str, Report], entries: bool) -> Iterator[str]:
    for path, (name, report) in zip(opened.paths, reports.items(), strict=True):
        yield name
        for each in report.rounds:
            counted = f"{len(each.survivors)} of {len(each.planned)} counted"
            notes = [f"lost {', '.join(each.dropped)}"] if each.dropped else []
            notes += [f"wrong shares from {', '.join(each.blamed)}"] if each.blamed else []
            yield "  ".join([f"  round {each.round:>3}", counted, each.ending, *notes])
        often = [f"{device} {count}" for device, count in report.participation.items()]
        yield f"  sums that a device is in: {', '.join(often)}"
        for entry in read(path.read_bytes()).entries if entries else ():
            yield f"  {entry.place}: {len(entry.message):,} bytes"


def _json(opened: Transcript, reports: Mapping[str, Report]) -> dict[str, Any]:
    return {
        "relied_on": {**opened.relied_on, "given": opened.given},
        "sessions": [
            {
                "log": name,
                "entries": report.entries,
                "checks": [_finding(finding) for finding in report.findings],
                "rounds": [asdict(each) for each in report.rounds],
                "participation": report.participation,
            }
            for name, report in reports.items()
        ],
    }


def _finding(finding: Finding) -> dict[str, Any]:
    place = asdict(finding.place) if finding.place else None
    return {"check": finding.check.value, "status": finding.status.value, "text": finding.text, "place": place}
