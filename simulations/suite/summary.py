"""What a suite found, in numbers: figures of each arm with intervals, differences of pairs, costs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from aggregation.errors import DataError
from simulations.suite.metric import Metric, metric_of
from simulations.suite.outcome import Cost, RoundPoint, TrialResult
from simulations.suite.plan import SearchOutcome
from simulations.suite.settings import Kind, Overrides, SuiteSettings
from simulations.suite.statistics import (
    STATISTICS,
    Difference,
    Estimate,
    Values,
    estimate,
    figure,
    holm,
    p_value,
    resampled,
)

FIGURES = ("mean", "p10", "worst", "unseen")
RESAMPLING_SEED = 20  # so that a report is the same each time
Found = Mapping[str, tuple[SearchOutcome, Mapping[int, TrialResult]]]  # arm → its search, and its result by seed


@dataclass(frozen=True, slots=True)
class Reached:
    """The rounds of a federation until its adapter reaches the target, and one device's bytes until then.

    Attributes:
        seeds: Seeds in which it is reached; the others count for nothing.
        rounds, bytes: Means over these seeds; NaN if there are none.
    """

    seeds: int
    rounds: float
    bytes: float


@dataclass(frozen=True, slots=True)
class ArmSummary:
    """One arm.

    Attributes:
        figures: ``mean``, ``p10`` (10th percentile; of bits per byte the 90th) and ``worst`` test value of the clients
            that are not unseen, and the mean of those that are; NaN if there are none. Means over seeds.
        public: Mean value of the clients' models on public texts.
        forgotten: Of the test texts that the arm of kind base answers right, the share that this arm answers wrong; NaN
            without such an arm.
        aggregation_error: Mean over seeds; NaN if it was not measured.
        cost: Means over seeds.
        reached: The rounds to the target; None if the arm has no rounds or the suite no target.
        constants: That its search chose.
        candidates, search_cpu_seconds: Of its search.
    """

    kind: Kind
    figures: dict[str, Estimate]
    public: float
    forgotten: float
    aggregation_error: float
    cost: Cost
    reached: Reached | None
    constants: Overrides
    candidates: int
    search_cpu_seconds: float


@dataclass(frozen=True, slots=True)
class PairSummary:
    """Two arms: the figures of the first minus those of the second."""

    first: str
    second: str
    figures: dict[str, Difference]


@dataclass(frozen=True, slots=True)
class SuiteSummary:
    """A suite. ``clients`` and ``unseen`` are counted over all seeds; ``metric`` is a key of ``METRICS``."""

    name: str
    metric: str
    seeds: tuple[int, ...]
    search_seeds: tuple[int, ...]
    target: float
    clients: int
    unseen: int
    arms: dict[str, ArmSummary]
    pairs: tuple[PairSummary, ...]

    def to_json(self) -> dict[str, Any]:
        """The object that ``--json`` prints. NaN becomes null."""
        table: dict[str, Any] = _plain(asdict(self))
        return table


def summarize(settings: SuiteSettings, found: Found) -> SuiteSummary:
    """The numbers of a finished suite.

    Args:
        settings: Of the suite.
        found: Of every arm, with a result for every seed.

    Raises:
        DataError: Two arms have different clients or test texts, so that they cannot be compared.
    """
    _require_pairs(found)
    names = tuple(found)
    metric = metric_of([result for _, results in found.values() for result in results.values()])
    draws, values, counts = {}, {}, {}
    for title in FIGURES:
        samples = samples_of(found, settings.seeds, unseen=title == "unseen")
        statistic = STATISTICS["mean" if title == "unseen" else title]
        if samples:
            rng = np.random.default_rng(RESAMPLING_SEED)
            values[title], draws[title] = figure(samples, statistic), resampled(samples, statistic, rng)
            counts[title] = sum(sample.shape[1] for sample in samples)
    base = next((name for name in names if settings.arms[name].kind is Kind.BASE), None)
    arms = {
        name: ArmSummary(
            kind=settings.arms[name].kind,
            figures={
                title: metric.estimate(estimate(float(values[title][i]), draws[title][i], counts[title]))
                if title in values
                else Estimate(math.nan, math.nan, math.nan)
                for title in FIGURES
            },
            public=_mean([metric.of(c.public) for r in results.values() for c in r.clients]),
            forgotten=_forgotten(found[base][1], results) if base else math.nan,
            aggregation_error=_mean([e for r in results.values() if (e := r.aggregation_error) is not None]),
            cost=_cost([result.cost for result in results.values()]),
            reached=_reached([r.rounds for r in results.values()], settings.target, metric)
            if settings.target and settings.arms[name].kind.federated
            else None,
            constants=chosen.constants,
            candidates=len(chosen.scores),
            search_cpu_seconds=chosen.cpu_seconds,
        )
        for i, (name, (chosen, results)) in enumerate(found.items())
    }
    clients = [c for result in next(iter(found.values()))[1].values() for c in result.clients]
    return SuiteSummary(
        name=settings.name,
        metric=metric.name,
        seeds=settings.seeds,
        search_seeds=settings.search.seeds if any(arm.search for arm in settings.arms.values()) else (),
        target=settings.target,
        clients=len(clients),
        unseen=sum(c.unseen for c in clients),
        arms=arms,
        pairs=_pairs(settings.pairs, names, values, draws, counts, metric),
    )


def _require_pairs(found: Found) -> None:
    first, (_, expected) = next(iter(found.items()))
    for name, (_, results) in found.items():
        for seed, result in results.items():
            same = [(c.name, c.unseen, c.test.count) for c in expected[seed].clients]
            if [(c.name, c.unseen, c.test.count) for c in result.clients] != same:
                raise DataError(
                    f"arms {first!r} and {name!r} have different clients with seed {seed}: give them one population",
                    about=name,
                )


def samples_of(found: Found, seeds: Sequence[int], *, unseen: bool) -> list[Values]:
    """For each seed the test scores of some clients, shape ``(arms, clients)``; none if there are no such clients.

    A score is an accuracy, or the negative of a loss in bits per byte.

    Args:
        found: Of every arm.
        seeds: That ``found`` has.
        unseen: Whether of the unseen clients, or of the others.
    """
    metric = metric_of([result for _, results in found.values() for result in results.values()])
    samples = [
        np.array(
            [
                [metric.score(c.test) for c in results[seed].clients if c.unseen is unseen]
                for _, results in found.values()
            ]
        )
        for seed in seeds
    ]
    return samples if all(sample.size for sample in samples) else []


def _pairs(
    pairs: Sequence[tuple[str, str]],
    names: Sequence[str],
    values: Mapping[str, Values],
    draws: Mapping[str, Values],
    counts: Mapping[str, int],
    metric: Metric,
) -> tuple[PairSummary, ...]:
    found: list[dict[str, Difference]] = [{} for _ in pairs]
    for title in values:
        places = [(names.index(first), names.index(second)) for first, second in pairs]
        apart = [draws[title][i] - draws[title][j] for i, j in places]
        chances = [p_value(each, counts[title]) for each in apart]
        for row, (i, j), each, p, adjusted in zip(found, places, apart, chances, holm(chances), strict=True):
            interval = estimate(float(values[title][i] - values[title][j]), each, counts[title])
            row[title] = metric.difference(Difference(interval.value, interval.low, interval.high, p, adjusted))
    return tuple(PairSummary(*pair, row) for pair, row in zip(pairs, found, strict=True))


def _forgotten(base: Mapping[int, TrialResult], results: Mapping[int, TrialResult]) -> float:
    answers = [
        (before, after)
        for seed, result in results.items()
        for known, client in zip(base[seed].clients, result.clients, strict=True)
        for before, after in zip(known.test.right, client.test.right, strict=True)
    ]
    kept = [after == "1" for before, after in answers if before == "1"]
    return 1 - _mean(kept)


def _cost(costs: Sequence[Cost]) -> Cost:
    return Cost(
        epochs=costs[0].epochs,
        steps=round(_mean([cost.steps for cost in costs])),
        cpu_seconds=_mean([cost.cpu_seconds for cost in costs]),
        bytes_up=_mean([cost.bytes_up for cost in costs]),
        bytes_down=_mean([cost.bytes_down for cost in costs]),
    )


def _reached(runs: Sequence[Sequence[RoundPoint]], target: float, metric: Metric) -> Reached:
    found = []
    for points in runs:
        for before, point in pairwise((RoundPoint(0, None, 0.0), *points)):  # a round states what it began with
            if point.value is not None and metric.reached(point.value, target):
                found.append((before.round, before.bytes))
                break
    return Reached(len(found), _mean([rounds for rounds, _ in found]), _mean([size for _, size in found]))


def _plain(value: Any) -> Any:
    match value:
        case dict():
            return {key: _plain(below) for key, below in value.items()}
        case list() | tuple():
            return [_plain(below) for below in value]
        case Kind():
            return value.value
        case float() if not math.isfinite(value):
            return None
    return value


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan
