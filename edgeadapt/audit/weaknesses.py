"""What no rule of the protocol forbids, and yet shows more of a few devices than an auditor would expect.

Each is a warning with a code of its own: what a device with the default policy refuses, a private part of an adapter
that is shared, a round whose survivors have far fewer examples than those of the others, and one that hardly moved its
adapter, so that the next sum is like a second one from the same adapter.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median

from aggregation.errors import ProtocolError
from aggregation.groups import total
from aggregation.policy import Policy
from aggregation.spec import SessionSpec
from edgeadapt.audit.findings import Check, Finding, ProducedAdapter, Report, Status
from edgeadapt.methods.parts import Part
from edgeadapt.rounds import taskkinds
from edgeadapt.rounds.roundtask import RoundTask
from edgeadapt.rounds.tasklimits import TaskLimits

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
        for about, text in (
            *_offered(report, report.spec),
            *self._asked(report),
            *self._weighed(report.produced),
            *_stood(still),
        ):
            texts.setdefault(about, text)  # the first round of each code: what it repeats is the same
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


def _stood(still: Mapping[int, str]) -> Iterator[tuple[str, str]]:
    for number, moved in still.items():
        text = f"round {number} moved its adapter {moved}: a sum over other devices after it shows their difference"
        yield "adapter.movement", text
