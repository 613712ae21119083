"""``edgeadapt audit``: the commands of an auditor."""

import json
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import click

from aggregation.errors import TrustError
from aggregation.transcript.entries import read
from edgeadapt.auditing import AuditInput, AuditOptions, Finding, Report, Status
from edgeadapt.auditing.findings import NotClosedError, count
from edgeadapt.commandline import as_json, option, path_option
from edgeadapt.formats import storage
from edgeadapt.formats.jsontext import optional_timestamp, timestamp
from edgeadapt.interface.audits import audited
from edgeadapt.releases.actions import ActionRecord
from edgeadapt.releases.history import RepositoryAudit

MARK, INDENT, WIDTH = 13, 30, 90  # columns: of a finding's status, before its text, of its text
Renderer = Callable[[AuditInput, Mapping[str, Report], TrustError | None], Iterator[str]]


class _Moment(click.DateTime):
    """Parses a time in UTC, or the end of a day: a certificate is not yet valid at the beginning of its first day."""

    def __init__(self) -> None:
        super().__init__(("%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"))

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        at: datetime = super().convert(value, param, ctx).replace(tzinfo=UTC)
        return at if "T" in str(value) else at.replace(hour=23, minute=59, second=59)


def _options(command: Callable[..., None]) -> Callable[..., None]:
    for add in (
        as_json,
        click.option("--unfinished", is_flag=True, help="Accept that the last session is still under way."),
        path_option("--root", "Of a repository of channels: a root that you trust. Default: the repository's own."),
        path_option(
            "--registry",
            "The coordinator's state directory, to check the adapters too. Default: the one that has the logs.",
            metavar="DIR",
        ),
        option(
            "--at DATE",
            "When the sessions took place (UTC), to check certificates and revocations; a day without a time "
            "means its end. Default: when each log says that its session began.",
            type=_Moment(),
        ),
        path_option(
            "--revoked",
            "The authority's revocation list. A certificate must not have been revoked when its session began. "
            "Default: not checked.",
        ),
        path_option("--coordinator", "The coordinator's public key, PEM. Default: the one next to the logs."),
        path_option("--authority", "The authority's certificate, PEM. Default: the one next to the logs."),
        click.argument("path", type=click.Path(exists=True, path_type=Path)),
    ):
        command = add(command)
    return command


@click.command()
@_options
def verify(path: Path, unfinished: bool, as_json: bool, **options: Any) -> None:
    """Check every session at PATH, and exit with 4 if a check fails, or with 8 if only the last session is not closed.

    PATH is a session's log, a coordinator's state directory, or the folder of a run.

    Or it is a repository of channels: then its metadata are checked, and the log of every release, promotion, refusal
    and rollback.

    \b
    Examples:
      edgeadapt audit verify runs/demo
      edgeadapt audit verify releases --root pinned/root.json
      edgeadapt audit verify runs/demo --authority pinned/authority.pem --coordinator pinned/coordinator.pem
      edgeadapt audit verify runs/demo --at 2026-11-25 --revoked runs/demo/revoked.crl
      edgeadapt audit verify transcript/session-000001.log --json
    """
    _audit(path, unfinished, as_json, options, _render_findings, listed=False)


@click.command()
@_options
@click.option("--entries", is_flag=True, help="List every message too.")
def show(path: Path, unfinished: bool, as_json: bool, entries: bool, **options: Any) -> None:
    """List the rounds at PATH: the outcome, the devices in the sum, and those that left, with the step.

    Of a repository of channels, list what was done, with the figures of each promotion's gates.

    \b
    Examples:
      edgeadapt audit show runs/demo
      edgeadapt audit show releases
      edgeadapt audit show transcript/session-000001.log --entries
    """
    _audit(path, unfinished, as_json, options, partial(_render_rounds, entries=entries), listed=True)


def _audit(
    path: Path, unfinished: bool, as_json: bool, options: dict[str, Any], render: Renderer, *, listed: bool
) -> None:
    root = options.pop("root")
    audit = audited(path, AuditOptions(**options), root=root, unfinished=unfinished)
    if audit.releases is not None:
        _print_releases(path, audit.releases, as_json, listed=listed)
    if audit.checked is not None:
        row = {**_report(audit.checked, audit.sessions), "ok": audit.ok, "error": audit.error and str(audit.error)}
        click.echo(json.dumps(row) if as_json else "\n".join(render(audit.checked, audit.sessions, audit.error)))
        if audit.error and as_json:  # standard output already has it, in its one object
            click.echo(f"edgeadapt: {audit.error}", err=True)
            click.get_current_context().exit(audit.error.exit_code)
    if audit.error:
        raise audit.error


def _print_releases(path: Path, audited: RepositoryAudit, as_json: bool, *, listed: bool) -> None:
    if as_json:
        records = [asdict(record) for record in audited.records]
        row = {"ok": True, "error": None, "pinned": audited.pinned, "unread": audited.unread}
        click.echo(json.dumps({**row, "unpromoted": audited.unpromoted, "actions": records}))
    else:
        click.echo("\n".join([*(map(_action, audited.records) if listed else ()), *_summary(path, audited)]))


def _action(record: ActionRecord) -> str:
    action = record.action
    words = [f"{record.number:>5}  {record.made}  {action.kind}"]
    words += [action.subject] if action.subject and action.source is None else []
    words += [f"{action.source} to {action.subject}"] if action.source else []
    words += [f"release {action.release}"] if action.release else []
    words += [f"as {action.again} was"] if action.again else []
    words += [", ".join(f"{name} {version}" for name, version in sorted((action.adapters or {}).items()))]
    words += [f"for {action.rollout}"] if action.rollout else []
    words += [f"by {record.by}"] if record.by else []
    words += [f"after {action.evaluation}"] if action.evaluation else []
    gates = [f"         {'passed' if each.passed else 'REFUSED'}  {each.gate}: {each.text}" for each in action.gates]
    return "\n".join([" ".join(words).rstrip(), *gates])


def _summary(path: Path, audited: RepositoryAudit) -> Iterator[str]:
    first, last = audited.records[0], audited.records[-1]
    yield f"{path}: {len(audited.records)} actions from {first.made} to {last.made}, all signed and in order"
    if not audited.pinned:
        yield "the root is the repository's own: name one that you trust with --root"
    for channel, number in audited.unpromoted.items():
        yield f"channel {channel} is protected, and its release {number} was published before that, without gates"
    for record in audited.records:
        action = record.action
        if action.kind == "rollback" and action.evaluation is None:
            what = f"record {record.number} rolled channel {action.subject} back by hand, to release {action.release}"
            yield f"{what}: no evaluation asked for it"
    if audited.unread:
        yield f"not named by the snapshot, and not read: {', '.join(audited.unread)}"


def _render_findings(checked: AuditInput, reports: Mapping[str, Report], failure: TrustError | None) -> Iterator[str]:
    """Print the checks of each session, their number by status, and the keys that they relied on. ``failure`` has a row
    of its own if no check of a session failed, as where one is missing."""
    for name, report in reports.items():
        size = ((len(report.participation), "device"), (len(report.rounds), "round"), (report.entries, "message"))
        yield f"{name}  {', '.join(count(*each) for each in size)}"
        yield from (_aligned(each.status, each.check.value, each.text) for each in report.findings)
        yield ""
    findings = [finding.status for report in reports.values() for finding in report.findings]
    if failure is not None and not isinstance(failure, NotClosedError) and Status.FAIL not in findings:
        findings.append(Status.FAIL)
        yield from ("all sessions", _aligned(Status.FAIL, "sessions", str(failure)), "")
    counts = ((status, findings.count(status)) for status in Status)
    yield f"checks: {', '.join(f'{number} {status.value}' for status, number in counts if number)}"
    source = "you named" if checked.pinned else "are in the transcript: compare them with those that devices pin"
    yield f"checked with the keys that {source}"
    yield from (f"  {party:11} {fingerprint}" for party, fingerprint in checked.fingerprints.items())
    missing = [] if checked.root.revoked else ["revocation (--revoked FILE)"]
    missing += [] if checked.complete else ["the coordinator's other sessions (name the folder)"]
    missing += map(_printable, checked.unread) if checked.complete else []
    if missing:
        yield f"not checked: {', '.join(missing)}"


def _printable(name: str) -> str:
    """Escape a file's name that could end its line, move the cursor or hide a part of itself.

    >>> print(_printable("x\\n  pass"))
    x\\n  pass
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def _aligned(status: Status, name: str, text: str) -> str:
    wrapped = click.wrap_text(text, width=WIDTH).replace("\n", "\n" + " " * INDENT)
    return f"  {status.value:{MARK}}{name:{INDENT - MARK - 2}}{wrapped}".rstrip()


def _render_rounds(
    checked: AuditInput, reports: Mapping[str, Report], failure: TrustError | None, *, entries: bool
) -> Iterator[str]:
    for path, (name, report) in zip(checked.paths, reports.items(), strict=True):
        yield "  ".join([name, *map(timestamp, filter(None, (report.began, report.latest)))])
        if report.dropouts_by_step:
            yield f"  before the first round: {'; '.join(_dropouts(report.dropouts_by_step, ()))}"
        for summary in report.rounds:
            summed = f"in the sum: {len(summary.survivors)} of {len(summary.planned)}"
            notes = _dropouts(summary.dropouts_by_step, summary.survivors)
            notes += [f"wrong shares of {', '.join(summary.blamed)}"] if summary.blamed else []
            unmasked = f"its sum over {count(len(summary.unmasked), 'device')} could be unmasked"
            notes += [unmasked] if summary.unmasked and not summary.result else []
            at = f"{timestamp(summary.ended)}  " if summary.ended else ""
            yield f"  round {summary.round:>3}  {at}{'; '.join([summary.ending, summed, *notes])}"
        often = [f"{device} {number}" for device, number in report.participation.items()]
        yield f"  results that contain a device: {', '.join(often)}"
        for entry in read(storage.read(path)).entries if entries else ():
            yield f"  {entry.place}: {len(entry.message):,} bytes"
    if failure is not None:
        status = Status.OPEN if isinstance(failure, NotClosedError) else Status.FAIL
        yield f"{status.value}: {failure}"


def _dropouts(by_step: Mapping[str, tuple[str, ...]], summed: Container[str]) -> list[str]:
    notes = []
    for words, later in (("dropped out", False), ("left later", True)):
        left = {step: [d for d in devices if (d in summed) is later] for step, devices in by_step.items()}
        if text := ", ".join(f"{', '.join(devices)} at {step}" for step, devices in left.items() if devices):
            notes.append(f"{words}: {text}")
    return notes


def _report(checked: AuditInput, reports: Mapping[str, Report]) -> dict[str, Any]:
    return {
        "keys": {**checked.fingerprints, "pinned": checked.pinned},
        "complete": checked.complete,
        "unread": checked.unread,
        "sessions": [
            {
                "log": name,
                "entries": report.entries,
                "began": optional_timestamp(report.began),
                "latest": optional_timestamp(report.latest),
                "checks": [_finding(finding) for finding in report.findings],
                "dropouts_by_step": report.dropouts_by_step,
                "rounds": [
                    asdict(each) | {"began": optional_timestamp(each.began), "ended": optional_timestamp(each.ended)}
                    for each in report.rounds
                ],
                "participation": report.participation,
            }
            for name, report in reports.items()
        ],
    }


def _finding(finding: Finding) -> dict[str, Any]:
    place = asdict(finding.place) if finding.place else None
    return {**asdict(finding), "check": finding.check.value, "status": finding.status.value, "place": place}
