"""What no rule of the protocol forbids, and yet shows more of a few devices than an auditor would expect.

The difference of two sums from one adapter shows the updates of the devices that are in one sum only, as far as the
others trained alike; so do rounds that were aborted once their sum could be unmasked (``RepeatedSums``).

Other warnings have a code each: what a device with the default policy refuses, a private part of an adapter
that is shared, a round whose survivors have far fewer examples than those of the others, and one that hardly moved its
adapter, so that the next sum is like a second one from the same adapter."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from aggregation.errors import ProtocolError
from aggregation.groups import total
from aggregation.policy import Policy
from aggregation.spec import SessionSpec
from edgeadapt.auditing.findings import Check, Finding, ProducedAdapter, Report, RoundSummary, Status, count
from edgeadapt.methods.parts import Part
from edgeadapt.rounds import taskkinds
from edgeadapt.rounds.roundtask import RoundTask
from edgeadapt.rounds.tasklimits import TaskLimits

NAMED = 6  # devices that a text lists by name; the report has all of them
_REMEDY = "An honest coordinator does this after a failure too; only differential privacy hides what a difference shows"
LIGHT = 0.25  # of the median weight of a survivor: below it, a round is named


@dataclass(slots=True)
class Weaknesses:
    """Follows a coordinator's sessions, in order. ``private``: digest of a base → the parts of an adapter that a task
    left to the devices. ``weights``: examples for each survivor, of the rounds whose sums are known."""

    private: dict[str, set[Part]] = field(default_factory=lambda: defaultdict(set))
    weights: list[float] = field(default_factory=list)

    def check(self, report: Report, still: Mapping[int, str]) -> tuple[Finding, ...]:
        """Return the warnings of one session; one finding that says that there are none, if so. ``still`` is that of
        ``Recomputation``; empty without the adapters."""
        if report.failed or report.spec is None:
            return (Finding(Check.WEAKNESSES, Status.NOT_REACHED, ""),)
        texts = dict[str, str]()
        for about, text in (*_offered(report, report.spec), *self._asked(report), *self._weighed(report.produced)):
            texts.setdefault(about, text)  # the first round of each code: what it repeats is the same
        for number, moved in still.items():
            text = f"round {number} moved its adapter {moved}: a sum over other devices after it shows their difference"
            texts.setdefault("adapter.movement", text)
        if texts:
            return tuple(Finding(Check.WEAKNESSES, Status.WARNING, text, about=about) for about, text in texts.items())
        text = "a device with the default policy accepts the offer and each task, and no round shows more than others"
        return (Finding(Check.WEAKNESSES, Status.PASS, text),)

    def _asked(self, report: Report) -> Iterator[tuple[str, str]]:
        for place, encoded in report.tasks:
            try:
                task = taskkinds.decode(encoded)
                TaskLimits().check(task, {})
            except ProtocolError as error:
                yield error.about, f"a device with the default policy refuses the task of round {place.round} ({error})"
                continue
            yield from self._shared(report.base, place.round, task)

    def _shared(self, base: str, number: int, task: RoundTask) -> Iterator[tuple[str, str]]:
        if shared := sorted(self.private[base] & task.changes):
            text = f"round {number} shares the part {shared[0].value}, which an earlier task left to the devices"
            yield "task.shared", f"{text}: what they trained of it must not leave them"
        self.private[base] |= task.private

    def _weighed(self, produced: tuple[ProducedAdapter, ...]) -> Iterator[tuple[str, str]]:
        for each in produced:
            if each.sums is None or "weight" not in (sums := total(each.sums)):
                continue
            weight = float(sums["weight"][0]) / len(each.survivors)
            if self.weights and weight < LIGHT * (usual := median(self.weights)):
                text = f"survivors of round {each.place.round} have {weight:.1f} examples each, and usually {usual:.1f}"
                yield "round.weight", f"{text}: the sum is that of fewer devices than it names, or of other devices"
            self.weights.append(weight)


def _offered(report: Report, spec: SessionSpec) -> Iterator[tuple[str, str]]:
    try:
        Policy(known_bases=frozenset({report.base})).check(spec, len(report.participation))
    except ProtocolError as error:
        yield error.about, f"a device with the default policy refuses the offer ({error})"


@dataclass(slots=True)
class RepeatedSums:
    """Follows the sums through a coordinator's sessions, in order. ``seen``: digest of an adapter → log and round of
    each sum from it so far; with groups, of each round that named survivors."""

    seen: dict[str, list[tuple[str, RoundSummary]]] = field(default_factory=lambda: defaultdict(list))

    def check(self, log: str, rounds: Sequence[RoundSummary]) -> Finding:
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
