"""What a suite found, in numbers: figures of each arm with intervals, differences of pairs, costs.

Intervals and tests are by the bootstrap (Efron and Tibshirani 1993). A seed has its own clients, and clients of a seed
share one federation. So both levels are resampled: seeds with replacement, then clients with replacement within each
drawn seed. Arms are compared on the same draws, which leaves what makes a client hard for both out of their difference.
Where clients differ more than seeds do, the intervals are a little too wide; where seeds differ more, three seeds give
intervals that are too narrow. The tests measure both."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from aggregation.errors import DataError
from simulations.plan import Kind, Overrides, SearchOutcome, SuiteSettings
from simulations.result import Cost, Metric, Outcome, RoundPoint, RoundTally, TrialResult, metric_named, metric_of

RESAMPLES = 4000
FEWEST = 6  # clients over all seeds: of fewer, resamples say nothing about others
LEVEL = 0.95

Values = NDArray[np.float64]
Statistic = Callable[[Values], Values]  # reduces the last axis, that of the clients

STATISTICS: dict[str, Statistic] = {
    "mean": lambda values: values.mean(axis=-1),
    "p10": lambda values: np.percentile(values, 10, axis=-1),
    "worst": lambda values: values.min(axis=-1),
}
FIGURES = ("mean", "p10", "worst", "unseen")
RESAMPLING_SEED = 20  # so that a report is the same each time
Found = Mapping[str, tuple[SearchOutcome, Mapping[int, Outcome]]]  # arm → its search, and its outcome by seed
Whole = Mapping[str, tuple[SearchOutcome, Mapping[int, TrialResult]]]  # arms that have a result with every seed
DIGITS = 2  # significant ones of the CPU time by which arms are cheap: less is chance


@dataclass(frozen=True, slots=True)
class Estimate:
    """Its interval at ``LEVEL`` is NaN where there are too few clients for one."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Difference:
    value: float
    low: float
    high: float
    p: float  # two-sided, of the same resamples as the interval
    adjusted: float  # ``p`` after Holm's correction for all pairs of the report

    @property
    def is_noise(self) -> bool:
        return not (self.low > 0 or self.high < 0)

    def scaled(self, factor: float) -> "Difference":
        low, high = sorted((factor * self.low, factor * self.high))
        return replace(self, value=factor * self.value, low=low, high=high)


def figure(samples: Sequence[Values], statistic: Statistic) -> Values:
    """Return the mean over seeds of a statistic over clients, shape ``(arms,)``. ``samples`` has for each seed the
    values, shape ``(arms, clients)``; at least one client."""
    return np.mean([statistic(values) for values in samples], axis=0)  # type: ignore[no-any-return]


def resampled(samples: Sequence[Values], statistic: Statistic, rng: np.random.Generator) -> Values:
    """Return ``figure`` of resampled seeds and clients, shape ``(arms, RESAMPLES)``; all arms have the same draws."""
    arms, total = samples[0].shape[0], np.zeros((samples[0].shape[0], RESAMPLES))
    for _ in samples:  # one drawn seed after the other
        drawn = rng.integers(len(samples), size=RESAMPLES)
        found = np.empty((arms, RESAMPLES))
        for seed, values in enumerate(samples):
            places = np.flatnonzero(drawn == seed)
            clients = rng.integers(values.shape[1], size=(len(places), values.shape[1]))
            found[:, places] = statistic(values[:, clients])
        total += found
    return total / len(samples)


def estimate(value: float, draws: Values, clients: int) -> Estimate:
    """Return a figure with the percentile interval of its resamples; without one for fewer than ``FEWEST`` clients."""
    if clients < FEWEST:
        return Estimate(value, math.nan, math.nan)
    low, high = np.percentile(draws, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return Estimate(value, float(low), float(high))


def p_value(draws: Values, clients: int) -> float:
    """Return the two-sided probability of a difference as far from 0, from resamples of the difference. It is at least
    2 / (resamples + 1), and 1 if there are fewer than ``FEWEST`` clients."""
    if clients < FEWEST:
        return 1.0
    side = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
    return min(1.0, 2 * (side + 1) / (len(draws) + 1))


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Apply Holm's correction (1979), in the same order.

    >>> holm([0.01, 0.04, 0.03])
    (0.03, 0.06, 0.06)
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, p_values[place] * (len(p_values) - rank)))
        adjusted[place] = largest
    return tuple(adjusted)


@dataclass(frozen=True, slots=True)
class Reached:
    """Counts a federation's rounds until its adapter reaches the target, and a device's bytes: means over ``seeds``."""

    seeds: int  # seeds in which it is reached; the others count for nothing
    rounds: float
    bytes: float


@dataclass(frozen=True, slots=True)
class ArmSummary:
    kind: Kind
    figures: dict[str, Estimate]
    public: float  # mean value of the clients' models on public texts
    forgotten: float
    aggregation_error: float  # mean over seeds; NaN if it was not measured
    epsilon: float  # mean over seeds; NaN without differential privacy
    canaries: float  # mean over seeds of the lower bound on epsilon for Gaussian noise; NaN without canaries
    cost: Cost  # means over seeds
    reached: Reached | None  # the rounds to the target; None if the arm has no rounds or the suite no target
    constants: Overrides  # that its search chose
    candidates: int
    search_cpu_seconds: float
    means: dict[int, float]  # seed → mean over the clients of the seeds that finished
    failed: dict[int, str]  # seed → why it failed; then the arm has no figures
    round_tallies: dict[int, RoundTally]  # seed → how its rounds ended
    complete: bool  # whether no seed failed, and no round is missing for good

    @property
    def is_void(self) -> bool:
        """Check whether the figures are not those of the arm: a seed failed, or has not what the arm stands for."""
        return bool(self.failed) or any(tally.is_void for tally in self.round_tallies.values())


@dataclass(frozen=True, slots=True)
class PairSummary:
    first: str
    second: str
    figures: dict[str, Difference]


@dataclass(frozen=True, slots=True)
class Standing:
    """Names the best arm in the mean, and the arms that no paired interval over seeds and clients tells from it. Arms
    with pooled texts, which give up privacy, and those that are void compete only where there are no others."""

    best: str
    cheapest: str  # of those within noise: the least CPU time of a device, then bytes
    within_noise: dict[str, Difference]  # arm → the mean of the arm minus that of the best
    comparable: bool  # whether there are enough clients for intervals; otherwise only equal arms are within noise


@dataclass(frozen=True, slots=True)
class SuiteSummary:
    """Summarizes a suite. ``clients`` and ``unseen`` are counted over all seeds; ``metric_named`` takes ``metric``."""

    name: str
    metric: str
    seeds: tuple[int, ...]
    search_seeds: tuple[int, ...]
    target: float
    clients: int
    unseen: int
    arms: dict[str, ArmSummary]
    pairs: tuple[PairSummary, ...]
    standing: Standing

    @property
    def compared_by(self) -> Metric:
        return metric_named(self.metric)

    def to_json(self) -> Any:
        """Return the object that ``--json`` prints. NaN becomes null."""
        return plain(self)


def summarize(settings: SuiteSettings, outcomes: Found) -> SuiteSummary:
    """Compute the numbers of a finished suite, in which one arm at least has a result with every seed. An arm of which
    a seed failed has no figures, and is compared with no other. Raises DataError if two arms have different clients or
    test texts."""
    whole = whole_arms(outcomes)
    _check_pairs(whole)
    figures, metric = {}, compared_by(whole)
    for title in FIGURES:
        if samples := samples_of(whole, settings.seeds, unseen=title == "unseen"):
            figures[title] = _Figure.of(list(whole), samples, STATISTICS["mean" if title == "unseen" else title])
    clients = [c for result in next(iter(whole.values()))[1].values() for c in result.clients]
    base = next((results for name, (_, results) in whole.items() if settings.arms[name].kind is Kind.BASE), None)
    arms = {name: _arm(settings, name, outcomes[name], figures, metric, base) for name in outcomes}
    return SuiteSummary(
        name=settings.name,
        metric=metric.name,
        seeds=settings.seeds,
        search_seeds=settings.search.seeds if any(arm.search for arm in settings.arms.values()) else (),
        target=settings.target,
        clients=len(clients),
        unseen=sum(c.unseen for c in clients),
        arms=arms,
        pairs=_pairs([pair for pair in settings.pairs if {*pair} <= {*whole}], figures, metric),
        standing=_standing(arms, figures["mean"], metric),
    )


def whole_arms(outcomes: Found) -> Whole:
    return {
        name: (chosen, results)
        for name, (chosen, by_seed) in outcomes.items()
        if len(results := {s: o for s, o in by_seed.items() if isinstance(o, TrialResult)}) == len(by_seed)
    }


def _standing(arms: Mapping[str, ArmSummary], means: "_Figure", metric: Metric) -> Standing:
    candidates = [name for name, arm in arms.items() if name in means.names and not arm.is_void]
    private = [name for name in candidates if not arms[name].kind.pooled]
    candidates = private or candidates or list(means.names)
    best = max(candidates, key=lambda name: means.values[means.names.index(name)])
    found = {name: means.difference(name, best).scaled(metric.sign) for name in candidates if name != best}
    comparable = means.clients >= FEWEST
    noise = {name: each for name, each in found.items() if not each.value or (comparable and each.is_noise)}

    def price(name: str) -> tuple[float, float]:
        cost = arms[name].cost
        return float(f"{cost.cpu_seconds:.{DIGITS}g}"), cost.bytes_up + cost.bytes_down

    return Standing(best, min([best, *noise], key=price), noise, comparable)


def _arm(
    settings: SuiteSettings,
    name: str,
    found: tuple[SearchOutcome, Mapping[int, Outcome]],
    figures: Mapping[str, "_Figure"],
    metric: Metric,
    base: Mapping[int, TrialResult] | None,
) -> ArmSummary:
    kind, (chosen, by_seed) = settings.arms[name].kind, found
    failed = {seed: outcome for seed, outcome in by_seed.items() if isinstance(outcome, str)}
    finished = {seed: outcome for seed, outcome in by_seed.items() if isinstance(outcome, TrialResult)}
    results = [] if failed else list(finished.values())
    nothing = Estimate(math.nan, math.nan, math.nan)
    shown = figures if results else {}
    targeted = results and settings.target and kind.federated
    return ArmSummary(
        kind=kind,
        figures={title: shown[title].estimate(metric, name) if title in shown else nothing for title in FIGURES},
        public=_mean([metric.of(c.public) for r in results for c in r.clients]),
        forgotten=_forgotten(base, finished) if base and results else math.nan,
        aggregation_error=_mean([e for r in results if (e := r.aggregation_error) is not None]),
        epsilon=_mean([e for r in results if (e := r.epsilon) is not None]),
        canaries=_mean([r.canaries.gaussian for r in results if r.canaries]),
        cost=_cost([result.cost for result in results]),
        reached=_reached([r.rounds for r in results], settings.target, metric) if targeted else None,
        constants=chosen.constants,
        candidates=len(chosen.scores),
        search_cpu_seconds=chosen.cpu_seconds,
        means={s: _mean([metric.of(c.test) for c in r.clients if not c.unseen]) for s, r in finished.items()},
        failed=failed,
        round_tallies={seed: r.round_tally for seed, r in finished.items() if kind.federated and not failed},
        complete=not failed and not any(result.round_tally.is_short for result in results),
    )


@dataclass(frozen=True, slots=True)
class _Figure:
    names: Sequence[str]
    values: Values
    draws: Values
    clients: int

    @classmethod
    def of(cls, names: Sequence[str], samples: Sequence[Values], statistic: Statistic) -> "_Figure":
        draws = resampled(samples, statistic, np.random.default_rng(RESAMPLING_SEED))
        return cls(names, figure(samples, statistic), draws, sum(sample.shape[1] for sample in samples))

    def estimate(self, metric: Metric, name: str) -> Estimate:
        place = self.names.index(name)
        scores = estimate(float(self.values[place]), self.draws[place], self.clients)
        return scores if metric.sign > 0 else Estimate(-scores.value, -scores.high, -scores.low)

    def difference(self, first: str, second: str) -> Difference:
        i, j = self.names.index(first), self.names.index(second)
        draws = self.draws[i] - self.draws[j]
        interval = estimate(float(self.values[i] - self.values[j]), draws, self.clients)
        p = p_value(draws, self.clients)
        return Difference(interval.value, interval.low, interval.high, p, p)


def compared_by(outcomes: Whole) -> Metric:
    return metric_of(result for _, results in outcomes.values() for result in results.values())


def _check_pairs(outcomes: Whole) -> None:
    first, (_, expected) = next(iter(outcomes.items()))
    for name, (_, results) in outcomes.items():
        for seed, result in results.items():
            same = [(c.name, c.unseen, c.test.count) for c in expected[seed].clients]
            if [(c.name, c.unseen, c.test.count) for c in result.clients] != same:
                raise DataError(
                    f"arms {first!r} and {name!r} have different clients with seed {seed}: give them one population",
                    about=name,
                )


def samples_of(outcomes: Whole, seeds: Sequence[int], *, unseen: bool) -> list[Values]:
    """Return for each seed the test scores of some clients, shape ``(arms, clients)``; none without such clients. A
    score is an accuracy, or the negative of a loss in bits per byte."""
    metric = compared_by(outcomes)
    samples = [
        np.array(
            [
                [metric.score(c.test) for c in results[seed].clients if c.unseen is unseen]
                for _, results in outcomes.values()
            ]
        )
        for seed in seeds
    ]
    return samples if all(sample.size for sample in samples) else []


def _pairs(pairs: Sequence[tuple[str, str]], figures: Mapping[str, _Figure], metric: Metric) -> tuple[PairSummary, ...]:
    rows: list[dict[str, Difference]] = [{} for _ in pairs]
    for title, figure in figures.items():
        differences = [figure.difference(*pair) for pair in pairs]
        adjusted = holm([difference.p for difference in differences])
        for row, difference, p in zip(rows, differences, adjusted, strict=True):
            row[title] = replace(difference, adjusted=p).scaled(metric.sign)
    return tuple(PairSummary(*pair, row) for pair, row in zip(pairs, rows, strict=True))


def _forgotten(base: Mapping[int, TrialResult], results: Mapping[int, TrialResult]) -> float:
    answers = [
        (before, after)
        for seed, result in results.items()
        for known, client in zip(base[seed].clients, result.clients, strict=True)
        for before, after in zip(known.test.right, client.test.right, strict=True)
    ]
    return 1 - _mean([after == "1" for before, after in answers if before == "1"])


def _cost(costs: Sequence[Cost]) -> Cost:
    if not costs:
        return Cost(0, 0, math.nan, math.nan, math.nan)
    return Cost(
        epochs=costs[0].epochs,
        steps=round(_mean([cost.steps for cost in costs])),
        cpu_seconds=_mean([cost.cpu_seconds for cost in costs]),
        bytes_up=_mean([cost.bytes_up for cost in costs]),
        bytes_down=_mean([cost.bytes_down for cost in costs]),
    )


def _reached(runs: Sequence[Sequence[RoundPoint]], target: float, metric: Metric) -> Reached:
    reached = []
    for points in runs:
        for before, point in pairwise((RoundPoint(0, None, 0.0), *points)):  # a round states what it began with
            if point.value is not None and metric.sign * point.value >= metric.sign * target:
                reached.append((before.round, before.bytes))
                break
    return Reached(len(reached), _mean([rounds for rounds, _ in reached]), _mean([size for _, size in reached]))


def plain(value: object) -> Any:
    return json.loads(TypeAdapter(Any).dump_json(value))  # NaN becomes null


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan
