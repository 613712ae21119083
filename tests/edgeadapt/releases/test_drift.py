"""Whether a fleet's answers have changed: how often the test says so where nothing has, and where something has."""

from dataclasses import replace

import numpy as np
import pytest

from aggregation.errors import ConfigError, DataError, TrustError
from edgeadapt.releases.drift import JudgedDrift, Observed, compare
from edgeadapt.releases.prepared import RollbackCondition
from edgeadapt.rounds.observation import DAYS, DEVICES, LEAST, LONGEST, NOISE, PRESENT, SINCE, ObservationRounds
from tests.support import refused

LABELS, FLEET, ANSWERS = tuple(f"l{i}" for i in range(18)), 200, 40
# The noise multiplier of the settings, of the devices that a round must count on: a sum of all has a third more.
MULTIPLIER = ObservationRounds().noise_multiplier * 1.37
NEW = np.array([*[0.25] * 3, *[0.25 / 15] * 15])  # labels that answers to new intents get


def observed(
    number: int, rng: np.random.Generator, habits: np.ndarray, histogram: str, new: float = 0.0, alone: float = 0.0
) -> Observed:
    """Sum the contributions of a fleet with these ``habits``: the share of doubt of each device, or of each label.

    A share of ``new`` of all answers are to new intents; ``alone``: of the devices are not in the other round.
    """
    own = habits.copy()
    others = rng.random(FLEET) < alone
    own[others] = habits_of(rng, histogram)[others]
    answers = np.maximum(LEAST, rng.poisson(ANSWERS, FLEET))
    fresh = rng.binomial(answers, new)
    if histogram == "doubt":
        shares = ((rng.binomial(answers - fresh, own) + rng.binomial(fresh, 0.95)) / answers)[:, None]
    else:
        shares = (rng.multinomial(answers - fresh, own) + rng.multinomial(fresh, NEW)) / answers[:, None]
        shares = np.concatenate([shares, np.zeros((FLEET, 1))], 1)  # no text without an answer
    lengths = np.linalg.norm(shares, axis=1, keepdims=True)
    shares = shares * np.minimum(1, LONGEST / np.maximum(lengths, 1e-12))
    noise = MULTIPLIER * ObservationRounds(histograms=(histogram,)).bound(1.0, False)  # type: ignore[arg-type]
    sums = shares.sum(0) + rng.normal(0, noise, shares.shape[1])
    metrics = {f"{histogram}.{i}": each for i, each in enumerate(sums.tolist())}
    metrics |= {DEVICES: FLEET + rng.normal(0, noise) / PRESENT, NOISE: noise, SINCE: 10.0 * number, DAYS: 7.0}
    return Observed(number, f"{number:064x}", LABELS, metrics, others.mean())


def habits_of(rng: np.random.Generator, histogram: str) -> np.ndarray:
    return rng.beta(1.5, 10, FLEET) if histogram == "doubt" else rng.dirichlet(np.full(18, 0.5), FLEET)


def alarms(histogram: str, runs: int, *, new: float = 0.0, alone: float = 0.0) -> float:
    """Share of comparisons that say that the answers have changed."""
    found = 0
    for seed in range(runs):
        rng = np.random.default_rng([seed, len(histogram)])
        habits = habits_of(rng, histogram)
        before = observed(1, rng, habits, histogram, alone=alone)
        found += bool(compare(before, observed(2, rng, habits, histogram, new, alone)).changed)
    return found / runs


@pytest.mark.parametrize(("histogram", "alone"), [("doubt", 0.0), ("doubt", 0.3), ("labels", 0.0), ("labels", 0.3)])
def test_where_nothing_has_changed_an_alarm_is_rare(histogram: str, alone: float) -> None:
    # Of 1,000 runs at the nominal 5 %, more than 76 are alarms with a probability below 1e-4.
    assert alarms(histogram, 1000, alone=alone) <= 0.076


def test_one_new_answer_in_ten_is_found_with_200_devices() -> None:
    assert alarms("doubt", 300, new=0.1) >= 0.85  # 0.9, less three standard deviations of 300 runs


def test_what_cannot_be_compared_is_refused() -> None:
    rng = np.random.default_rng(0)
    doubt = observed(1, rng, habits_of(rng, "doubt"), "doubt")
    with refused(ConfigError, "observation.histograms"):
        compare(doubt, observed(2, rng, habits_of(rng, "labels"), "labels"))
    few = replace(doubt, metrics=doubt.metrics | {DEVICES: 3.0})
    with refused(ConfigError, "observation.histograms"):
        compare(doubt, few)


def test_a_summary_has_the_most_frequent_labels_or_the_quantiles_of_ordered_bins() -> None:
    metrics = {DEVICES: 100.0, NOISE: 0.1, "labels.0": 5.0, "labels.1": 10.0, "labels.2": 4.0, "labels.3": 1.0}
    metrics |= {
        "probability.0": 10.0,
        "probability.8": 30.0,
        "unknown.1": 45.0,
        "lessons.undone": 2.0,
    }
    found = Observed(1, "a" * 64, ("on", "off", "up"), metrics, 0.0)
    assert found.summary("labels") == "label off 0.50, label on 0.25, label up 0.20"
    assert found.summary("probability") == "median: probability .9 to 1; ninth decile: probability .9 to 1"
    assert found.summary("unknown") == "median: unknown tokens up to 0 %; ninth decile: unknown tokens 0 to 10 %"
    assert found.summary("lessons") == "undone 0.02"


def test_a_prepared_rollback_takes_worse_answers_of_days_after_the_release() -> None:
    """Observation 1 is of days 10 to 16, and 2 of days 20 to 26."""
    rng = np.random.default_rng(0)
    habits = habits_of(rng, "doubt")
    before, after = observed(1, rng, habits, "doubt"), observed(2, rng, habits, "doubt", new=0.4)
    condition = RollbackCondition(3, 2, 0.02, {}, began=17)
    condition.require(JudgedDrift(before, after, worse=True))
    with refused(DataError, "drift"):
        condition.require(JudgedDrift(after, before, worse=True))
    better = JudgedDrift(replace(after, metrics=after.metrics | {SINCE: 10.0}), before, worse=False)
    for began in (16, 20, None):
        with refused(TrustError, "drift"):
            replace(condition, began=began).require(JudgedDrift(before, after, worse=True))
    with refused(TrustError, "drift"):
        condition.require(better)
