"""The auditor: checks a finished session from its transcript alone. It holds nothing secret and opens no file.

    reading ─► log ─► identities ─► signatures ─► order ─► the rules ─► secrets ─► sums
              (log)  (history)─────────────────────────►  (rules)      (opened)

Each check is made in turn and ends in a finding. The first that fails ends the audit, but for the log itself: where it
does not fit its checkpoints, the checks after it often find the very message.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from aggregation.errors import TrustError
from aggregation.messages import Message
from aggregation.pki import Root
from aggregation.pki.identity import PublicKey
from aggregation.transcript import NO_SESSION, Checkpoint, Entry, Reading, read
from coordinator.audit import history as histories
from coordinator.audit import log, rules, unmasked
from coordinator.audit.history import History
from coordinator.audit.report import Check, Finding, Made, Problem, Report, RoundSummary, Skipped, Status, many
from coordinator.audit.unmasked import Opened, Vectors

if TYPE_CHECKING:
    from datetime import datetime

__all__ = ["Check", "Finding", "Made", "Report", "RoundSummary", "Status", "audit", "chain", "many"]


def audit(
    raw: bytes,
    root: Root,
    coordinator: PublicKey,
    vectors: Vectors = lambda digest: None,
    *,
    at: "datetime | None" = None,
    unfinished: bool = False,
) -> Report:
    """Check a session.

    Args:
        raw: The log.
        root: The authority whose word on devices counts, with its revocation list where revocation is to be checked.
        coordinator: The key of the coordinator, as devices pin it.
        vectors: Digest → packed masked vector, where it was kept.
        at: When the session took place, where the dates of certificates are to be checked. A log has no clock.
        unfinished: Accept a log that is not closed: of a session under way.
    """
    auditor = _Auditor(read(raw), root, coordinator, vectors, at, unfinished)
    return auditor.run()


def chain(reports: Mapping[str, Report]) -> None:
    """Return if the sessions follow each other from the coordinator's first one on, none left out.

    Args:
        reports: Name → report, in order.

    Raises:
        TrustError: A session is missing or was replaced. Those after the last one cannot be missed.
    """
    last, before = NO_SESSION, "the beginning"
    for name, report in reports.items():
        if report.last and report.previous != last:  # before its first checkpoint a log does not say what it follows
            raise TrustError(f"{name} does not follow {before}: a session is missing or was replaced")
        last, before = report.last, name


@dataclass(slots=True)
class _Auditor:
    """The checks and what they hand on to each other."""

    reading: Reading
    root: Root
    coordinator: PublicKey
    vectors: Vectors
    at: "datetime | None"
    unfinished: bool
    checkpoints: list[Checkpoint] = field(default_factory=list)
    history: History | None = None
    messages: list[Message | None] = field(default_factory=list)
    opened: dict[int, Opened] = field(default_factory=dict)

    def run(self) -> Report:
        steps: dict[Check, Callable[[], str]] = {
            Check.LOG: self._log,
            Check.IDENTITIES: self._identities,
            Check.SIGNATURES: self._signatures,
            Check.ORDER: self._order,
            Check.THRESHOLDS: lambda: rules.thresholds(self._history),
            Check.SURVIVORS: lambda: rules.survivors(self._history),
            Check.SHARES: lambda: rules.shares(self._history),
            Check.SECRETS: lambda: unmasked.secrets(self._history, self.opened),
            Check.RESULTS: lambda: rules.results(self._history),
            Check.SUMS: lambda: unmasked.sums(self._history, self.opened, self.vectors),
            Check.PARTICIPATION: self._participation,
        }
        findings: list[Finding] = []
        for check, step in steps.items():
            over = any(finding.status is Status.FAIL and finding.check is not Check.LOG for finding in findings)
            findings.append(Finding(check, Status.NOT_REACHED, "") if over else _find(check, step))
        return self._report(tuple(findings))

    @property
    def _entries(self) -> tuple[Entry, ...]:
        """Those of the log by their true place, whatever number an entry bears: ``log`` has found the wrong ones."""
        return tuple(replace(entry, index=index) for index, entry in enumerate(self.reading.entries))

    @property
    def _history(self) -> History:
        if self.history is None:
            raise Problem("there is no session to check")
        return self.history

    def _log(self) -> str:
        self.checkpoints = log.checkpoints(self.reading, self.coordinator, self.unfinished)
        return (
            f"{len(self.reading.entries)} entries, none missing, moved or altered: they are those that the coordinator "
            f"signed in {many(len(self.checkpoints), 'checkpoint')}"
        )

    def _identities(self) -> str:
        self.history = histories.begin(self._entries, self.root, self.coordinator, self.at)
        if any(checkpoint.offer != self.history.offer.digest() for checkpoint in self.checkpoints):
            raise Problem("the checkpoints are of another session", self._entries[0].place)
        return f"{len(self.history.cohort)} devices, each certified by the authority{self._certified()}"

    def _certified(self) -> str:
        listed = self.root.revoked
        checked = [f"valid on {self.at:%Y-%m-%d}"] if self.at else []
        checked += [f"not on its revocation list {listed.number} of {listed.this_update:%Y-%m-%d}"] if listed else []
        unchecked = [] if self.at else ["whether the certificates were valid at the time"]
        unchecked += [] if listed else ["whether one was revoked"]
        but = f". Not checked: {', '.join(unchecked)}" if unchecked else ""
        return "".join(f", {each}" for each in checked) + ", no device or key twice" + but

    def _signatures(self) -> str:
        self.messages = histories.verify(self._history, self._entries, self.coordinator)
        return f"{len(self.messages)} messages, each signed by the one who is said to have sent it"

    def _order(self) -> str:
        histories.follow(self._history, self._entries, self.messages, self.coordinator)
        return "each message belongs to this session and to its step, and nobody answered a step twice"

    def _participation(self) -> str:
        counts = rules.participation(self._history)
        least, most = min(counts.values()), max(counts.values())
        often = f"{least} to {most}" if least < most else f"{most}"
        return (
            f"the update of each of the {many(len(counts), 'device')} is in {often} of {many(len(self.opened), 'sum')}"
        )

    def _report(self, findings: tuple[Finding, ...]) -> Report:
        rounds = self.history.rounds if self.history else []
        holds = all(finding.status is not Status.FAIL for finding in findings)
        return Report(
            findings=findings,
            rounds=tuple(
                RoundSummary(
                    current.plan.round,
                    current.plan.members,
                    current.counted,
                    current.dropped if current.survivors else (),
                    current.lost(self._history.offer.spec.adversary),
                    self.opened[current.plan.round].blamed if current.plan.round in self.opened else (),
                    rules.ending(current),
                )
                for current in rounds
            ),
            lost=self.history.lost if self.history else {},
            participation=rules.participation(self.history) if self.history else {},
            entries=len(self.reading.entries),
            previous=self.checkpoints[0].previous if self.checkpoints else NO_SESSION,
            last=self.checkpoints[-1].digest() if self.checkpoints else b"",
            made=unmasked.made(self.history, self.opened) if self.history and holds else (),
        )


def _find(check: Check, step: Callable[[], str]) -> Finding:
    try:
        return Finding(check, Status.PASS, step())
    except Skipped as reason:
        return Finding(check, Status.SKIPPED, str(reason))
    except Problem as problem:
        return Finding(check, Status.FAIL, str(problem), problem.place)
