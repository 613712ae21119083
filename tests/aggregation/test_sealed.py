"""Sealed state: a restarted device continues where it stopped, and never answers a step twice."""

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aggregation import ring
from aggregation.client import Ready
from aggregation.errors import ConfigError, ProtocolError, TrustError
from aggregation.sealedstate import reopened, seal, unseal
from tests.support import FleetOf, refused

KEY = bytes(range(32))
ME = "device-000"


@pytest.fixture
def fleet(fleet_of: FleetOf) -> Any:
    return fleet_of(4)


def restart(fleet: Any) -> None:
    """Every device stops and starts again from its sealed state."""
    for name, state in fleet.states.items():
        fleet.states[name] = unseal(seal(state, KEY), KEY)
        assert fleet.states[name] == state == reopened(state)


def test_a_session_goes_on_when_every_device_restarts_after_every_step(fleet: Any) -> None:
    state, offer = fleet.offer()
    for name in fleet.devices:
        state = state.on_advert(name, fleet.join(name, offer))
    restart(fleet)
    state, roster = state.close()
    for name in fleet.devices:
        state = state.on_shares(name, fleet.share(name, roster))
    session = state.close()
    for dropouts in ({}, {"input": [ME]}):
        restart(fleet)
        state, bodies = fleet.collect(session, dropouts)
        restart(fleet)
        state, bodies = fleet.confirm(state, bodies)
        restart(fleet)
        session, result = fleet.open(state, bodies)
        fleet.assert_sum(result)


def test_a_state_in_memory_is_found_as_one_from_disk_is(fleet: Any) -> None:
    """After each step, and unused: a step that was refused, or whose answer was not stored, can be repeated."""
    session = fleet.establish()
    _, plans = fleet.begin(session)
    device, ready = fleet.devices[ME], fleet.states[ME]
    begun = ready.on_plan(device, plans[ME])
    assert reopened(begun) == unseal(seal(begun, KEY), KEY) == begun.ready
    with refused(ProtocolError, "single-use"):
        ready.on_plan(device, plans[ME])
    assert reopened(ready).on_plan(device, plans[ME]) == begun
    vector = ready.session.spec.vector
    masked, _ = begun.contribute(device, ring.zeros(vector.size, vector.ring_bits))
    again = reopened(masked)
    assert again == masked == unseal(seal(masked, KEY), KEY)
    assert again.ready.single_use is not masked.ready.single_use


def test_a_device_that_restarts_between_plan_and_answer_abandons_the_round(fleet: Any) -> None:
    _, plans = fleet.begin(fleet.establish())
    begun = fleet.states[ME].on_plan(fleet.devices[ME], plans[ME])
    restored = unseal(seal(begun, KEY), KEY)
    assert isinstance(restored, Ready)
    assert set(restored.secrets) == set(restored.held) == {2, 3}
    with refused(ProtocolError, "plan.round", peer="coordinator", value=1):
        restored.on_plan(fleet.devices[ME], plans[ME])


def test_a_device_that_sealed_before_it_answered_does_not_answer_again(fleet: Any) -> None:
    session = fleet.establish()
    _, plans = fleet.begin(session)
    fleet.contribute(ME, plans[ME])
    masked = unseal(seal(fleet.states[ME], KEY), KEY)
    assert not hasattr(masked, "contribute")
    with refused(ProtocolError, "plan.round", peer="coordinator", value=1):
        masked.on_plan(fleet.devices[ME], plans[ME])  # type: ignore[union-attr]


def test_no_secret_is_readable_in_a_sealed_state(fleet: Any) -> None:
    fleet.establish()
    ready = fleet.states[ME]
    blob = seal(ready, KEY)
    for secret in ready.secrets.values():
        assert secret.seed not in blob
        assert secret.mask_key not in blob
    assert ready.session.context not in blob


def test_the_same_state_is_sealed_differently_every_time(fleet: Any) -> None:
    fleet.establish()
    assert seal(fleet.states[ME], KEY) != seal(fleet.states[ME], KEY)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_an_altered_state_is_refused(fleet: Any, place: float, bit: int) -> None:
    fleet.offer()
    _, offer = fleet.offer()
    fleet.join(ME, offer)
    blob = bytearray(seal(fleet.states[ME], KEY))
    blob[int(place * len(blob))] ^= 1 << bit
    with pytest.raises(TrustError):
        unseal(bytes(blob), KEY)


@pytest.mark.parametrize("blob", [b"", b"junk", b"edgeadapt/state/1\x00", b"edgeadapt/state/1\x00" + bytes(40)])
def test_bytes_that_are_not_a_sealed_state_are_refused(blob: bytes) -> None:
    with pytest.raises(TrustError):
        unseal(blob, KEY)


def test_another_devices_key_does_not_decrypt_the_state(fleet: Any) -> None:
    fleet.establish()
    with refused(TrustError, "sealed.ciphertext"):
        unseal(seal(fleet.states[ME], KEY), bytes(32))


def test_a_sealing_key_of_another_length_is_refused(fleet: Any) -> None:
    fleet.establish()
    with refused(ConfigError, "sealed.key", value=16):
        seal(fleet.states[ME], bytes(16))
