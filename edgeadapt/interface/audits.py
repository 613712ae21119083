"""``edgeadapt.audit``: what a coordinator did, checked from its files, or what was done with its releases."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from html import escape
from pathlib import Path

from aggregation.errors import ConfigError, TrustError
from edgeadapt.auditing import AuditInput, AuditOptions, Finding, Report, Status
from edgeadapt.auditing.findings import NotClosedError
from edgeadapt.formats.registryfiles import RegistrySettings
from edgeadapt.formats.storage import File
from edgeadapt.interface.names import in_python
from edgeadapt.releases.history import RepositoryAudit, audit_repository, is_repository

RUN = "coordinator"  # the state directory in the folder of a run


@dataclass(frozen=True, slots=True)
class Audit:
    """The outcome of an audit, which is true if everything passed."""

    path: Path
    error: TrustError | None  # the first failure
    checked: AuditInput | None = field(default=None, repr=False)  # the files of a coordinator
    sessions: Mapping[str, Report] = field(default_factory=dict, repr=False)  # by the name of the log, in order
    releases: RepositoryAudit | None = field(default=None, repr=False)  # of a repository of channels that passed

    @property
    def ok(self) -> bool:
        return self.error is None

    def __bool__(self) -> bool:
        return self.ok

    @property
    def checks(self) -> tuple[Finding, ...]:
        """Return the findings of all sessions of a coordinator, in order."""
        return tuple(finding for report in self.sessions.values() for finding in report.findings)

    @property
    def failed(self) -> tuple[Finding, ...]:
        """Return the checks of a session that failed; none where ``error`` is about all of them, as a missing one."""
        return tuple(finding for finding in self.checks if finding.status is Status.FAIL)

    def __str__(self) -> str:
        if self.error is not None:
            return f"{Status.OPEN.value if isinstance(self.error, NotClosedError) else Status.FAIL.value}: {self.error}"
        if self.releases is not None:
            return f"pass: {len(self.releases.records)} actions"
        found = [finding.status for finding in self.checks]
        return ", ".join(f"{found.count(status)} {status.value}" for status in Status if status in found)

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{escape(name)}</td><td>{finding.status.value}</td><td>{finding.check.value}</td>"
            f"<td>{escape(finding.text)}</td></tr>"
            for name, report in self.sessions.items()
            for finding in report.findings
        )
        return f"<table><caption>{escape(f'{self.path}: {self}')}</caption>{rows}</table>"


def audit(
    path: File,
    *,
    authority: File | None = None,
    coordinator: File | None = None,
    revoked: File | None = None,
    registry: File | None = None,
    root: File | None = None,
    at: datetime | None = None,
    unfinished: bool = False,
) -> Audit:
    """Check that a coordinator followed the protocol, or what was done with releases.

    Args:
        path: A session's log, a coordinator's state directory, the folder of a run, or a repository of channels.
        authority: The authority's certificate; by default the one next to the logs, which proves less.
        coordinator: The coordinator's public key; by default the one next to the logs.
        revoked: The authority's revocation list; without it, revocation is not checked.
        registry: The coordinator's state directory, if the logs are elsewhere.
        root: The root that you trust, of a repository of channels.
        at: When the sessions took place; without it, when their logs say.
        unfinished: Accept that the last session is still under way.

    Raises:
        DataError: There is no log.
        TrustError: A key or list to check with is missing or damaged, or the registry is. What fails an audit is in
            the ``Audit``.
        ConfigError: An argument is for another kind of ``path``.
    """
    options = AuditOptions(
        authority=_path(authority),
        coordinator=_path(coordinator),
        revoked=_path(revoked),
        registry=_path(registry),
        at=None if at is None else at.astimezone(UTC),
    )
    with in_python():
        return audited(Path(path), options, root=_path(root), unfinished=unfinished)


def _path(file: File | None) -> Path | None:
    return None if file is None else Path(file)


def audited(path: Path, options: AuditOptions, *, root: Path | None, unfinished: bool) -> Audit:
    """Audit as ``audit``; errors name options of the command line."""
    if is_repository(path):
        for option in fields(options):
            if getattr(options, option.name) is not None:
                reason = f"--{option.name} is for the transcripts of a coordinator, and {path} is a repository"
                raise ConfigError(f"{reason} of channels", about=f"--{option.name}")
        try:
            return Audit(path, None, releases=audit_repository(path, root))
        except TrustError as error:
            return Audit(path, error)
    if root is not None:
        raise ConfigError(f"--root is for a repository of channels, which {path} is not", about="--root")
    _update(path)
    checked = AuditInput.open(path, options)
    _update(path)  # the records that were just read may be of rounds that ended since
    reports, failure = checked.audit(unfinished=unfinished), None
    try:
        checked.require(reports, unfinished=unfinished)
    except TrustError as error:
        failure = error
    return Audit(path, failure, checked, reports)


def _update(path: Path) -> None:
    """Update the logs of a coordinator whose machine may not lead from its database."""
    for folder in (path, path / RUN):
        if RegistrySettings.of(folder).database:
            from coordinator.statedir import update_transcript  # takes the extra of such a registry

            update_transcript(folder)
