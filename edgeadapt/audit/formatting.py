"""The reports of an audit as lines of text and as JSON."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import click

from aggregation.errors import TrustError
from aggregation.transcript import read
from edgeadapt.audit.findings import Finding, Report, Status, count
from edgeadapt.audit.transcripts import AuditInput
from edgeadapt.formats import storage

MARK, INDENT, WIDTH = 13, 30, 90  # columns: of a finding's status, before its text, of its text


def render_findings(checked: AuditInput, reports: Mapping[str, Report], failure: TrustError | None) -> Iterator[str]:
    """Print the checks of each session, their number by status, and the keys that they relied on. ``failure`` has a row
    of its own if no check of a session failed, as where one is missing."""
    for name, report in reports.items():
        size = ((len(report.participation), "device"), (len(report.rounds), "round"), (report.entries, "message"))
        yield f"{name}  {', '.join(count(*each) for each in size)}"
        yield from (_row(each.status, each.check.value, each.text) for each in report.findings)
        yield ""
    findings = [finding.status for report in reports.values() for finding in report.findings]
    if failure is not None and Status.FAIL not in findings:
        findings.append(Status.FAIL)
        yield from ("all sessions", _row(Status.FAIL, "sessions", str(failure)), "")
    counts = ((status, findings.count(status)) for status in Status)
    yield f"checks: {', '.join(f'{number} {status.value}' for status, number in counts if number)}"
    source = "you named" if checked.pinned else "are in the transcript: compare them with those that devices pin"
    yield f"checked with the keys that {source}"
    yield from (f"  {party:11} {fingerprint}" for party, fingerprint in checked.fingerprints.items())
    missing = [] if checked.at else ["dates of certificates (--at DATE)"]
    missing += [] if checked.root.revoked else ["revocation (--revoked FILE)"]
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


def _row(status: Status, name: str, text: str) -> str:
    wrapped = click.wrap_text(text, width=WIDTH).replace("\n", "\n" + " " * INDENT)
    return f"  {status.value:{MARK}}{name:{INDENT - MARK - 2}}{wrapped}".rstrip()


def render_rounds(
    checked: AuditInput, reports: Mapping[str, Report], failure: TrustError | None, *, entries: bool
) -> Iterator[str]:
    """Print the rounds of each session, and with ``entries`` every message in its log."""
    for path, (name, report) in zip(checked.paths, reports.items(), strict=True):
        yield name
        if report.dropouts_by_step:
            yield f"  before the first round: {_dropouts(report.dropouts_by_step)}"
        for summary in report.rounds:
            survived = f"{len(summary.survivors)} of {len(summary.planned)} survived"
            notes = [_dropouts(summary.dropouts_by_step)] if summary.dropouts_by_step else []
            notes += [f"wrong shares of {', '.join(summary.blamed)}"] if summary.blamed else []
            unmasked = f"its sum over {count(len(summary.unmasked), 'device')} could be unmasked"
            notes += [unmasked] if summary.unmasked and not summary.result else []
            yield "  ".join([f"  round {summary.round:>3}", survived, summary.ending, *notes])
        often = [f"{device} {number}" for device, number in report.participation.items()]
        yield f"  results that contain a device: {', '.join(often)}"
        for entry in read(storage.read(path)).entries if entries else ():
            yield f"  {entry.place}: {len(entry.message):,} bytes"
    if failure is not None:
        yield f"{Status.FAIL.value}: {failure}"


def _dropouts(by_step: Mapping[str, tuple[str, ...]]) -> str:
    return f"dropped out: {'; '.join(', '.join(devices) + f' at {step}' for step, devices in by_step.items())}"


def as_json(checked: AuditInput, reports: Mapping[str, Report]) -> dict[str, Any]:
    return {
        "keys": {**checked.fingerprints, "pinned": checked.pinned},
        "complete": checked.complete,
        "unread": checked.unread,
        "sessions": [
            {
                "log": name,
                "entries": report.entries,
                "checks": [_finding(finding) for finding in report.findings],
                "dropouts_by_step": report.dropouts_by_step,
                "rounds": [asdict(each) for each in report.rounds],
                "participation": report.participation,
            }
            for name, report in reports.items()
        ],
    }


def _finding(finding: Finding) -> dict[str, Any]:
    place = asdict(finding.place) if finding.place else None
    return {**asdict(finding), "check": finding.check.value, "status": finding.status.value, "place": place}
