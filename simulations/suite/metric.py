"""What a suite compares: the accuracy of classifiers, or the loss of language models. How it reads in a report."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from simulations.report.formatting import share
from simulations.suite.outcome import Tally, TrialResult
from simulations.suite.statistics import Difference, Estimate


@dataclass(frozen=True, slots=True)
class Metric:
    """A figure of a client's texts.

    Attributes:
        name: In a heading.
        of: Its value for a tally.
        sign: 1 if more is better, else -1.
        titles: Of the figures over clients; ``p10`` is the tenth from the bad end.
        decile: ``p10`` in a sentence.
        factor, digits, unit: How a difference is printed.
        differences: The unit of differences in full.
    """

    name: str
    of: Callable[[Tally], float]
    sign: int
    titles: Mapping[str, str]
    decile: str
    factor: float
    digits: int
    unit: str
    differences: str

    def score(self, tally: Tally) -> float:
        """The value, or its negative where less is better."""
        return self.sign * self.of(tally)

    def reached(self, value: float, target: float) -> bool:
        """Whether a value is as good as the target."""
        return self.sign * value >= self.sign * target

    def estimate(self, found: Estimate) -> Estimate:
        """An estimate of scores as one of values."""
        return found if self.sign > 0 else Estimate(-found.value, -found.high, -found.low)

    def difference(self, found: Difference) -> Difference:
        """A difference of scores as one of values."""
        return found if self.sign > 0 else Difference(-found.value, -found.high, -found.low, found.p, found.adjusted)

    def text(self, value: float) -> str:
        """A value; a dash for NaN."""
        return share(value)

    def size(self, difference: float, *, signed: bool = False) -> str:
        """A difference without its unit, with its sign if asked."""
        return f"{self.factor * difference:{'+' if signed else ''}.{self.digits}f}"

    def better(self, difference: float) -> bool:
        """Whether the first of two arms with this difference is the better one."""
        return self.sign * difference > 0


TITLES = {"mean": "mean", "p10": "10th pct.", "worst": "worst", "unseen": "unseen"}
ACCURACY = Metric(
    name="accuracy",
    of=lambda tally: tally.accuracy,
    sign=1,
    titles=TITLES,
    decile="10th",
    factor=100,
    digits=1,
    unit="points",
    differences="percentage points",
)
BITS = Metric(
    name="bits per byte",
    of=lambda tally: tally.bits,
    sign=-1,
    titles=TITLES | {"p10": "90th pct."},
    decile="90th",
    factor=1,
    digits=3,
    unit="bits per byte",
    differences="bits per byte",
)
METRICS = {metric.name: metric for metric in (ACCURACY, BITS)}


def metric_of(results: Sequence[TrialResult]) -> Metric:
    """What trials of one suite are compared by; accuracy if there are none."""
    tallies = (tally for result in results for c in result.clients for tally in (c.validation, c.test, c.public))
    return BITS if any(tally.predicted for tally in tallies) else ACCURACY
