"""With any dropouts at any step: the plain sum of the survivors or an aborted round, never another sum."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aggregation import envelope, graph, sealedstate
from aggregation.errors import ConfigError, ProtocolError
from aggregation.messages import Shares, Survivors, Unmask
from aggregation.policy import Policy
from aggregation.server import AbortReason, Established, RoundAborted
from aggregation.spec import CORRUPT_FRACTION, Adversary
from tests.support import FleetOf, refused

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


# Rounds on small sparse graphs: the device's own limit on complete graphs is lowered for that.
def sparse_fleet(
    fleet_of: FleetOf,
    spec_of: Callable[..., Any],
    count: int = 11,
    adversary: Adversary = Adversary.ACTIVE,
    **changes: Any,
) -> Any:
    """Devices with six neighbors each, none of which is assumed corrupt."""
    least = count // 2 + 1
    spec = spec_of(
        count, **{"degree": 6, "threshold": 5, "minimum_survivors": least, "adversary": adversary, **changes}
    )
    policy = Policy(
        known_bases=frozenset({spec.base_digest}),
        minimum_cohort=3,
        minimum_survivors=2,
        adversaries=frozenset(Adversary),
        corrupt_fraction=0,
        complete_up_to=3,
    )
    return fleet_of(count, spec=spec, policy=policy)


def holders(session: Established, device: str, among: set[str]) -> set[str]:
    """The devices of ``among`` that hold shares of ``device``, itself included."""
    return ({device} & among) | set(session.session.neighbors(device, sorted(among)))


@settings(max_examples=60, deadline=None, suppress_health_check=QUIET)
@given(data=st.data())
def test_a_round_on_a_sparse_graph_gives_the_plain_sum_of_its_survivors_or_aborts(
    fleet_of: FleetOf, spec_of: Callable[..., Any], data: st.DataObject
) -> None:
    adversary = data.draw(st.sampled_from(Adversary), "adversary")
    fleet = sparse_fleet(fleet_of, spec_of, data.draw(st.integers(8, 12), "devices"), adversary)
    names = sorted(fleet.devices)
    session = fleet.establish()
    for _ in range(2):
        dropouts = {step: data.draw(st.sets(st.sampled_from(names), max_size=2), step) for step in STEPS}
        outcome = fleet.round(session, dropouts)
        check_sparse(fleet, session, outcome, dropouts)
        session = outcome.session if isinstance(outcome, RoundAborted) else outcome[0]


def check_sparse(fleet: Any, session: Established, outcome: Any, dropouts: dict[str, set[str]]) -> None:
    """The oracle: there is a sum if a quorum signs and every secret has ``threshold`` holders that answer."""
    everyone, t, least = set(fleet.devices), fleet.spec.threshold, fleet.spec.minimum_survivors
    survivors = everyone - dropouts["input"]
    asked = survivors - dropouts["survivors"] if fleet.spec.adversary is Adversary.ACTIVE else survivors
    answered = asked - dropouts["unmask"]
    if len(asked) < least or any(len(holders(session, device, answered)) < t for device in everyone):
        assert isinstance(outcome, RoundAborted)
        assert outcome.reason is AbortReason.TOO_FEW
        assert outcome.blamed == ()
        return
    assert not isinstance(outcome, RoundAborted), outcome
    assert outcome[1].survivors == tuple(sorted(survivors))
    fleet.assert_sum(outcome[1])


@pytest.mark.parametrize("adversary", Adversary)
def test_few_dropouts_in_a_sparse_round_leave_its_sum(
    fleet_of: FleetOf, spec_of: Callable[..., Any], adversary: Adversary
) -> None:
    fleet = sparse_fleet(fleet_of, spec_of, 12, adversary)
    session = fleet.establish()
    session, result = fleet.round(session, {"input": ["device-003"], "unmask": ["device-009"]})
    assert result.dropped == ("device-003",)
    fleet.assert_sum(result)
    fleet.assert_sum(fleet.round(session)[1])


def test_a_device_deals_shares_to_its_neighbors_only(fleet_of: FleetOf, spec_of: Callable[..., Any]) -> None:
    fleet = sparse_fleet(fleet_of, spec_of)
    session = fleet.establish()
    for dealer, encrypted_shares in session.encrypted_shares.items():
        assert len(encrypted_shares) == 6
        assert set(encrypted_shares) == set(session.session.neighbors(dealer, session.devices))


def test_shares_for_devices_that_are_not_neighbors_are_refused(fleet_of: FleetOf, spec_of: Callable[..., Any]) -> None:
    fleet = sparse_fleet(fleet_of, spec_of)
    state, offer = fleet.offer()
    for name in sorted(fleet.devices):
        state = state.on_advert(name, fleet.join(name, offer))
    sharing, roster = state.close()
    device = fleet.devices["device-000"]
    message = envelope.open_verified(Shares, fleet.share("device-000", roster), device.identity.public, "device-000")
    stranger = next(name for name in sorted(fleet.devices)[1:] if name not in message.encrypted_shares)
    encrypted = next(iter(message.encrypted_shares.values()))
    more = dataclasses.replace(message, encrypted_shares={**message.encrypted_shares, stranger: encrypted})
    with refused(ProtocolError, "shares.holders", peer="device-000"):
        sharing.on_shares("device-000", envelope.sign(device.identity, more))


def test_a_sparse_session_survives_a_restart(fleet_of: FleetOf, spec_of: Callable[..., Any]) -> None:
    fleet = sparse_fleet(fleet_of, spec_of)
    session = fleet.establish()
    key = bytes(32)
    fleet.states = {name: sealedstate.unseal(sealedstate.seal(state, key), key) for name, state in fleet.states.items()}
    fleet.assert_sum(fleet.round(session)[1])


def test_a_cohort_shrunk_to_the_degree_has_the_complete_graph(fleet_of: FleetOf, spec_of: Callable[..., Any]) -> None:
    fleet = sparse_fleet(fleet_of, spec_of, 9)
    session = fleet.establish({"advert": ["device-000", "device-001"]})
    assert {len(encrypted_shares) for encrypted_shares in session.encrypted_shares.values()} == {6}
    fleet.assert_sum(fleet.round(session)[1])


@pytest.mark.parametrize("degree", [5, 7, 11])
def test_a_degree_without_a_graph_is_not_offered(
    fleet_of: FleetOf, spec_of: Callable[..., Any], vector_of: Callable[..., Any], degree: int
) -> None:
    fleet = sparse_fleet(fleet_of, spec_of, 11, degree=degree, vector=vector_of(20))
    with refused(ConfigError, "spec.degree"):
        fleet.offer()


# What a device refuses where the graph is sparse


@pytest.fixture
def fleet(fleet_of: FleetOf, spec_of: Callable[..., Any]) -> Any:
    return sparse_fleet(fleet_of, spec_of, 12)


def test_every_device_is_shown_the_same_quorum(fleet: Any) -> None:
    _, bodies = fleet.confirm(*fleet.collect(fleet.establish()))
    (body,) = set(bodies.values())
    assert len(envelope.open_verified(Unmask, body, fleet.key.public, "coordinator").consistency_signatures) == 7


def test_as_many_signatures_as_reconstruct_a_secret_are_too_few(fleet: Any) -> None:
    session = fleet.establish()
    _, bodies = fleet.confirm(*fleet.collect(session))
    me = "device-000"
    shown = envelope.open_verified(Unmask, bodies[me], fleet.key.public, "coordinator")
    near_me = {
        device: shown.consistency_signatures[device]
        for device in holders(session, me, set(shown.consistency_signatures))
    }
    lie = envelope.sign(fleet.key, dataclasses.replace(shown, consistency_signatures=near_me))
    with refused(ProtocolError, "unmask.quorum", peer="coordinator", value=4):
        fleet.states[me].on_unmask(fleet.devices[me], lie)
    fleet.answer("on_unmask", me, bodies[me])


def test_a_round_without_a_quorum_is_aborted(fleet: Any) -> None:
    aborted = fleet.round(fleet.establish(), {"survivors": sorted(fleet.devices)[:6]})
    assert isinstance(aborted, RoundAborted)
    assert aborted.detail.endswith("6 consistency signatures, 7 are needed")
    fleet.assert_sum(fleet.round(aborted.session)[1])


def test_a_minimum_that_two_groups_can_reach_is_refused(fleet_of: FleetOf, spec_of: Callable[..., Any]) -> None:
    with refused(ProtocolError, "offer.quorum", peer="coordinator", value=6):
        sparse_fleet(fleet_of, spec_of, 12, minimum_survivors=6).establish()
    curious = Adversary.HONEST_BUT_CURIOUS  # has no step 7, which a device must allow
    sparse_fleet(fleet_of, spec_of, 12, curious, minimum_survivors=6).establish()


def test_a_plan_or_survivor_set_that_leaves_a_device_too_few_neighbors_is_refused(fleet: Any) -> None:
    session = fleet.establish()
    me = "device-000"
    gone = session.session.neighbors(me, session.devices)[:3]
    _, plans = fleet.begin(session, set(fleet.devices) - set(gone))
    with refused(ProtocolError, "plan.neighbors", peer="coordinator", value=4):
        fleet.states[me].on_plan(fleet.devices[me], plans[me])
    _, bodies = fleet.collect(session)
    survivors = envelope.open_verified(Survivors, bodies[me], fleet.key.public, "coordinator")
    fewer = {name: digest for name, digest in survivors.vectors.items() if name not in gone}
    lie = envelope.sign(fleet.key, dataclasses.replace(survivors, vectors=fewer))
    with refused(ProtocolError, "survivors.neighbors", peer="coordinator", value=4):
        fleet.states[me].on_survivors(fleet.devices[me], lie)


def test_shares_of_too_few_neighbors_are_refused(fleet_of: FleetOf, spec_of: Callable[..., Any]) -> None:
    fleet = sparse_fleet(fleet_of, spec_of, 12)
    session = fleet.establish()
    silent = session.session.neighbors("device-000", session.devices)[:3]
    fewer = dataclasses.replace(
        session,
        encrypted_shares={
            d: encrypted_shares for d, encrypted_shares in session.encrypted_shares.items() if d not in silent
        },
    )
    _, plans = fleet.begin(fewer)
    with refused(ProtocolError, "assignment.neighbors", peer="coordinator", value=4):
        fleet.states["device-000"].on_plan(fleet.devices["device-000"], plans["device-000"])
