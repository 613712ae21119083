"""The audit of one finished session from its transcript alone. It holds no secret and opens no file.

    log ─► identities ─► signatures ─► order ─► thresholds, survivors, shares ─► secrets ─► results ─► sums
    └────────── history ────────────────────┘   └────────── rules ──────────┘   (sums)     (rules)    (sums)

The first failure ends the audit, except that of the log itself: later checks often find the very message that does not
fit its checkpoint."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from aggregation import groups
from aggregation.errors import TrustError
from aggregation.messages import Assignment, Message
from aggregation.pki import Root
from aggregation.pki.certificates import load
from aggregation.pki.identity import PublicKey
from aggregation.pki.revocation import RevocationList
from aggregation.transcript import merkle
from aggregation.transcript.entries import ENTRY, Abort, AdapterId, Checkpoint, Entry, Reading, Result, read
from aggregation.transcript.log import NO_SESSION
from edgeadapt.auditing import history as histories
from edgeadapt.auditing import rules
from edgeadapt.auditing.findings import Check, Finding, NotClosed, Problem, Report, RoundSummary, Skipped, Status, count
from edgeadapt.auditing.history import History
from edgeadapt.auditing.rules import UnmaskedRound, Vectors, produced, secrets, sums


def audit(
    raw: bytes,
    root: Root,
    coordinator: PublicKey,
    vectors: Vectors = lambda digest, size: None,
    *,
    at: datetime | None = None,
    unfinished: bool = False,
) -> Report:
    """Check a session.

    Args:
        root: The authority that must have certified the devices, with its revocation list if that is to be checked.
        vectors: Digest and length → packed masked vector, where it was kept.
        at: When certificates must have been valid and not revoked; None: when the session began, as its log says.
        unfinished: Accept a log that is not closed, as that of a session under way is. Else the report says so.
    """
    return _Audit(read(raw), root, coordinator, vectors, at, unfinished).run()


def chain(reports: Mapping[str, Report], unmade: Mapping[int, str] | None = None) -> None:
    """Check that the sessions follow each other from the coordinator's first one on, without a gap, and in time.

    So do their adapters: a session starts from version 0, the adapter that the previous one ended with, or the first on
    another base. ``reports``: name → report, in order; ``unmade``: version → digest of those that no round made, None
    without the registry. Raises TrustError: a session is missing or was replaced or cut, or starts from another
    adapter. A missing last session that made no adapter cannot be detected."""
    last, before, base = NO_SESSION, "the beginning", ""
    newest: AdapterId | None = None
    closed = True
    latest: int | None = None
    for name, report in reports.items():
        if not closed:
            text = f"{before} is not closed, and {name} follows it: its end was cut off"
            raise TrustError(text, about="session.cut")
        if report.last and report.previous != last:  # before its first checkpoint a log does not name its predecessor
            text = f"{name} does not follow {before}: a session is missing or was replaced"
            raise TrustError(text, about="session")
        start = report.start
        if latest is not None and (report.began or 0) < latest:
            text = f"{name} has an earlier time than {before}: a session was dated back"
            raise TrustError(text, about="session.began")
        if start and start != (newest or (0, start[1])) and not _begins(start, newest, unmade, report.base != base):
            text = f"{name} starts from an adapter {start[0]} that no session before it made"
            raise TrustError(text, about="session.adapter")
        last, before, newest, base, latest = report.last, name, report.newest, report.base, report.latest
        closed = report.closed


def _begins(start: AdapterId, newest: AdapterId | None, unmade: Mapping[int, str] | None, other_base: bool) -> bool:
    """Whether a session may start from an adapter that no round made, after the ``newest`` that one made."""
    number = newest[0] if newest else 0
    if start[0] <= number:
        return False
    if unmade is None:
        return other_base and newest is not None
    return unmade.get(start[0]) == start[1] and all(each in unmade for each in range(number + 1, start[0]))


@dataclass(slots=True)
class _Audit:
    reading: Reading
    root: Root
    coordinator: PublicKey
    vectors: Vectors
    at: datetime | None
    unfinished: bool
    checkpoints: list[Checkpoint] = field(default_factory=list)
    history: History | None = None
    messages: list[Message | None] = field(default_factory=list)
    unmasked: dict[int, UnmaskedRound] = field(default_factory=dict)

    def run(self) -> Report:
        steps: dict[Check, Callable[[], str]] = {
            Check.LOG: self._log,
            Check.IDENTITIES: self._identities,
            Check.SIGNATURES: self._signatures,
            Check.ORDER: self._order,
            Check.THRESHOLDS: lambda: rules.thresholds(self._history),
            Check.SURVIVORS: lambda: rules.survivors(self._history),
            Check.SHARES: lambda: rules.shares(self._history),
            Check.SECRETS: lambda: secrets(self._history, self.unmasked),
            Check.RESULTS: lambda: rules.results(self._history, self.checkpoints),
            Check.SUMS: lambda: sums(self._history, self.unmasked, self.vectors),
            Check.PARTICIPATION: self._participation,
        }
        findings: list[Finding] = []
        for check, step in steps.items():
            over = any(finding.status is Status.FAIL and finding.check is not Check.LOG for finding in findings)
            findings.append(Finding(check, Status.NOT_REACHED, "") if over else _find(check, step))
        return self._report(tuple(findings))

    @property
    def _entries(self) -> tuple[Entry, ...]:
        """Number the entries by their true place, whatever number they state: ``_log`` finds the wrong ones."""
        return tuple(replace(entry, index=index) for index, entry in enumerate(self.reading.entries))

    @property
    def _history(self) -> History:
        if self.history is None:
            raise Problem("log", "there is no session to check")
        return self.history

    def _log(self) -> str:
        self.checkpoints = histories.checkpoints(self.reading, self.coordinator)
        if not self.unfinished and not histories.closes(self.checkpoints):
            raise NotClosed("the session is under way, was stopped, or was restored from a backup (--unfinished)")
        signed = count(len(self.checkpoints), "checkpoint")
        size = len(self.reading.entries)
        return f"{size} entries, none missing, moved or altered since the coordinator signed them in {signed}"

    def _identities(self) -> str:
        at = self.reading.entries[0].at if self.reading.entries else None
        self.at = self.at or (None if at is None else datetime.fromtimestamp(at, UTC))
        self.root = _as_of(self.root, self.at)
        self.history = histories.begin(self._entries, self.root, self.coordinator, self.at)
        if any(checkpoint.offer != self.history.offer.digest() for checkpoint in self.checkpoints):
            raise Problem("checkpoint.offer", "the checkpoints are of another session", self._entries[0].place)
        return f"{len(self.history.cohort)} devices, each certified by the authority{self._certified()}"

    def _certified(self) -> str:
        crl = self.root.revoked
        checked = [f"valid on {self.at:%Y-%m-%d}"] if self.at else []
        checked += [f"not on its revocation list {crl.number} of {crl.this_update:%Y-%m-%d}"] if crl else []
        unchecked = [] if crl else ["whether one was revoked"]
        certificates = map(load, self._history.offer.certificates)
        if crl and (ended := sum(each.not_valid_after_utc < crl.this_update for each in certificates)):
            unchecked += [f"whether one of {ended} was revoked, which ended before that list was signed"]
        but = f". Not checked: {', '.join(unchecked)}" if unchecked else ""
        return "".join(f", {each}" for each in checked) + ", no device or key twice" + but

    def _signatures(self) -> str:
        self.messages = histories.verify(self._history, self._entries, self.coordinator)
        return f"{count(len(self.messages), 'message')}, each signed by its stated sender"

    def _order(self) -> str:
        histories.follow(self._history, self._entries, self.messages, self.coordinator)
        return "each message belongs to this session and to its step, and no step was answered twice"

    def _participation(self) -> str:
        counts = rules.participation(self._history)
        least, most = min(counts.values()), max(counts.values())
        times = f"{least} to {most}" if least < most else f"{most}"
        devices, total = count(len(counts), "device"), count(len(self.unmasked), "result")
        return f"the update of each of the {devices} is in {times} of {total}"

    def _report(self, findings: tuple[Finding, ...]) -> Report:
        history = self.history
        passed = all(finding.status is not Status.FAIL for finding in findings)
        tree = merkle.Tree()
        for entry in self.reading.entries:
            tree.append(ENTRY.encode(entry))
        return Report(
            findings=findings,
            rounds=tuple(self._summary(current, tree) for current in history.rounds) if history else (),
            dropouts_by_step=history.dropouts_by_step if history else {},
            participation=rules.participation(history) if history else {},
            offer=history.offer.digest().hex() if history else "",
            spec=history.offer.spec if history else None,
            entries=len(self.reading.entries),
            previous=self.checkpoints[0].previous if self.checkpoints else NO_SESSION,
            last=self.checkpoints[-1].digest() if self.checkpoints else b"",
            base=history.offer.spec.base_digest if history else "",
            layout=history.offer.spec.layout_digest if history else "",
            start=self.checkpoints[0].newest if self.checkpoints else None,
            newest=self._newest,
            tasks=tuple((each.place(Assignment), each.plan.training) for each in history.rounds) if history else (),
            open_plan=_open_plan(history) if history else None,
            produced=produced(history, self.unmasked) if history and passed else (),
            began=self.reading.entries[0].at if self.reading.entries else None,
            closed=histories.closes(self.checkpoints),
            latest=max((each.at for each in self.reading.entries if each.at is not None), default=None),
        )

    @property
    def _newest(self) -> AdapterId | None:
        rounds = self.history.rounds if self.history else []
        results = [each.ending.produced for each in rounds if isinstance(each.ending, Result)]
        return results[-1] if results else self.checkpoints[0].newest if self.checkpoints else None

    def _summary(self, current: histories.Round, tree: merkle.Tree) -> RoundSummary:
        number, result = current.plan.round, current.ending if isinstance(current.ending, Result) else None
        entries = current.place(type(current.ending)).index if current.ending else tree.size
        spec = self._history.offer.spec
        return RoundSummary(
            number,
            current.plan.digest().hex(),
            current.plan.members,
            tuple(sorted((*current.plan.members, *current.plan.former))) if spec.grouping else (),
            groups.split(spec, current.plan, current.survivors),
            rules.adapter(current),
            current.survivors,
            rules.unmasked(spec, current),
            current.dropouts_by_step(spec.adversary),
            self.unmasked[number].blamed if number in self.unmasked else (),
            rules.ending(current),
            result.produced if result else None,
            current.ending.reason if isinstance(current.ending, Abort) else None,
            result.sum.hex() if result else None,
            entries,
            tree.root(entries).hex(),
            began=self.reading.entries[current.place(Assignment).index].at,
            ended=self.reading.entries[entries].at if current.ending else None,
        )


def _as_of(root: Root, at: datetime | None) -> Root:
    """Return the authority as at that time: a certificate that was revoked later was still valid. Raises Problem: its
    list had ended before."""
    crl = root.revoked
    if crl is None or at is None:
        return root
    _require_in_force(crl, at)
    known = {serial: since for serial, since in crl.revoked.items() if since.at <= at}
    return replace(root, revoked=replace(crl, revoked=known))


def _require_in_force(crl: RevocationList, at: datetime) -> None:
    if at > crl.next_update:
        text = f"revocation list {crl.number} was valid until {crl.next_update:%Y-%m-%d %H:%M}: name a newer one"
        raise Problem("revocations.next-update", text)


def _open_plan(history: History) -> str | None:
    last = history.rounds[-1] if history.rounds else None
    return last.plan.digest().hex() if last and last.ending is None else None


def _find(check: Check, step: Callable[[], str]) -> Finding:
    try:
        return Finding(check, Status.PASS, step())
    except NotClosed as reason:
        return Finding(check, Status.OPEN, str(reason), about="log.open")
    except Skipped as reason:
        return Finding(check, Status.SKIPPED, str(reason), about=reason.about)
    except Problem as problem:
        return Finding(check, Status.FAIL, str(problem), problem.place, problem.about)
