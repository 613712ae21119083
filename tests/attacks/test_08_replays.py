"""Replays of a masked input, shares or unmask responses of another round or session."""

from typing import Any

import pytest

from aggregation import checks
from aggregation.errors import ProtocolError
from aggregation.messages import Plan
from tests.support import FleetOf, refused

ME = "device-000"


@pytest.fixture
def fleet(fleet_of: FleetOf) -> Any:
    return fleet_of(5)


def two_rounds(fleet: Any) -> tuple[bytes, Any]:
    """An upload of round 1, and the coordinator's state in round 2."""
    session = fleet.establish()
    state, plans = fleet.begin(session)
    old = {name: fleet.contribute(name, plans[name]) for name in plans}
    second, _ = fleet.begin(state.established)
    return old[ME], second


def test_a_masked_input_of_another_round_is_refused(fleet: Any) -> None:
    old, second = two_rounds(fleet)
    with refused(ProtocolError, "masked-input.plan", peer="device-000"):
        second.on_masked_input(ME, old)


def test_without_the_plan_a_replayed_input_is_added(fleet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Plan, "digest", lambda plan: bytes(32))
    old, second = two_rounds(fleet)
    assert second.on_masked_input(ME, old).totals[0].any()


def sharing(fleet: Any) -> tuple[Any, bytes]:
    state, offer = fleet.offer()
    for name in sorted(fleet.devices):
        state = state.on_advert(name, fleet.join(name, offer))
    return state.close()  # type: ignore[no-any-return]


def test_shares_of_another_session_are_refused(fleet: Any) -> None:
    _, roster = sharing(fleet)
    old = fleet.share(ME, roster)
    state, _ = sharing(fleet)
    with refused(ProtocolError, "shares.context", peer="device-000"):
        state.on_shares(ME, old)


def test_without_the_context_replayed_shares_are_accepted(fleet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "context_of", lambda offer, roster: bytes(32))
    _, roster = sharing(fleet)
    old = fleet.share(ME, roster)
    state, _ = sharing(fleet)
    assert ME in state.on_shares(ME, old).encrypted_shares


def test_a_plan_of_another_session_is_refused(fleet: Any) -> None:
    _, plans = fleet.begin(fleet.establish())
    fleet.establish()
    with refused(ProtocolError, "plan.context", peer="coordinator"):
        fleet.states[ME].on_plan(fleet.devices[ME], plans[ME])


@pytest.mark.parametrize("step", ["survivors", "unmask"])
def test_requests_of_another_round_are_refused(fleet: Any, step: str) -> None:
    state, bodies = fleet.collect(fleet.establish())
    if step == "unmask":
        state, bodies = fleet.confirm(state, bodies)
        outcome = fleet.open(state, bodies)[0]
    else:
        outcome = state.close().session
    later, _ = fleet.collect(outcome)
    if step == "unmask":
        fleet.confirm(later, _)
    method = "on_survivors" if step == "survivors" else "on_unmask"
    with refused(ProtocolError, "survivors.plan" if step == "survivors" else "unmask.survivors"):
        fleet.answer(method, ME, bodies[ME])


@pytest.mark.parametrize("step", ["survivors", "unmask"])
def test_answers_of_another_round_are_refused(fleet: Any, step: str) -> None:
    session = fleet.establish()
    kept = {}
    for number in range(2):
        state, bodies = fleet.collect(session)
        answers = {name: fleet.answer("on_survivors", name, bodies[name]) for name in bodies}
        if number and step == "survivors":
            with refused(ProtocolError, "consistency-signature.survivors", peer="device-000"):
                state.on_consistency_signature(ME, kept["survivors"])
        for name, answer in answers.items():
            state = state.on_consistency_signature(name, answer)
        state, bodies = state.close()
        responses = {name: fleet.answer("on_unmask", name, bodies[name]) for name in bodies}
        if number and step == "unmask":
            with refused(ProtocolError, "unmask-response.survivors", peer="device-000"):
                state.on_unmask_response(ME, kept["unmask"])
        for name, response in responses.items():
            state = state.on_unmask_response(name, response)
        kept = {"survivors": answers[ME], "unmask": responses[ME]}
        session, result = state.close()
        fleet.assert_sum(result)


def test_a_device_in_two_sessions_at_once_keeps_them_apart(fleet: Any) -> None:
    """The coordinator swaps their messages: each is refused in the other session, and both give their sums."""
    device = fleet.devices[ME]
    sessions, states = [], []
    for _ in range(2):
        sessions.append(fleet.establish())
        states.append(fleet.states)
        fleet.states = dict(fleet.states)
    first, second = ({**given} for given in states)
    begun = [fleet.begin(session) for session in sessions]
    for mine, other in ((first, begun[1]), (second, begun[0])):
        with refused(ProtocolError, "plan.context", peer="coordinator"):
            mine[ME].on_plan(device, other[1][ME])
    results = []
    for number, mine in enumerate((first, second)):
        fleet.states = mine
        state, bodies = fleet.collect(sessions[number])
        if results:
            with refused(ProtocolError, "survivors.plan", peer="coordinator"):
                mine[ME].on_survivors(device, results[0][1])
        closed = fleet.confirm(state, bodies)
        _, result = fleet.open(*closed)
        fleet.assert_sum(result)
        results.append((result, bodies[ME]))
    assert results[0][0].digest != results[1][0].digest
