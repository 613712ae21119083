"""Shows that the tests of damaged messages (tests/properties/test_tampering.py) can fail."""

import pytest

from aggregation import envelope, wire
from aggregation.errors import ProtocolError
from aggregation.messages import Assignment
from tests.support import FleetOf, refused

ME = "device-000"


def flipped_training(plan: bytes) -> bytes:
    """The plan with one bit of the trainer's settings flipped: every field is still well formed."""
    return plan.replace(b"settings", b"settingr", 1)


def test_a_flipped_bit_in_the_settings_is_refused_and_without_signatures_accepted(
    fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = fleet_of(4)
    _, plans = fleet.begin(fleet.establish())
    state, device = fleet.states[ME], fleet.devices[ME]
    with refused(ProtocolError, "signature", peer="coordinator", value="assignment"):
        state.on_plan(device, flipped_training(plans[ME]))
    monkeypatch.setattr(envelope, "verify", lambda *given: None)
    assert state.on_plan(device, flipped_training(plans[ME])).plan.training == b"settingr"


def test_trailing_bytes_are_refused_and_without_the_check_accepted(
    fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = fleet_of(4)
    _, plans = fleet.begin(fleet.establish())
    state, device = fleet.states[ME], fleet.devices[ME]
    with refused(ProtocolError, "encoding.trailing", peer="coordinator", value=1):
        state.on_plan(device, plans[ME] + b"\x00")
    monkeypatch.setattr(wire.Codec, "decode", lambda codec, raw: codec.read(wire.Reader(raw)))
    state.on_plan(device, plans[ME] + b"\x00")


def test_an_oversized_message_is_refused_before_its_signature_is_verified(
    fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []
    monkeypatch.setattr(envelope, "verify", lambda *given: looked.append("signature"))
    fleet = fleet_of(4)
    with refused(ProtocolError, "envelope.size", peer="coordinator", value=67109888):
        envelope.open_verified(Assignment, bytes(Assignment.LIMIT + 1024), fleet.key.public, "coordinator")
    assert not looked
