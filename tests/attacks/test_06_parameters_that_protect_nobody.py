"""Offers whose parameters make the masks useless: a tiny ring, a low threshold, a cohort of two, a weaker adversary."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from aggregation import client, envelope
from aggregation.errors import ProtocolError
from aggregation.messages import Offer
from aggregation.policy import Policy
from aggregation.spec import Adversary, SessionSpec
from aggregation.vector import Segment, VectorSpec
from tests.client.node.conftest import refusals
from tests.support import FleetOf, refused

__all__ = ["refusals"]
VICTIM = "device-002"
EVIL: dict[str, tuple[dict[str, Any], str]] = {  # name → changes of the spec, and what the refusal is about
    "a ring of five bits": ({"vector": VectorSpec((Segment("delta", 8, 1.0),), 5, 10)}, "offer.ring_bits"),
    "a ring wider than the device allows": (
        {"vector": VectorSpec((Segment("delta", 8, 1.0),), 64, 10)},
        "offer.ring_bits",
    ),
    "a threshold that two groups can reach": ({"threshold": 5, "minimum_survivors": 5}, "offer.threshold"),
    "a threshold with which sums can be combined": ({"threshold": 6, "minimum_survivors": 6}, "offer.combined"),
    "no consistency check": ({"adversary": Adversary.HONEST_BUT_CURIOUS}, "offer.adversary"),
    "a base that is not on the device": ({"base_digest": "e" * 64}, "offer.base_digest"),
    "a weight that singles out one device": ({"weight_cap": 2**31}, "offer.weight_cap"),
    "a session that never ends": ({"rounds": 1024}, "offer.rounds"),
}


@pytest.fixture
def fleet(fleet_of: FleetOf, spec_of: Callable[..., Any]) -> Any:
    policy = Policy(known_bases=frozenset({spec_of(10).base_digest}), maximum_ring_bits=40)
    return fleet_of(10, policy=policy)


def offered(fleet: Any, spec: SessionSpec) -> bytes:
    message = envelope.open_verified(Offer, fleet.offer()[1], fleet.key.public, "coordinator")
    return envelope.sign(fleet.key, dataclasses.replace(message, spec=spec))


@pytest.mark.parametrize(("changes", "about"), EVIL.values(), ids=EVIL)
def test_the_offer_is_refused_and_without_the_policy_joined(
    fleet: Any, spec_of: Callable[..., Any], changes: dict[str, Any], about: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer = offered(fleet, spec_of(10, **changes))
    with refused(ProtocolError, about, peer="coordinator"):
        client.join(fleet.devices[VICTIM], offer, fleet.entropy)
    monkeypatch.setattr(Policy, "check", lambda *given: None)
    client.join(fleet.devices[VICTIM], offer, fleet.entropy)


@pytest.mark.parametrize("changes", [{"threshold": 1}, {"minimum_survivors": 1}, {"rounds": 0}])
def test_an_offer_that_contradicts_itself_does_not_even_decode(
    fleet: Any, spec_of: Callable[..., Any], changes: dict[str, Any]
) -> None:
    spec = spec_of(10)
    for name, value in changes.items():
        object.__setattr__(spec, name, value)  # bypasses the constructor, as an attacker's own encoder would
    with refused(ProtocolError, f"spec.{next(iter(changes))}", peer="coordinator"):
        client.join(fleet.devices[VICTIM], offered(fleet, spec), fleet.entropy)


def test_a_cohort_of_the_victim_and_one_other_is_refused(fleet: Any) -> None:
    message = envelope.open_verified(Offer, fleet.offer()[1], fleet.key.public, "coordinator")
    pair = envelope.sign(fleet.key, dataclasses.replace(message, certificates=message.certificates[1:3]))
    with refused(ProtocolError, "offer.cohort", peer="coordinator", value=2):
        client.join(fleet.devices[VICTIM], pair, fleet.entropy)


def with_minimum(fleet: Any, least: int) -> Any:
    """The victim's owner wants so many honest devices in every sum."""
    victim = fleet.devices[VICTIM]
    policy = dataclasses.replace(victim.policy, minimum_cohort=10, minimum_survivors=least)
    return dataclasses.replace(victim, policy=policy)


def test_a_sum_in_which_too_few_honest_devices_may_be_left_is_refused_and_without_the_policy_joined(
    fleet: Any, spec_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cohort is large enough, but two of it may drop out, and one of the rest may be corrupt."""
    victim = with_minimum(fleet, 8)
    client.join(victim, offered(fleet, spec_of(10, threshold=8, minimum_survivors=9)), fleet.entropy)
    offer = offered(fleet, spec_of(10, threshold=8, minimum_survivors=8))
    with refused(ProtocolError, "offer.minimum_survivors", peer="coordinator", value=8):
        client.join(victim, offer, fleet.entropy)
    monkeypatch.setattr(Policy, "check", lambda *given: None)
    client.join(victim, offer, fleet.entropy)


@pytest.mark.parametrize(("share", "takes_part"), [(0.5, False), (0.9, True)])
def test_in_a_federation_the_device_waits_for_a_larger_share_of_survivors(
    app_fleet_of: FleetOf, refusals: list[str], share: float, takes_part: bool
) -> None:
    fleet = app_fleet_of(8, rounds=1, aggregation__minimum_survivors=share)
    with (fleet.state_dir("device-02").folder / "device.toml").open("r+") as file:
        text = file.read().replace("minimum_survivors = 3", "minimum_survivors = 6")
        text = text.replace("minimum_cohort = 6", "minimum_cohort = 8")
        file.seek(0)
        file.write(text)
    (record,) = fleet.federate(fleet.grid())
    assert ("device-02" in record.survivors) is takes_part
    assert refusals == ([] if takes_part else ["offer.minimum_survivors"])
