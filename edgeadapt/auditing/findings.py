"""What an audit reports: a finding for each check, a summary of each round, and the adapters of the rounds."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum

from aggregation.errors import ProtocolError, TrustError
from aggregation.groups import GroupSum
from aggregation.spec import SessionSpec
from aggregation.transcript.entries import AdapterId, Place


class Check(Enum):
    LOG = "log"
    IDENTITIES = "identities"
    SIGNATURES = "signatures"
    ORDER = "order"
    THRESHOLDS = "thresholds"
    SURVIVORS = "survivors"
    SHARES = "shares"
    SECRETS = "secrets"
    RESULTS = "results"
    SUMS = "sums"
    PARTICIPATION = "participation"
    REPEATS = "repeats"  # over all audited sessions
    PRIVACY = "privacy"  # over all audited sessions
    WEAKNESSES = "weaknesses"  # over all audited sessions; a finding for each warning
    ADAPTERS = "adapters"  # needs the registry; a transcript alone does not have the adapters


class Status(Enum):
    PASS = "pass"  # noqa: S105 - not a password
    FAIL = "FAIL"
    OPEN = "not closed"  # a log without an end, which nothing shows that it had; only of ``Check.LOG``
    WARNING = "warning"  # nothing broke a rule; an auditor should know of it all the same
    SKIPPED = "skipped"  # the transcript lacks what the check needs; the finding says what
    NOT_REACHED = "not reached"  # an earlier check failed


@dataclass(frozen=True, slots=True)
class Finding:
    """Holds the outcome of one check. ``about``: the field or file that failed it, or that it lacks; for programs and
    tests, which must not depend on the text. Empty for a check that passed."""

    check: Check
    status: Status
    text: str  # one sentence or a few, for people who need not know the cryptography
    place: Place | None = None  # the message that failed the check, if one did
    about: str = ""


class Problem(Exception):  # noqa: N818 - it becomes a finding, and is not an error of a command
    """Is raised when a check does not hold; ``place`` is the message that breaks it, if one does."""

    def __init__(self, about: str, text: str, place: Place | None = None) -> None:
        super().__init__(f"{place}: {text}" if place else text)
        self.about = about
        self.place = place

    @classmethod
    @contextmanager
    def at(cls, place: Place, about: str = "") -> Iterator[None]:
        """Attribute what a check of ``aggregation`` refuses in the block to the message there, and to ``about``."""
        try:
            yield
        except ProtocolError as error:
            raise cls(about or error.about, str(error), place) from None


class NotClosed(Exception):  # noqa: N818 - as above
    """Is raised when a log has no end, and nothing in it is wrong."""


class NotClosedError(TrustError):
    """The last session is under way, was stopped, or was restored from a backup; every check of it passed."""

    exit_code = 8


class Skipped(Exception):  # noqa: N818 - as above
    """Is raised when a check cannot be made from this transcript. ``about``: what is missing."""

    def __init__(self, about: str, text: str) -> None:
        super().__init__(text)
        self.about = about


@dataclass(frozen=True, slots=True)
class RoundSummary:
    """Summarizes a round according to the log. Digests are in hex.

    Args:
        dealt: The devices that were dealt into its groups; empty without groups.
        groups: The survivors of each group; one without groups.
        survivors: The devices whose updates are in the sum; empty if the coordinator never named them.
        unmasked: The devices in the sum that the coordinator learned, or could learn in a round without a result; empty
            if it could learn none.
        dropouts_by_step: Step → devices that answered the previous steps of the round, and not this one. A device that
            drops out after its update arrived is still a survivor.
        ending: The adapter that the round produced, or why it produced none.
        entries: In the log before the ending of the round; if the round is open, all of the log.
        epsilon: What all sums so far may have revealed (``account``); None in a session without noise.
        began: When the coordinator sent the plan, in seconds since 1970, as it signed; None if the log fails for that.
    """

    round: int
    plan: str
    planned: tuple[str, ...]
    dealt: tuple[str, ...]
    groups: tuple[tuple[str, ...], ...]
    adapter: AdapterId
    survivors: tuple[str, ...]
    unmasked: tuple[str, ...]
    dropouts_by_step: Mapping[str, tuple[str, ...]]
    blamed: tuple[str, ...]
    ending: str
    result: AdapterId | None
    reason: str | None
    sum: str | None
    entries: int
    root: str
    epsilon: float | None = None
    began: int | None = None
    ended: int | None = None

    @property
    def open(self) -> bool:
        return self.result is None and self.reason is None


@dataclass(frozen=True, slots=True)
class ProducedAdapter:
    """Holds a round's sum and the adapter that, according to the log, the coordinator produced from it. ``sums``: their
    contributions by group, recomputed from the masked vectors; None if these were not kept."""

    place: Place  # the place of the result in the log
    before: AdapterId  # version and digest of the adapter from which the devices trained
    after: AdapterId  # version and digest of the new one
    plan: str  # digest of the round's plan, hex
    spec: SessionSpec
    training: bytes  # the task in the round's plan, as encoded
    survivors: tuple[str, ...]  # the devices whose updates are in the sum
    sums: tuple[GroupSum, ...] | None = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Report:
    """Holds the outcome of the audit of one session. Digests are in hex.

    Args:
        findings: One for each check, in order; of ``Check.WEAKNESSES`` one for each warning.
        dropouts_by_step: Step → devices that dropped out before the first round.
        participation: Device → rounds whose sum contains its update.
        offer: Digest of the session's offer; empty if it cannot be read.
        spec: The parameters in it; None if it cannot be read.
        previous: Digest of the previous session's last checkpoint, according to this log.
        last: Digest of this log's last checkpoint; empty if it has none.
        base: Its digest in the session's offer; empty if it cannot be read.
        layout: As ``base``, of the adapter.
        start: Version and digest of the adapter that the session started from; None without a checkpoint.
        tasks: For each round, in order: the place of its plan, and the training task in it, as encoded.
        open_plan: Digest of the plan of the last round, if the log does not say how it ended.
        produced: The adapters of the rounds with a result, in order; empty if a check failed.
        began: When the session was offered, in seconds since 1970, as the coordinator signed; None if the log fails
            for that.
    """

    findings: tuple[Finding, ...]
    rounds: tuple[RoundSummary, ...]
    dropouts_by_step: Mapping[str, tuple[str, ...]]
    participation: Mapping[str, int]
    offer: str
    spec: SessionSpec | None
    entries: int
    previous: bytes
    last: bytes
    base: str
    layout: str
    start: AdapterId | None
    newest: AdapterId | None
    tasks: tuple[tuple[Place, bytes], ...]
    open_plan: str | None
    produced: tuple[ProducedAdapter, ...] = ()
    began: int | None = None
    latest: int | None = None
    closed: bool = True

    @property
    def failed(self) -> tuple[Finding, ...]:
        failures = [finding for finding in self.findings if finding.status is Status.FAIL]
        # A damaged entry also breaks the checkpoint after it; a reader needs the entry itself.
        return tuple(sorted(failures, key=lambda finding: finding.place.index if finding.place else math.inf))

    def require(self) -> None:
        """Check that no check failed. Raises TrustError, whose message names the first place."""
        if self.failed:
            first, *others = self.failed
            more = f"; {count(len(others), 'other check')} failed too" if others else ""
            text = f"the transcript does not pass the audit ({first.check.value}): {first.text}{more}"
            raise TrustError(text, about=first.check.value)


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
