"""Sums that show more than one sum should: of rounds that were then aborted, and of rounds from one adapter.

The difference of two sums from one adapter shows the updates of the devices that are in one sum only, as far as the
others trained alike. It is a warning only: an honest coordinator repeats an aborted round in the same way. Only noise
in every sum (differential privacy) would hide what a difference shows.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from edgeadapt.audit.findings import Check, Finding, RoundSummary, Status, count

NAMED = 6  # devices that a text lists by name; the report has all of them
_REMEDY = "An honest coordinator does this after a failure too; only differential privacy hides what a difference shows"


@dataclass(slots=True)
class RepeatedSums:
    """Follows the sums through a coordinator's sessions, in order. ``seen``: digest of an adapter → log and round of
    each sum from it so far; with groups, of each round that named survivors."""

    seen: dict[str, list[tuple[str, RoundSummary]]] = field(default_factory=lambda: defaultdict(list))

    def check(self, log: str, rounds: Sequence[RoundSummary]) -> Finding:
        """Check the rounds of one session in order, whose log has the name ``log``."""
        aborted, repeated = list[str](), list[str]()
        for current in rounds:
            if problem := self._dealt_otherwise(current):
                return Finding(Check.REPEATS, Status.FAIL, problem, about="plan.former")
            if current.unmasked and not current.result:
                devices = _names(current.unmasked)
                aborted.append(f"round {current.round} has no result, and its sum could be unmasked, over {devices}")
            repeated += self._repeats(log, current) if current.unmasked else ()
            if current.unmasked or (current.dealt and current.survivors):
                self.seen[current.adapter[1]].append((log, current))
        if not aborted and not repeated:
            text = "no round without a result could be unmasked, and no two sums are from one adapter"
            return Finding(Check.REPEATS, Status.PASS, text)
        about = "round.repeated" if repeated else "round.aborted"
        return Finding(Check.REPEATS, Status.WARNING, ". ".join([*aborted, *repeated, _REMEDY]), about=about)

    def _dealt_otherwise(self, current: RoundSummary) -> str:
        """Say what is wrong with the devices that a round deals into groups; empty if nothing. They are the members of
        its plan or, where survivors of a round from its adapter were named before, those that were dealt then."""
        before = [each.dealt for _, each in self.seen.get(current.adapter[1], [])]
        expected = before[-1] if before else current.planned if current.dealt else ()
        if current.dealt == expected:
            return ""
        return f"round {current.round} deals other devices into its groups than its plan, and earlier sums, have"

    def _repeats(self, log: str, current: RoundSummary) -> Iterator[str]:
        for other, before in self.seen[current.adapter[1]]:
            if not before.unmasked:
                continue
            where = f"round {before.round}" + ("" if other == log else f" of {other}")
            either = sorted({*before.unmasked} ^ {*current.unmasked})
            alone = f"{_names(either)} in one of the two" if either else "the same devices in both"
            both = f"{where} and round {current.round}"
            yield f"{both} have sums from one adapter that were or could be unmasked, with {alone}"


def _names(devices: Sequence[str]) -> str:
    """List the devices, by name where they are few.

    >>> _names(["a", "b"])
    '2 devices (a, b)'
    """
    more = ", …" if len(devices) > NAMED else ""
    return f"{count(len(devices), 'device')} ({', '.join(devices[:NAMED])}{more})"
