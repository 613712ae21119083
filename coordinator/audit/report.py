"""What an audit says: one finding for each check, in words that need no cryptography, and what each round was."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from aggregation.errors import TrustError
from aggregation.transcript import Place

Floats = NDArray[np.float64]


class Check(Enum):
    """What is checked, in this order. The value is its name in JSON."""

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
    ADAPTERS = "adapters"  # by who has the published files too: not from a transcript alone


class Status(Enum):
    """What came of a check."""

    PASS = "pass"  # noqa: S105 - not a password
    FAIL = "FAIL"
    SKIPPED = "skipped"  # the transcript does not hold what it takes; the finding says what
    NOT_REACHED = "not reached"  # an earlier check failed


def many(count: int, noun: str) -> str:
    """So many of something, in words for people: one round, two rounds."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


@dataclass(frozen=True, slots=True)
class Finding:
    """What came of one check; ``place`` is the message that failed it."""

    check: Check
    status: Status
    text: str
    place: Place | None = None


class Problem(Exception):  # noqa: N818 - a finding under way, not an error
    """A check does not hold. ``place`` is the message that breaks it, where there is one."""

    def __init__(self, text: str, place: Place | None = None) -> None:
        super().__init__(f"{place}: {text}" if place else text)
        self.place = place


class Skipped(Exception):  # noqa: N818 - as above
    """A check cannot be made from this transcript."""


@dataclass(frozen=True, slots=True)
class RoundSummary:
    """A round as the log tells it.

    Args:
        round: Its number in the session.
        planned: Who was to take part.
        survivors: Whose update arrived in time, as the coordinator told it; nobody where it did not come to that.
        dropped: Those of the plan who are no survivors.
        lost: Step → who answered it no more; who is lost after its update arrived is a survivor all the same.
        blamed: Who passed on wrong shares.
        ending: The adapter that came of it, or why none did.
    """

    round: int
    planned: tuple[str, ...]
    survivors: tuple[str, ...]
    dropped: tuple[str, ...]
    lost: Mapping[str, tuple[str, ...]]
    blamed: tuple[str, ...]
    ending: str


@dataclass(frozen=True, slots=True)
class Made:
    """A round's sum and the adapter that is said to have come of it, for who checks that step too.

    Args:
        place: Of the result in the log.
        before: Version and digest of the adapter that the devices trained from.
        after: Version and digest of the new one.
        survivors: Whose updates are in the sum.
        layout: Digest of the layout that the session was offered.
        values: Segment name → sum, added up again from the masked vectors; nothing where these were not kept.
    """

    place: Place
    before: tuple[int, str]
    after: tuple[int, str]
    survivors: tuple[str, ...]
    layout: str
    values: Mapping[str, Floats] | None = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Report:
    """An audit's outcome.

    Args:
        findings: One for each check, in order.
        rounds: As far as the log could be followed.
        lost: Step → devices that were lost before the first round.
        participation: Device → rounds in which its update counted.
        entries: Entries of the log.
        previous: Digest of the last checkpoint of the session before, as this log says.
        last: Digest of this log's last checkpoint; nothing where it has none.
        made: What came of the rounds that have a result, in order; nothing where a check failed.
    """

    findings: tuple[Finding, ...]
    rounds: tuple[RoundSummary, ...]
    lost: Mapping[str, tuple[str, ...]]
    participation: dict[str, int]
    entries: int
    previous: bytes
    last: bytes
    made: tuple[Made, ...] = ()

    @property
    def failed(self) -> tuple[Finding, ...]:
        """The checks that failed, the earliest place in the log first."""
        failures = [finding for finding in self.findings if finding.status is Status.FAIL]
        # A damaged entry also breaks the checkpoint after it: the entry itself is what a reader looks for.
        return tuple(sorted(failures, key=lambda finding: finding.place.index if finding.place else math.inf))

    def require(self) -> None:
        """Return if no check failed.

        Raises:
            TrustError: One did; the message names the first place.
        """
        if self.failed:
            first, *others = self.failed
            more = f"; {many(len(others), 'other check')} failed too" if others else ""
            raise TrustError(f"the transcript does not hold ({first.check.value}): {first.text}{more}")
