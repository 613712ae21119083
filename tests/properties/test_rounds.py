"""With any dropouts at any step: the plain sum of the survivors or an aborted round, never another sum."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aggregation import graph
from aggregation.server import AbortReason, Established, RoundAborted
from aggregation.spec import CORRUPT_FRACTION, Adversary
from tests.support import FleetOf

QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
STEPS = ("input", "survivors", "unmask")


def some(names: list[str]) -> st.SearchStrategy[set[str]]:
    return st.sets(st.sampled_from(names), max_size=max(1, len(names) // 2))


@settings(max_examples=60, deadline=None, suppress_health_check=QUIET)
@given(data=st.data())
def test_a_round_gives_the_plain_sum_of_its_survivors_or_aborts(
    fleet_of: FleetOf, spec_of: Callable[..., Any], data: st.DataObject
) -> None:
    count = data.draw(st.integers(3, 8), "devices")
    adversary = data.draw(st.sampled_from(Adversary), "adversary")
    least = data.draw(st.integers(graph.least_threshold(count, CORRUPT_FRACTION), count), "minimum of survivors")
    fleet = fleet_of(count, spec=spec_of(count, adversary=adversary, minimum_survivors=least))
    names = sorted(fleet.devices)
    dropouts = {step: data.draw(some(names), step) for step in ("advert", "shares")}
    session = fleet.establish(dropouts)
    left = set(names) - dropouts["advert"] - dropouts["shares"]
    assert isinstance(session, Established) == (len(left) >= least)
    for _ in range(2 if isinstance(session, Established) else 0):
        dropouts = {step: data.draw(some(names), step) for step in STEPS}
        outcome = fleet.round(session, dropouts)
        session = outcome.session if isinstance(outcome, RoundAborted) else outcome[0]
        check(fleet, outcome, left, dropouts, least, adversary)


def check(
    fleet: Any, outcome: Any, cohort: set[str], dropouts: dict[str, set[str]], least: int, model: Adversary
) -> None:
    """The oracle: the devices left after each step decide between sum and abort."""
    survivors = cohort - dropouts["input"]
    agreed = survivors - dropouts["survivors"] if model is Adversary.ACTIVE else survivors
    threshold = fleet.spec.threshold
    ends = len(survivors) >= least and len(agreed) >= threshold and len(agreed - dropouts["unmask"]) >= threshold
    if not ends:
        assert isinstance(outcome, RoundAborted)
        assert outcome.reason is AbortReason.TOO_FEW
        return
    assert not isinstance(outcome, RoundAborted), outcome
    _, result = outcome
    assert result.survivors == tuple(sorted(survivors))
    assert result.dropped == tuple(sorted(cohort - survivors))
    assert result.blamed == ()
    fleet.assert_sum(result)


@pytest.mark.parametrize("adversary", Adversary)
def test_the_round_after_an_aborted_one_gives_its_sum(
    fleet_of: FleetOf, spec_of: Callable[..., Any], adversary: Adversary
) -> None:
    fleet = fleet_of(5, spec=spec_of(5, adversary=adversary))
    session = fleet.establish()
    aborted = fleet.round(session, {"unmask": sorted(fleet.devices)[:2]})
    assert isinstance(aborted, RoundAborted)
    after, result = fleet.round(aborted.session)
    assert result.round == 2
    assert after.rounds_left == 1
    fleet.assert_sum(result)


def test_a_session_gives_as_many_rounds_as_it_offers_and_no_more(fleet_of: FleetOf) -> None:
    fleet = fleet_of(4)
    session = fleet.establish()
    for number in range(1, 4):
        session, result = fleet.round(session)
        assert result.round == number
        fleet.assert_sum(result)
    over = fleet.begin(session)
    assert isinstance(over, RoundAborted)
    assert over.reason is AbortReason.SESSION_OVER


def test_a_round_may_be_planned_for_a_part_of_the_session(fleet_of: FleetOf) -> None:
    fleet = fleet_of(7)
    session = fleet.establish()
    part = sorted(fleet.devices)[:6]
    session, result = fleet.round(session, {"input": part[:1]}, cohort=part)
    assert result.survivors == tuple(part[1:])
    assert result.dropped == (part[0],)
    fleet.assert_sum(result)
    _, result = fleet.round(session)  # the device that did not take part is back, and receives its shares now
    assert len(result.survivors) == 7
    fleet.assert_sum(result)


@pytest.mark.parametrize("bits", [16, 17, 24, 31, 32, 33, 40, 64])
def test_the_sum_is_right_in_rings_of_any_width(
    fleet_of: FleetOf, spec_of: Callable[..., Any], vector_of: Callable[..., Any], bits: int
) -> None:
    fleet = fleet_of(4, spec=spec_of(4, vector=vector_of(4, size=1001, bits=bits)))
    _, result = fleet.round(fleet.establish(), {"input": sorted(fleet.devices)[:1]})
    fleet.assert_sum(result)
