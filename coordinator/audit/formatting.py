"""What an audit found, for a reader and as JSON."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import click

from aggregation.transcript import read
from coordinator.audit.auditor import Finding, Report, Status, many
from coordinator.audit.transcripts import AuditedTranscript

MARK, INDENT, WIDTH = 13, 30, 90  # columns: of a finding's status, before its text, of its text


def told(opened: AuditedTranscript, reports: Mapping[str, Report]) -> Iterator[str]:
    """Lines: each session's checks, what they amount to, and whose keys were relied on."""
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


def shown(opened: AuditedTranscript, reports: Mapping[str, Report], *, entries: bool) -> Iterator[str]:
    """Lines: each session's rounds, and with ``entries`` every message in its log."""
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


def as_json(opened: AuditedTranscript, reports: Mapping[str, Report]) -> dict[str, Any]:
    """The same, to be serialized."""
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
