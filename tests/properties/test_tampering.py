"""Every message arrives first damaged and then as sent: the damaged one is refused and changes nothing."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aggregation.messages import MESSAGES
from aggregation.spec import Adversary
from tests.support import FleetOf

Damage = Callable[[bytes], list[bytes]]
QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
LARGEST = max(message.LIMIT for message in MESSAGES)


def flipped(place: float, bit: int) -> Damage:
    def damage(body: bytes) -> list[bytes]:
        out = bytearray(body)
        out[int(place * len(body))] ^= 1 << bit
        return [bytes(out)]

    return damage


DAMAGE: dict[str, Damage] = {
    "empty": lambda body: [b""],
    "truncated": lambda body: [body[:-1], body[: len(body) // 2], body[:4], body[1:]],
    "left over": lambda body: [body + b"\x00", body + body, b"\x00" + body],
    "zeros": lambda body: [bytes(len(body))],
}


@pytest.mark.parametrize("adversary", Adversary)
@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_message_at_any_step_is_refused_and_changes_nothing(
    fleet_of: FleetOf, spec_of: Callable[..., Any], adversary: Adversary, how: str
) -> None:
    fleet = fleet_of(4, spec=spec_of(4, adversary=adversary))
    fleet.damage = DAMAGE[how]
    _, result = fleet.round(fleet.establish(), {"input": sorted(fleet.devices)[:1]})
    fleet.assert_sum(result)


@settings(max_examples=40, deadline=None, suppress_health_check=QUIET)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), adversary=st.sampled_from(Adversary))
def test_a_flipped_bit_at_any_step_is_refused_and_changes_nothing(
    fleet_of: FleetOf, spec_of: Callable[..., Any], place: float, bit: int, adversary: Adversary
) -> None:
    fleet = fleet_of(3, spec=spec_of(3, adversary=adversary))
    fleet.damage = flipped(place, bit)
    _, result = fleet.round(fleet.establish())
    fleet.assert_sum(result)


def test_an_oversized_message_at_any_step_is_refused_before_it_is_read(fleet_of: FleetOf) -> None:
    # One oversized body: 256 MB that are never touched cost neither memory nor time.
    huge = bytes(LARGEST + 1024)
    fleet = fleet_of(3)
    fleet.damage = lambda body: [huge]
    _, result = fleet.round(fleet.establish())
    fleet.assert_sum(result)


@settings(max_examples=15, deadline=None, suppress_health_check=QUIET)
@given(junk=st.lists(st.binary(max_size=300), min_size=1, max_size=8))
def test_any_bytes_at_any_step_are_refused_and_change_nothing(fleet_of: FleetOf, junk: list[bytes]) -> None:
    fleet = fleet_of(3)
    fleet.damage = lambda body: junk
    _, result = fleet.round(fleet.establish())
    fleet.assert_sum(result)


def test_every_genuine_message_at_every_other_step_is_refused(fleet_of: FleetOf) -> None:
    recorded: list[bytes] = []
    first = fleet_of(3)
    first.damage = lambda body: recorded.append(body) or []  # type: ignore[func-returns-value]
    first.round(first.establish())
    second = fleet_of(3, seed=2)
    second.key, second.authority, second.devices = first.key, first.authority, first.devices
    second.damage = lambda body: [other for other in recorded if other != body]
    # An old offer is accepted (a device may join again); every other message of the old session must be refused.
    recorded[:] = [body for body in recorded if b"offer" not in body[:16]]
    _, result = second.round(second.establish())
    second.assert_sum(result)
