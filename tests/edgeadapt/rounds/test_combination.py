"""The combination of groups: bounds, symmetry and exact values, and what one group can do to it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from aggregation.errors import ConfigError, DataError
from edgeadapt.formats.layout import Floats
from edgeadapt.formats.manifest import ServerRule
from edgeadapt.rounds.combination import Combination, Median, TrimmedMean, combine, distances, of_rule, to_rule
from tests.support import refused

RULES = (Median(), TrimmedMean(0.1), TrimmedMean(0.34))
SIZE = 5
numbers = st.floats(-1e6, 1e6, width=32)
means = st.lists(arrays.arrays(np.float32, SIZE, elements=numbers), min_size=1, max_size=9)


@given(means, st.sampled_from(RULES), st.randoms())
def test_the_order_of_the_groups_makes_no_difference_to_a_bit(
    given_means: list[Floats], rule: Combination, random: st.DataObject
) -> None:
    mixed = list(given_means)
    random.shuffle(mixed)  # type: ignore[attr-defined]
    assert combine(rule, mixed).tobytes() == combine(rule, given_means).tobytes()


@given(means, st.sampled_from(RULES))
def test_a_combination_is_between_the_values_that_are_not_cut_off(given_means: list[Floats], rule: Combination) -> None:
    found, values = combine(rule, given_means), np.sort(np.stack(given_means), axis=0)
    cut = rule.cut(len(given_means))
    assert (values[cut] <= found).all()
    assert (found <= values[len(given_means) - 1 - cut]).all()


@given(means, st.sampled_from(RULES), st.floats(-(2.0**100), 2.0**100, width=32))
def test_one_lying_group_of_three_or_more_moves_no_coordinate_beyond_the_others(
    given_means: list[Floats], rule: Combination, lie: float
) -> None:
    honest = [*given_means, *given_means][: max(2, len(given_means))]
    found = combine(rule, [*honest, np.full(SIZE, lie, np.float32)])
    assert (found >= np.min(honest, axis=0)).all()
    assert (found <= np.max(honest, axis=0)).all()


def test_the_plain_mean_has_no_such_bound() -> None:
    honest, lie = [np.float32([1.0]), np.float32([2.0])], np.float32([900.0])
    assert np.mean([*honest, lie], axis=0) > 2
    assert combine(TrimmedMean(0.1), [*honest, lie]) == [2.0]


def test_exact_values() -> None:
    groups = [np.float32([4, -0.0]), np.float32([1, 0.0]), np.float32([9, -0.0]), np.float32([2, 0.0])]
    assert combine(Median(), groups).tolist() == [3.0, 0.0]
    assert combine(Median(), groups[:3]).tolist() == [4.0, 0.0]
    assert combine(TrimmedMean(0.25), groups).tolist() == [3.0, 0.0]
    assert combine(TrimmedMean(0.25), groups[:2]).tolist() == [2.5, 0.0]
    five = [np.float32([value]) for value in (5, 1, 100, 3, 4)]
    assert combine(TrimmedMean(0.2), five).tolist() == [4.0]
    assert combine(Median(), five).tolist() == [4.0]
    assert distances([np.float32([3, 4]), np.float32([0, 0])], np.float32([0, 0])) == (5.0, 0.0)


def test_a_zero_has_one_sign_whatever_the_groups_have() -> None:
    for first, second in ((-0.0, 0.0), (0.0, -0.0), (-0.0, -0.0)):
        found = combine(Median(), [np.float32([first]), np.float32([second])])
        assert found.tobytes() == np.float32([0.0]).tobytes()


@pytest.mark.parametrize("rule", RULES)
def test_a_manifest_names_the_combination(rule: Combination) -> None:
    assert of_rule(to_rule(rule)) == rule


def test_bad_combinations_are_refused() -> None:
    for share in (0.0, 0.5, -0.1, float("nan")):
        with refused(ConfigError, "combination.share"):
            TrimmedMean(share)
    for rule in (ServerRule("Mean", {}), ServerRule("Median", {"share": 0.1}), ServerRule("TrimmedMean", {})):
        with refused(ConfigError, "combination"):
            of_rule(rule)
    with refused(DataError, "combination.shape"):
        combine(Median(), [])
    with refused(DataError, "combination.shape"):
        combine(Median(), [np.zeros(2, np.float32), np.zeros(3, np.float32)])
    for bad in (np.nan, np.inf):
        with refused(DataError, "combination.means"):
            combine(Median(), [np.float32([bad]), np.float32([0.0])])
