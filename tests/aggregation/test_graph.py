"""The masking graph: the published bound, the Harary graph, and what a device requires of both."""

import hashlib
import math
from collections.abc import Callable
from fractions import Fraction
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation import graph
from aggregation.errors import ConfigError, ProtocolError
from aggregation.policy import Policy
from aggregation.spec import Adversary
from tests.support import refused

CONTEXT = hashlib.sha256(b"context").digest()
NAMES = [f"device-{number:04d}" for number in range(300)]


@pytest.mark.parametrize(
    ("devices", "corrupt", "dropout", "expected"),
    [(100, 0.05, 0.05, (16, 11)), (1000, 0.05, 0.05, (52, 37)), (100, 0.05, 0.33, (72, 39))],
)
def test_the_bound_gives_the_published_values(
    devices: int, corrupt: float, dropout: float, expected: tuple[int, int]
) -> None:
    """Bell et al. (CCS 2020) against a semi-malicious server, for σ = 40 and η = 20; neighbors alone have shares."""
    corrupt_devices, dropouts = graph.count_of(devices, corrupt), graph.count_of(devices, dropout)

    def secure(k: int, t: int) -> bool:
        both = devices * graph.hypergeometric_tail(devices - 1, corrupt_devices, k, 2 * t - k)
        return max(both, graph._two_windows(devices, corrupt_devices + dropouts, k // 2, k // 2)) <= 2.0**-graph.SIGMA

    assert graph._least(devices, dropouts, secure) == expected


@given(population=st.integers(1, 9), marked=st.integers(0, 9), drawn=st.integers(0, 9), least=st.integers(-1, 10))
def test_the_hypergeometric_tail_equals_counting_every_draw(
    population: int, marked: int, drawn: int, least: int
) -> None:
    marked, drawn = min(marked, population), min(drawn, population)
    draws = [sum(place < marked for place in draw) for draw in combinations(range(population), drawn)]
    assert math.isclose(
        graph.hypergeometric_tail(population, marked, drawn, least),
        Fraction(sum(hit >= least for hit in draws), len(draws)),
    )


@given(count=st.integers(4, 40), half=st.integers(1, 19), context=st.binary(min_size=32, max_size=32))
def test_neighbors_are_symmetric_and_as_many_as_the_degree(count: int, half: int, context: bytes) -> None:
    degree = min(2 * half, (count - 1) // 2 * 2)
    neighbors = graph.harary_neighbors(graph.harary_order(context, NAMES[:count]), degree)
    assert set(neighbors) == set(NAMES[:count])
    for device, others in neighbors.items():
        assert len(others) == degree
        assert device not in others
        assert all(device in neighbors[other] for other in others)


def test_the_graph_stays_connected_until_as_many_devices_as_its_degree_drop_out() -> None:
    neighbors = graph.harary_neighbors(graph.harary_order(CONTEXT, NAMES[:9]), 4)
    for gone in combinations(neighbors, 3):
        assert connected(neighbors, set(neighbors) - set(gone))
    assert not all(connected(neighbors, set(neighbors) - set(gone)) for gone in combinations(neighbors, 4))


def connected(neighbors: dict[str, frozenset[str]], left: set[str]) -> bool:
    reached, waiting = set(), [min(left)]
    while waiting:
        device = waiting.pop()
        if device not in reached:
            reached.add(device)
            waiting += neighbors[device] & left
    return reached == left


def test_another_context_or_device_gives_another_order() -> None:
    order = graph.harary_order(CONTEXT, NAMES)
    assert order == graph.harary_order(CONTEXT, reversed(NAMES))
    assert order != graph.harary_order(hashlib.sha256(b"other").digest(), NAMES)
    assert order != tuple(NAMES)


def test_places_in_the_order_do_not_depend_on_names() -> None:
    # Mean distance of consecutive names in the ring order, over contexts: a quarter of the ring if the order is random.
    count, total, rounds = 40, 0, 200
    for number in range(rounds):
        place = {device: at for at, device in enumerate(graph.harary_order(number.to_bytes(32, "big"), NAMES[:count]))}
        gaps = [abs(place[NAMES[i]] - place[NAMES[i + 1]]) for i in range(count - 1)]
        total += sum(min(gap, count - gap) for gap in gaps)
    assert 0.98 < total / (rounds * (count - 1)) / (count**2 / 4 / (count - 1)) < 1.02


@pytest.mark.parametrize("degree", [0, 3, 10, 12])
def test_a_degree_without_a_harary_graph_is_refused(degree: int) -> None:
    with refused(ConfigError, "spec.degree"):
        graph.harary_neighbors(tuple(NAMES[:10]), degree)


@pytest.mark.parametrize("devices", [3, 10, 128])
def test_up_to_128_devices_the_graph_is_complete(devices: int) -> None:
    degree, threshold = graph.graph_parameters(devices, 0.1, 0.1)
    assert degree == devices - 1
    corrupt, least = math.ceil(devices / 10), min(4, devices // 2)
    assert graph.left_over(devices, corrupt, degree, threshold, threshold) >= least
    assert graph.left_over(devices, corrupt, degree, threshold - 1, threshold) < least
    assert 2 * threshold > devices + corrupt


@pytest.mark.parametrize("bits", [40, 80])
@pytest.mark.parametrize(("devices", "corrupt", "dropout"), [(129, 0.1, 0.1), (500, 0.05, 0.2), (1000, 0.1, 0.1)])
def test_the_chosen_parameters_are_secure_and_the_next_smaller_are_not(
    devices: int, corrupt: float, dropout: float, bits: int
) -> None:
    bad = math.ceil(corrupt * devices)
    degree, threshold = graph.graph_parameters(devices, corrupt, dropout, bits=bits)
    assert degree < devices - 1
    assert graph.is_secure(devices, bad, degree, threshold, bits)
    assert not graph.is_secure(devices, bad, degree, threshold - 1, bits)
    assert (
        devices * graph.hypergeometric_tail(devices - 1, math.ceil(dropout * devices), degree, degree - threshold + 1)
        < 2**-20
    )


def test_more_security_and_more_corrupt_devices_need_more_neighbors() -> None:
    assert graph.graph_parameters(1000, 0.1, 0.1, bits=40) < graph.graph_parameters(1000, 0.1, 0.1, bits=80)
    assert graph.graph_parameters(1000, 0.05, 0.1) < graph.graph_parameters(1000, 0.1, 0.1)


@pytest.mark.parametrize(("corrupt", "dropout"), [(0.5, 0.3), (0.5, 0.5), (1.0, 0.1), (0.1, -0.1)])
def test_fractions_for_which_no_graph_is_secure_are_refused(corrupt: float, dropout: float) -> None:
    with pytest.raises(ConfigError):
        graph.graph_parameters(200, corrupt, dropout)


# What a device requires


def sparse(
    spec_of: Callable[..., Any], devices: int, degree: int, threshold: int, **changes: Any
) -> tuple[Any, Policy]:
    counts, corrupt = range(max(threshold, graph.quorum(devices, 0.1)), devices), math.ceil(devices / 10)
    least = next((m for m in counts if graph.left_over(devices, corrupt, degree, threshold, m) >= 4), devices)
    spec = spec_of(devices, degree=degree, threshold=threshold, **{"minimum_survivors": least, **changes})
    return spec, Policy(known_bases=frozenset({spec.base_digest}), adversaries=frozenset(Adversary))


def test_a_device_accepts_the_chosen_graph_and_no_sparser_one(spec_of: Callable[..., Any]) -> None:
    degree, threshold = graph.graph_parameters(200, 0.1, 0.1)
    spec, policy = sparse(spec_of, 200, degree, threshold)
    policy.check(spec, 200)
    for thinner in ((degree, threshold - 1), (20, 14), (degree + 1, threshold)):
        spec, policy = sparse(spec_of, 200, *thinner)
        with refused(ProtocolError, "offer.graph", peer="coordinator"):
            policy.check(spec, 200)


@given(devices=st.integers(1, 9), corrupt=st.integers(0, 8))
def test_two_quorums_have_an_honest_device_in_common_and_one_less_do_not(devices: int, corrupt: int) -> None:
    corrupt = min(corrupt, devices - 1)
    size = graph.quorum(devices, corrupt / devices)
    assert least_overlap(devices, size) > corrupt
    assert least_overlap(devices, size - 1) <= corrupt


def least_overlap(devices: int, size: int) -> int:
    """By comparing every group with the first one."""
    return min((len(set(range(size)) & set(other)) for other in combinations(range(devices), size)), default=devices)


def test_a_device_requires_a_quorum_of_the_cohort_on_a_sparse_graph(spec_of: Callable[..., Any]) -> None:
    degree, threshold = graph.graph_parameters(1000, 0.1, 0.1)
    spec, policy = sparse(spec_of, 1000, degree, threshold, minimum_survivors=551)
    policy.check(spec, 1000)
    assert (spec.quorum, graph.quorum(1000, 0.1)) == (551, 551)
    spec, policy = sparse(spec_of, 1000, degree, threshold, minimum_survivors=550)
    with refused(ProtocolError, "offer.quorum", peer="coordinator", value=550):
        policy.check(spec, 1000)
    complete = spec_of(10, minimum_survivors=9)
    assert complete.quorum == complete.threshold >= graph.quorum(10, 0.1)


def test_a_device_requires_so_many_survivors_on_a_sparse_graph_that_combinations_leave_enough(
    spec_of: Callable[..., Any],
) -> None:
    degree, threshold = graph.graph_parameters(200, 0.1, 0.1)
    spec, policy = sparse(spec_of, 200, degree, threshold)
    policy.check(spec, 200)
    least = spec.minimum_survivors
    assert least > graph.quorum(200, 0.1)
    spec, policy = sparse(spec_of, 200, degree, threshold, minimum_survivors=least - 1)
    with refused(ProtocolError, "offer.combined", peer="coordinator"):
        policy.check(spec, 200)


def test_a_device_requires_the_complete_graph_for_a_small_cohort(spec_of: Callable[..., Any]) -> None:
    spec, policy = sparse(spec_of, 128, 100, 70)
    with refused(ProtocolError, "offer.degree", peer="coordinator", value=100):
        policy.check(spec, 128)


def test_a_coordinator_that_may_search_for_a_roster_needs_more_neighbors(spec_of: Callable[..., Any]) -> None:
    thin = graph.graph_parameters(500, 0.1, 0.1, bits=graph.SIGMA)
    spec, policy = sparse(spec_of, 500, *thin, adversary=Adversary.HONEST_BUT_CURIOUS)
    policy.check(spec, 500)
    spec, policy = sparse(spec_of, 500, *thin)
    with refused(ProtocolError, "offer.graph", peer="coordinator"):
        policy.check(spec, 500)


def test_a_roster_without_most_honest_devices_is_refused(spec_of: Callable[..., Any]) -> None:
    spec, policy = sparse(spec_of, 1000, *graph.graph_parameters(1000, 0.1, 0.1))
    policy.check_roster(spec, 1000, 1000)
    with refused(ProtocolError, "roster.graph", peer="coordinator"):
        policy.check_roster(spec, 1000, 250)
    complete = spec_of(10)
    policy.check_roster(complete, 10, 9)


@pytest.mark.parametrize("corrupt", [200, 1000])
def test_no_graph_is_secure_if_every_device_may_be_corrupt(corrupt: int) -> None:
    assert graph.is_secure(200, corrupt, 100, 101, 40) is False
