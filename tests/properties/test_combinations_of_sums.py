"""However a coordinator combines sums, enough honest devices are left in every combination (``graph.left_over``)."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation import graph
from aggregation.errors import ProtocolError
from aggregation.messages import Plan
from client.node import adapterstate
from client.node.adapterstate import AdapterState
from tests.support.fleet import session_spec

DIGEST, FRACTION = "aa" * 32, 0.1
PLAN = Plan(bytes(32), 1, ("a", "b"), 1, DIGEST, b"")
SPEC = session_spec(20)


class Devices:
    """Honest devices, by number, with what each remembers; corrupt ones help to every sum."""

    def __init__(self) -> None:
        self.states: dict[int, AdapterState] = {}

    def helpers(self, survivors: Sequence[int], asked: Sequence[int]) -> list[int]:
        """Those of ``asked`` that reveal shares for the sum over ``survivors``."""
        out, named = [], {f"device-{number:02d}": number for number in survivors}
        for number in asked:
            known = self.states.get(number, AdapterState(1, DIGEST, bytes(32)))
            try:
                self.states[number] = adapterstate.on_survivors(known, PLAN, SPEC, named, ())
            except ProtocolError:
                continue
            out.append(number)
        return out


def fewest_left(sets: Sequence[Sequence[int]]) -> int:
    """Fewest devices with a coefficient in a linear combination of the sums over ``sets``, other than zero.

    Such a combination is zero on as many kinds of devices as possible: on a maximal subspace that they span. A kind is
    a column: in which sets a device is.
    """
    everyone = sorted({number for each in sets for number in each})
    rows = sorted({tuple(int(number in each) for number in everyone) for each in sets})
    matrix = np.array(rows, dtype=float)
    kinds = np.unique(matrix, axis=1).T
    fewest = len(everyone)
    for size in range(len(rows)):
        for chosen in combinations(kinds, size):
            stack = np.array([*chosen, np.zeros(len(rows))])
            values, vectors = np.linalg.svd(stack)[1:]
            space = vectors[int((values > 1e-9).sum()) :]  # of the coefficients that are zero on the chosen kinds
            generic = np.array([1.0, 0.37, 0.111, 0.0123])[: len(space)] @ space
            combined = generic @ matrix
            fewest = min(fewest, int((np.abs(combined) > 1e-9).sum()))
    return fewest


@given(data=st.data(), count=st.integers(2, 4))
def test_no_combination_of_sums_leaves_fewer_honest_devices_than_the_policy_demands(data: Any, count: int) -> None:
    """Each sum is of its own cohort and helped to by as few devices as possible."""
    devices, free, sets = Devices(), list(range(40)), []
    for _ in range(count):
        cohort = data.draw(st.integers(8, 12), "cohort")
        corrupt = graph.count_of(cohort, FRACTION)
        threshold = graph.least_threshold(cohort, FRACTION)
        asked = free[: threshold - corrupt]
        others = [number for number in range(40) if number not in asked]
        also = data.draw(st.permutations(others), "others")[: data.draw(st.integers(0, cohort - threshold), "more")]
        survivors = sorted([*asked, *also])
        helpers = devices.helpers(survivors, [*asked, *data.draw(st.lists(st.sampled_from(survivors)), "asked too")])
        if len(helpers) + corrupt >= threshold:
            sets.append(survivors)
            free = [number for number in free if number not in helpers]
    if sets:
        assert fewest_left(sets) >= graph.MINIMUM_SURVIVORS


@pytest.mark.parametrize(("cohort", "lower"), [(8, 0), (8, 1), (9, 0), (12, 0), (15, 0), (15, 1)])
def test_the_bound_of_the_complete_graph_is_met(cohort: int, lower: int) -> None:
    """Two cohorts whose helpers are different devices, and whose survivors are as equal as they can be."""
    corrupt, threshold = graph.count_of(cohort, FRACTION), graph.least_threshold(cohort, FRACTION) - lower
    helping, more = threshold - corrupt, cohort - threshold
    one, other = list(range(helping)), list(range(helping, 2 * helping))
    sets = ([*one, *other[:more]], [*one[:more], *other])
    devices = Devices()
    assert devices.helpers(sets[0], one) == one
    assert devices.helpers(sets[1], other) == other
    assert devices.helpers(sets[1], one[:more]) == []
    left = graph.left_over(cohort, corrupt, cohort - 1, threshold, threshold)
    assert fewest_left(sets) == left
    assert (left >= graph.MINIMUM_SURVIVORS) is (lower == 0)


@given(data=st.data(), devices=st.integers(14, 40), half=st.integers(2, 6), corrupt=st.integers(0, 4))
def test_on_a_sparse_graph_a_sum_needs_as_many_helpers_as_the_bound_says(
    data: Any, devices: int, half: int, corrupt: int
) -> None:
    """Helpers leave the sum one after the other, as long as each honest survivor's seed can be reconstructed."""
    degree = 2 * half
    threshold = data.draw(st.integers(half + 1, degree + 1), "threshold")
    names = [f"device-{number:02d}" for number in range(devices)]
    near = graph.harary_neighbors(tuple(names), degree)
    shuffled = data.draw(st.permutations(names), "order")
    bad, honest = {*shuffled[:corrupt]}, shuffled[corrupt:]
    survivors = honest[: data.draw(st.integers(1, len(honest)), "survivors")]

    def unmasked(helpers: set[str]) -> bool:
        return all(len(({name} | near[name]) & (helpers | bad)) >= threshold for name in survivors)

    helpers = {*survivors}
    if not unmasked(helpers):
        return
    for name in data.draw(st.permutations(survivors), "leaving"):
        if unmasked(helpers - {name}):
            helpers.remove(name)
    bound = graph.left_over(devices, corrupt, degree, threshold, len(survivors) + corrupt)
    assert 2 * (2 * len(helpers) - len(survivors)) >= bound
