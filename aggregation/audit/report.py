"""What an audit says: one finding for each check, in words that need no cryptography, and what each round was."""

import math
from dataclasses import dataclass
from enum import Enum

from aggregation.errors import TrustError
from aggregation.transcript import Place


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


class Status(Enum):
    """What came of a check."""

    PASS = "pass"  # noqa: S105 - not a password
    FAIL = "FAIL"
    SKIPPED = "skipped"  # the transcript does not hold what it takes; the finding says what
    NOT_REACHED = "not reached"  # an earlier check failed


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
    """A round as the log tells it. ``ending``: the adapter that came of it, or why none did."""

    round: int
    planned: tuple[str, ...]
    survivors: tuple[str, ...]
    dropped: tuple[str, ...]
    blamed: tuple[str, ...]
    ending: str


@dataclass(frozen=True, slots=True)
class Report:
    """An audit's outcome.

    Args:
        findings: One for each check, in order.
        rounds: As far as the log could be followed.
        participation: Device → rounds in which its update counted.
        entries: Entries of the log.
        previous: Digest of the last checkpoint of the session before, as this log says.
        last: Digest of this log's last checkpoint; nothing where it has none.
    """

    findings: tuple[Finding, ...]
    rounds: tuple[RoundSummary, ...]
    participation: dict[str, int]
    entries: int
    previous: bytes
    last: bytes

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
            more = f"; {len(others)} more checks fail" if others else ""
            raise TrustError(f"the transcript does not hold ({first.check.value}): {first.text}{more}")
