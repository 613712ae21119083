"""The device's states: they answer once, drop secrets with their round, and refuse what tests/vectors does not try."""

import dataclasses
import datetime as dt
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from aggregation import client, envelope
from aggregation.client import Advertised, Confirmed, Masked, Planned, Ready
from aggregation.errors import DataError, ProtocolError
from aggregation.messages import Assignment, EncryptedShares, Offer, Roster, Survivors, Unmask
from aggregation.spec import Adversary
from tests.support import FleetOf, refused

ME = "device-000"


@pytest.fixture
def fleet(fleet_of: FleetOf) -> Any:
    return fleet_of(5)


def resigned(fleet: Any, raw: bytes, kind: Any, **changes: Any) -> bytes:
    """A message of the coordinator, changed and signed again, as a malicious coordinator sends it."""
    message = envelope.open_verified(kind, raw, fleet.key.public, "coordinator")
    return envelope.sign(fleet.key, dataclasses.replace(message, **changes))


def replanned(fleet: Any, raw: bytes, **changes: Any) -> bytes:
    plan = envelope.open_verified(Assignment, raw, fleet.key.public, "coordinator").plan
    return resigned(fleet, raw, Assignment, plan=dataclasses.replace(plan, **changes))


def planned(fleet: Any) -> tuple[Any, dict[str, bytes]]:
    state, plans = fleet.begin(fleet.establish())
    return state, plans


# Step 1, the offer


def test_an_offer_without_this_device_is_refused(fleet: Any) -> None:
    _, offer = fleet.offer()
    others = tuple(device.certificate for name, device in fleet.devices.items() if name != ME)
    with refused(ProtocolError, "offer.self", peer="coordinator"):
        client.join(fleet.devices[ME], resigned(fleet, offer, Offer, certificates=others), fleet.entropy)


def test_an_offer_that_names_a_device_twice_is_refused(fleet: Any) -> None:
    _, offer = fleet.offer()
    twice = tuple(sorted(fleet.certificates.items()))
    certificates = tuple(der for _, der in (*twice, twice[-1]))
    with refused(ProtocolError, "offer.order"):
        client.join(fleet.devices[ME], resigned(fleet, offer, Offer, certificates=certificates), fleet.entropy)


def test_two_devices_with_one_key_are_refused(fleet: Any) -> None:
    _, offer = fleet.offer()
    last = fleet.devices["device-004"]
    begin, end = dt.datetime(2026, 1, 1, tzinfo=dt.UTC), dt.datetime(2027, 1, 1, tzinfo=dt.UTC)
    twin = fleet.authority.issue("device-005", last.identity.public, not_before=begin, not_after=end)
    certificates = (*(der for _, der in sorted(fleet.certificates.items())), twin)
    with refused(ProtocolError, "offer.keys"):
        client.join(fleet.devices[ME], resigned(fleet, offer, Offer, certificates=certificates), fleet.entropy)


def test_a_device_with_a_clock_refuses_expired_certificates(fleet: Any) -> None:
    _, offer = fleet.offer()
    with refused(ProtocolError, "certificate.validity", value="device-000"):
        client.join(fleet.devices[ME], offer, fleet.entropy, at=dt.datetime(2040, 1, 1, tzinfo=dt.UTC))


def test_a_device_with_anothers_certificate_does_not_join(fleet: Any) -> None:
    _, offer = fleet.offer()
    confused = dataclasses.replace(fleet.devices[ME], certificate=fleet.devices["device-001"].certificate)
    with refused(ProtocolError, "offer.self", peer="coordinator"):
        client.join(confused, offer, fleet.entropy)
    broken = dataclasses.replace(fleet.devices[ME], certificate=b"")
    with refused(ProtocolError, "device.certificate", value="certificate"):
        client.join(broken, offer, fleet.entropy)


# Steps 3 and 4, the roster


@pytest.fixture
def on_roster(fleet: Any) -> tuple[Advertised, bytes]:
    state, offer = fleet.offer()
    for name in fleet.devices:
        state = state.on_advert(name, fleet.join(name, offer))
    _, roster = state.close()
    return fleet.states[ME], roster


@pytest.mark.parametrize(
    ("choose", "about"),
    [
        (lambda adverts: (adverts[0], *adverts), "roster.order"),
        (lambda adverts: (adverts[1], adverts[0], *adverts[2:]), "roster.order"),
        (lambda adverts: (*adverts[:4], adverts[4][:-1]), "encoding.length"),
    ],
)
def test_a_roster_with_other_adverts_is_refused(
    fleet: Any, on_roster: tuple[Advertised, bytes], choose: Any, about: str
) -> None:
    state, roster = on_roster
    adverts = envelope.open_verified(Roster, roster, fleet.key.public, "coordinator").adverts
    with refused(ProtocolError, about):
        state.on_roster(fleet.devices[ME], resigned(fleet, roster, Roster, adverts=choose(adverts)), fleet.entropy)
    state.on_roster(fleet.devices[ME], roster, fleet.entropy)


def test_a_roster_for_which_no_graph_exists_is_refused(fleet: Any, on_roster: tuple[Advertised, bytes]) -> None:
    state, roster = on_roster
    odd = dataclasses.replace(state, spec=dataclasses.replace(state.spec, degree=3))
    with refused(ProtocolError, "spec.degree", peer="coordinator", value=3):
        odd.on_roster(fleet.devices[ME], roster, fleet.entropy)


def test_a_roster_that_breaks_the_policy_is_refused(fleet: Any, on_roster: tuple[Advertised, bytes]) -> None:
    state, roster = on_roster
    device = fleet.devices[ME]
    strict = dataclasses.replace(
        device, policy=dataclasses.replace(device.policy, minimum_cohort=4, corrupt_fraction=0.5)
    )
    with refused(ProtocolError, "roster.threshold", peer="coordinator", value=4):
        state.on_roster(strict, roster, fleet.entropy)
    state.on_roster(device, roster, fleet.entropy)


def test_a_device_shares_its_secrets_once(fleet: Any, on_roster: tuple[Advertised, bytes]) -> None:
    state, roster = on_roster
    state.on_roster(fleet.devices[ME], roster, fleet.entropy)
    with refused(ProtocolError, "single-use", value="shares"):
        state.on_roster(fleet.devices[ME], roster, fleet.entropy)


# Step 5, the plan


@pytest.mark.parametrize(
    ("changes", "about", "value"),
    [
        ({"round": 4}, "plan.round", 4),
        ({"members": ("device-000", "device-001", "device-002")}, "plan.size", 3),
        ({"members": ("device-000", "device-000", "device-001", "device-002")}, "plan.order", None),
        ({"members": ("device-000", "device-001", "device-002", "device-003", "zed")}, "plan.members", "zed"),
    ],
)
def test_a_plan_that_is_not_for_this_device_now_is_refused(
    fleet: Any, changes: dict[str, Any], about: str, value: object
) -> None:
    _, plans = planned(fleet)
    state, device = fleet.states[ME], fleet.devices[ME]
    with refused(ProtocolError, about, peer="coordinator", value=value):
        state.on_plan(device, replanned(fleet, plans[ME], **changes))
    assert isinstance(state.on_plan(device, plans[ME]), Planned)


def test_a_plan_with_a_member_whose_shares_did_not_arrive_is_refused(fleet: Any) -> None:
    _, plans = planned(fleet)
    message = envelope.open_verified(Assignment, plans[ME], fleet.key.public, "coordinator")
    fewer = {dealer: encrypted for dealer, encrypted in message.encrypted_shares.items() if dealer != "device-003"}
    with refused(ProtocolError, "plan.members", peer="coordinator", value="device-003"):
        fleet.states[ME].on_plan(fleet.devices[ME], resigned(fleet, plans[ME], Assignment, encrypted_shares=fewer))
    with refused(ProtocolError, "assignment.neighbors", peer="coordinator", value=1):
        fleet.states[ME].on_plan(fleet.devices[ME], resigned(fleet, plans[ME], Assignment, encrypted_shares={}))


def test_shares_of_a_device_that_is_not_a_neighbor_are_refused(fleet: Any) -> None:
    _, plans = planned(fleet)
    message = envelope.open_verified(Assignment, plans[ME], fleet.key.public, "coordinator")
    for stranger in ("zed", ME):
        more = {**message.encrypted_shares, stranger: EncryptedShares(b"", ())}
        with refused(ProtocolError, "assignment.dealers", peer="coordinator"):
            fleet.states[ME].on_plan(fleet.devices[ME], resigned(fleet, plans[ME], Assignment, encrypted_shares=more))


def test_a_round_is_begun_once(fleet: Any) -> None:
    _, plans = planned(fleet)
    state, device = fleet.states[ME], fleet.devices[ME]
    begun = state.on_plan(device, plans[ME])
    with refused(ProtocolError, "single-use", value="round"):
        state.on_plan(device, replanned(fleet, plans[ME], adapter_version=2))
    with refused(ProtocolError, "plan.round", peer="coordinator", value=1):
        begun.on_plan(device, replanned(fleet, plans[ME], adapter_version=2))


def test_skipped_rounds_cannot_be_joined_and_their_secrets_are_dropped(fleet: Any) -> None:
    _, plans = planned(fleet)
    begun = fleet.states[ME].on_plan(fleet.devices[ME], replanned(fleet, plans[ME], round=2))
    assert set(begun.ready.secrets) == set(begun.ready.held) == {3}
    with refused(ProtocolError, "plan.round", peer="coordinator", value=1):
        begun.on_plan(fleet.devices[ME], plans[ME])


# Step 6, the masked input


def test_two_vectors_are_never_masked_with_the_same_masks(fleet: Any) -> None:
    _, plans = planned(fleet)
    begun = fleet.states[ME].on_plan(fleet.devices[ME], plans[ME])
    begun.contribute(fleet.devices[ME], np.zeros(8, np.uint32))
    with refused(ProtocolError, "single-use", value="masked-input"):
        begun.contribute(fleet.devices[ME], np.ones(8, np.uint32))


@pytest.mark.parametrize("vector", [np.zeros(7, np.uint32), np.zeros(8, np.uint64), np.zeros((8, 1), np.uint32)])
def test_a_vector_of_another_shape_is_refused_and_the_round_goes_on(fleet: Any, vector: Any) -> None:
    _, plans = planned(fleet)
    begun = fleet.states[ME].on_plan(fleet.devices[ME], plans[ME])
    with refused(DataError, "ring.vector"):
        begun.contribute(fleet.devices[ME], vector)
    begun.contribute(fleet.devices[ME], np.zeros(8, np.uint32))


def test_the_plain_vector_does_not_outlive_its_masking(fleet: Any) -> None:
    _, plans = planned(fleet)
    begun = fleet.states[ME].on_plan(fleet.devices[ME], plans[ME])
    vector = np.zeros(8, np.uint32)
    begun.contribute(fleet.devices[ME], vector)
    assert np.all(vector != 0)


# Steps 7 and 8, survivors and unmasking


@pytest.fixture
def masked(fleet: Any) -> tuple[Any, dict[str, bytes]]:
    return fleet.collect(fleet.establish(), {"input": ["device-004"]})  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("change", "about", "value"),
    [
        (lambda vectors: {}, "survivors.self", ME),
        (lambda vectors: {**vectors, "zed": bytes(32)}, "survivors.members", "zed"),
        (lambda vectors: {name: vectors[name] for name in sorted(vectors)[:3]}, "survivors.size", 3),
    ],
)
def test_an_invalid_survivor_set_is_refused(
    fleet: Any, masked: tuple[Any, dict[str, bytes]], change: Any, about: str, value: object
) -> None:
    _, bodies = masked
    state, device = fleet.states[ME], fleet.devices[ME]
    vectors = envelope.open_verified(Survivors, bodies[ME], fleet.key.public, "coordinator").vectors
    with refused(ProtocolError, about, peer="coordinator"):
        state.on_survivors(device, resigned(fleet, bodies[ME], Survivors, vectors=change(vectors)))
    state.on_survivors(device, bodies[ME])


def test_an_active_session_reveals_no_shares_without_consistency_signatures(
    fleet: Any, masked: tuple[Any, dict[str, bytes]]
) -> None:
    _, bodies = masked
    survivors = envelope.open_verified(Survivors, bodies[ME], fleet.key.public, "coordinator")
    unmask = envelope.sign(fleet.key, Unmask(survivors, {}))
    with refused(ProtocolError, "session.adversary", peer="coordinator"):
        fleet.states[ME].on_unmask(fleet.devices[ME], unmask)


def test_an_honest_but_curious_session_has_no_consistency_check(fleet_of: FleetOf, spec_of: Callable[..., Any]) -> None:
    fleet = fleet_of(5, spec=spec_of(5, adversary=Adversary.HONEST_BUT_CURIOUS))
    _, bodies = fleet.collect(fleet.establish())
    survivors = envelope.open_verified(Unmask, bodies[ME], fleet.key.public, "coordinator").survivors
    with refused(ProtocolError, "session.adversary", peer="coordinator"):
        fleet.states[ME].on_survivors(fleet.devices[ME], envelope.sign(fleet.key, survivors))
    masked = fleet.states[ME]
    masked.on_unmask(fleet.devices[ME], bodies[ME])
    with refused(ProtocolError, "single-use", value="unmask-response"):
        masked.on_unmask(fleet.devices[ME], bodies[ME])


@pytest.mark.parametrize(
    ("change", "about", "value"),
    [
        (lambda signed: dict(list(signed.items())[:3]), "unmask.quorum", 3),
        (lambda signed: {**signed, ME: bytes(64)}, "signature", "consistency-signature"),
        (lambda signed: {**signed, "device-004": signed[ME]}, "unmask.signers", "device-004"),
        (lambda signed: {**signed, ME: signed["device-001"]}, "signature", "consistency-signature"),
    ],
)
def test_an_unmask_request_without_enough_signatures_is_refused(
    fleet: Any, masked: tuple[Any, dict[str, bytes]], change: Any, about: str, value: object
) -> None:
    _, bodies = fleet.confirm(*masked)
    state, device = fleet.states[ME], fleet.devices[ME]
    signed = envelope.open_verified(Unmask, bodies[ME], fleet.key.public, "coordinator").consistency_signatures
    with refused(ProtocolError, about, peer="coordinator", value=value):
        state.on_unmask(device, resigned(fleet, bodies[ME], Unmask, consistency_signatures=change(signed)))
    state.on_unmask(device, bodies[ME])
    with refused(ProtocolError, "single-use", value="unmask-response"):
        state.on_unmask(device, bodies[ME])


# The lifetime of secrets


def test_secrets_end_with_their_round(fleet: Any) -> None:
    session = fleet.establish()
    assert set(fleet.states[ME].secrets) == {1, 2, 3}
    state, bodies = fleet.collect(session)
    masked = fleet.states[ME]
    assert isinstance(masked, Masked)
    assert set(masked.ready.secrets) == {2, 3}
    assert masked.ready.share_key is None
    assert not hasattr(masked, "secrets")
    state, bodies = fleet.confirm(state, bodies)
    assert isinstance(fleet.states[ME], Confirmed)
    fleet.open(state, bodies)
    ready = fleet.states[ME]
    assert isinstance(ready, Ready)
    assert set(ready.held) == {2, 3}


def test_no_state_shows_a_secret(fleet: Any) -> None:
    """Neither its ``repr`` nor its errors."""
    state, offer = fleet.offer()
    for name in fleet.devices:
        state = state.on_advert(name, fleet.join(name, offer))
    sharing, roster = state.close()
    advertised = fleet.states[ME]
    for name in fleet.devices:
        sharing = sharing.on_shares(name, fleet.share(name, roster))
    ready = fleet.states[ME]
    state, plans = fleet.begin(sharing.close())
    begun = ready.on_plan(fleet.devices[ME], plans[ME])
    masked, body = begun.contribute(fleet.devices[ME], np.zeros(8, np.uint32))
    state = state.on_masked_input(ME, body)
    for name in sorted(set(plans) - {ME}):
        state = state.on_masked_input(name, fleet.contribute(name, plans[name]))
    _, bodies = state.close()
    confirmed, _ = masked.on_survivors(fleet.devices[ME], bodies[ME])
    pairs = [*begun.held.values(), *(pair for held in masked.ready.held.values() for pair in held.values())]
    owned = [advertised.share_key, *(part for each in ready.secrets.values() for part in (each.seed, each.mask_key))]
    secrets = [*owned, fleet.devices[ME].identity.raw, *(share for pair in pairs for share in (pair.seed, pair.key))]
    assert len(secrets) > 30
    for shown in map(repr, (fleet.devices[ME], advertised, ready, begun, masked, confirmed, *pairs)):
        assert not [secret for secret in secrets if repr(secret)[2:-1] in shown or secret.hex() in shown]


@pytest.mark.parametrize("stage", ["planned", "masked", "confirmed"])
def test_a_new_round_may_begin_in_any_state(fleet: Any, stage: str) -> None:
    session = fleet.establish()
    state, plans = fleet.begin(session)
    if stage == "planned":
        for name in plans:
            fleet.states[name] = fleet.states[name].on_plan(fleet.devices[name], plans[name])
        outcome = state.close()
    else:
        for name in plans:
            state = state.on_masked_input(name, fleet.contribute(name, plans[name]))
        state, bodies = state.close()
        for name in bodies if stage == "confirmed" else ():
            fleet.answer("on_survivors", name, bodies[name])
        outcome = state.close()
    _, result = fleet.round(outcome.session)
    assert result.round == 2
    fleet.assert_sum(result)
