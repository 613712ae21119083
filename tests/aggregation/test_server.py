"""The coordinator's states: which devices may answer when, and what ends a round."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from aggregation import envelope, masks, ring, server
from aggregation.errors import ConfigError, ProtocolError
from aggregation.messages import Advert, ConsistencySignature, Shares, UnmaskResponse
from aggregation.server import AbortReason, Coordinator, Established, RoundAborted
from tests.support import FleetOf, refused

ME, OTHER = "device-000", "device-001"


@pytest.fixture
def fleet(fleet_of: FleetOf) -> Any:
    return fleet_of(5)


def resigned(fleet: Any, name: str, raw: bytes, kind: Any, **changes: Any) -> bytes:
    """A device's message, changed and signed again by the device itself."""
    device = fleet.devices[name]
    message = envelope.open_verified(kind, raw, device.identity.public, name)
    return envelope.sign(device.identity, replace(message, **changes))


def assert_refused(call: Callable[[str, bytes], Any], name: str, body: bytes, about: str) -> None:
    with refused(ProtocolError, about, peer=name):
        call(name, body)


# Step 1


def test_a_certificate_filed_under_another_device_is_refused(fleet: Any) -> None:
    certificates = dict(fleet.certificates)
    certificates["device-00x"] = certificates.pop("device-004")
    with refused(ProtocolError, "offer.certificates"):
        server.open_session(Coordinator(fleet.key), fleet.authority.root, fleet.spec, certificates, fleet.entropy)


def test_a_spec_for_another_cohort_is_refused(fleet: Any) -> None:
    certificates = {name: fleet.certificates[name] for name in sorted(fleet.devices)[:4]}
    with refused(ConfigError, "spec.degree", value=4):
        server.open_session(Coordinator(fleet.key), fleet.authority.root, fleet.spec, certificates, fleet.entropy)


# Step 2


def test_adverts_are_accepted_once_and_from_the_cohort_only(fleet: Any) -> None:
    state, offer = fleet.offer()
    advert = fleet.join(ME, offer)
    assert_refused(state.on_advert, "zed", advert, "advert.peer")
    assert_refused(state.on_advert, OTHER, advert, "signature")
    taken = state.on_advert(ME, advert)
    assert_refused(taken.on_advert, ME, advert, "advert.repeated")


@pytest.mark.parametrize(
    ("changes", "about"),
    [
        ({"offer": bytes(32)}, "advert.offer"),
        ({"device": OTHER}, "advert.device"),
        ({"mask_keys": ()}, "advert.mask_keys"),
        ({"commitments": ()}, "advert.mask_keys"),
        ({"share_key": bytes(32)}, "x25519.order"),
        ({"share_key": b"\xff" * 32}, "x25519.encoding"),
        ({"mask_keys": (b"\x05" * 32, b"\x06" * 32, b"\x05" * 32)}, "advert.keys"),
        ({"share_key": b"\x05" * 32, "mask_keys": (b"\x05" * 32, b"\x06" * 32, b"\x07" * 32)}, "advert.keys"),
        ({"mask_keys": (b"\x05" * 32, b"\x06" * 32, b"\x01" + bytes(31))}, "x25519.order"),
    ],
)
def test_an_invalid_advert_is_refused(fleet: Any, changes: dict[str, Any], about: str) -> None:
    state, offer = fleet.offer()
    advert = fleet.join(ME, offer)
    assert_refused(state.on_advert, ME, resigned(fleet, ME, advert, Advert, **changes), about)


@pytest.mark.parametrize("what", ["mask_keys", "share_key"])
def test_a_device_that_copies_a_key_is_refused_and_the_others_form_a_session(fleet: Any, what: str) -> None:
    state, offer = fleet.offer()
    adverts = {name: fleet.join(name, offer) for name in fleet.devices}
    copied = getattr(envelope.open_verified(Advert, adverts[ME], fleet.devices[ME].identity.public, ME), what)
    state = state.on_advert(ME, adverts[ME])
    assert_refused(
        state.on_advert, OTHER, resigned(fleet, OTHER, adverts[OTHER], Advert, **{what: copied}), "advert.copied"
    )
    for name in sorted(set(adverts) - {ME, OTHER}):
        state = state.on_advert(name, adverts[name])
    sharing, _ = state.close()
    assert set(sharing.session.peers) == set(adverts) - {OTHER}


# Step 4


@pytest.fixture
def sharing(fleet: Any) -> tuple[Any, bytes]:
    state, offer = fleet.offer()
    for name in fleet.devices:
        state = state.on_advert(name, fleet.join(name, offer))
    return state.close()  # type: ignore[no-any-return]


def test_shares_are_accepted_once_and_from_the_roster_only(fleet: Any, sharing: tuple[Any, bytes]) -> None:
    state, roster = sharing
    shares = fleet.share(ME, roster)
    assert_refused(state.on_shares, "zed", shares, "shares.peer")
    assert_refused(state.on_shares, OTHER, shares, "signature")
    assert_refused(state.on_shares(ME, shares).on_shares, ME, shares, "shares.repeated")


@pytest.mark.parametrize(
    ("change", "about"),
    [
        (lambda shares: {"context": bytes(32)}, "shares.context"),
        (lambda shares: {"device": OTHER}, "shares.device"),
        (lambda shares: {"encrypted_shares": {}}, "shares.holders"),
        (lambda shares: {"encrypted_shares": {**shares, ME: shares[OTHER]}}, "shares.holders"),
        (lambda shares: {"encrypted_shares": {**shares, OTHER: replace(shares[OTHER], ciphertext=b"")}}, "shares.size"),
        (lambda shares: {"encrypted_shares": {**shares, OTHER: replace(shares[OTHER], digests=())}}, "shares.size"),
    ],
)
def test_invalid_shares_are_refused(fleet: Any, sharing: tuple[Any, bytes], change: Any, about: str) -> None:
    state, roster = sharing
    shares = fleet.share(ME, roster)
    message = envelope.open_verified(Shares, shares, fleet.devices[ME].identity.public, ME)
    assert_refused(state.on_shares, ME, resigned(fleet, ME, shares, Shares, **change(message.encrypted_shares)), about)


def test_too_few_devices_that_send_shares_form_no_session(fleet: Any) -> None:
    outcome = fleet.establish({"shares": sorted(fleet.devices)[:2]})
    assert isinstance(outcome, RoundAborted)
    assert (outcome.reason, outcome.session) == (AbortReason.TOO_FEW, None)
    assert outcome.detail.endswith("3 devices that sent shares, 4 are needed")


# Step 6


def resigned_input(fleet: Any, name: str, raw: bytes, packed: bytes | None = None, **changes: Any) -> bytes:
    size = ring.packed_size(fleet.spec.vector.size, fleet.spec.vector.ring_bits)
    device = fleet.devices[name]
    header, genuine = envelope.open_vector(raw, size, device.identity.public, name)
    if packed is not None:
        changes["vector"] = hashlib.sha256(packed).digest()
    return envelope.sign_vector(device.identity, replace(header, **changes), packed or bytes(genuine))


def test_a_masked_input_is_accepted_once_and_for_its_plan_only(fleet: Any) -> None:
    session = fleet.establish()
    members = sorted(fleet.devices)[:4]
    state, plans = fleet.begin(session, cohort=members)
    body = fleet.contribute(ME, plans[ME])
    assert_refused(state.on_masked_input, "device-004", body, "masked-input.peer")
    assert_refused(state.on_masked_input, OTHER, body, "signature")
    assert_refused(state.on_masked_input, ME, resigned_input(fleet, ME, body, plan=bytes(32)), "masked-input.plan")
    assert_refused(state.on_masked_input, ME, resigned_input(fleet, ME, body, device=OTHER), "masked-input.device")
    assert not state.totals[0].any()
    taken = state.on_masked_input(ME, body)
    assert_refused(taken.on_masked_input, ME, body, "masked-input.repeated")


def test_a_checked_input_is_added_once_for_its_device_and_its_plan_only(fleet: Any) -> None:
    session = fleet.establish()
    state, plans = fleet.begin(session)
    mine, other = (state.check(name, fleet.contribute(name, plans[name])) for name in (ME, OTHER))
    later, _ = fleet.begin(state.established)
    with refused(ProtocolError, "masked-input.device", peer=OTHER, value=ME):
        state.add(OTHER, mine)
    with refused(ProtocolError, "masked-input.plan", peer=ME):
        later.add(ME, mine)
    assert not state.totals[0].any()
    taken = state.add(ME, mine)
    with refused(ProtocolError, "masked-input.repeated", peer=ME):
        taken.add(ME, mine)
    assert set(taken.add(OTHER, other).vectors) == {ME, OTHER}  # checked before ``taken`` was known


def test_a_state_with_a_successor_adds_no_further_input(fleet: Any) -> None:
    state, plans = fleet.begin(fleet.establish())
    bodies = {name: fleet.contribute(name, plans[name]) for name in plans}
    moved = state.on_masked_input(ME, bodies[ME])
    before = moved.totals[0].copy()
    with refused(ProtocolError, "single-use", peer="device-001", value="successor"):
        state.on_masked_input(OTHER, bodies[OTHER])
    assert (moved.totals[0] == before).all()


def test_an_input_after_the_end_of_the_step_is_not_added(fleet: Any) -> None:
    state, plans = fleet.begin(fleet.establish())
    bodies = {name: fleet.contribute(name, plans[name]) for name in plans}
    for name in sorted(bodies)[:4]:
        state = state.on_masked_input(name, bodies[name])
    survivor_set = state.close()[0].survivor_set
    before = survivor_set.totals[0].copy()
    assert_refused(state.on_masked_input, "device-004", bodies["device-004"], "single-use")
    assert (survivor_set.totals[0] == before).all()
    with refused(ProtocolError, "single-use"):
        state.close()


def test_inputs_are_added_as_they_arrive_and_not_kept(fleet: Any) -> None:
    state, plans = fleet.begin(fleet.establish())
    total = state.totals[0]
    for name in plans:
        state = state.on_masked_input(name, fleet.contribute(name, plans[name]))
    assert state.totals[0] is total
    assert {len(digest) for digest in state.vectors.values()} == {32}


# Steps 7 and 8


def test_signatures_are_accepted_once_and_on_this_survivor_set_only(fleet: Any) -> None:
    state, bodies = fleet.collect(fleet.establish(), {"input": ["device-004"]})
    answer = fleet.answer("on_survivors", ME, bodies[ME])
    other_set = resigned(fleet, ME, answer, ConsistencySignature, survivors=bytes(32))
    other_device = resigned(fleet, ME, answer, ConsistencySignature, device=OTHER)
    assert_refused(state.on_consistency_signature, "device-004", answer, "consistency-signature.peer")
    assert_refused(state.on_consistency_signature, ME, other_set, "consistency-signature.survivors")
    assert_refused(state.on_consistency_signature, ME, other_device, "consistency-signature.device")
    taken = state.on_consistency_signature(ME, answer)
    assert_refused(taken.on_consistency_signature, ME, answer, "consistency-signature.repeated")


def test_responses_are_accepted_once_and_with_the_right_shares_only(fleet: Any) -> None:
    dropouts = {"input": ["device-004"]}
    state, bodies = fleet.confirm(*fleet.collect(fleet.establish(), dropouts), dropouts)
    answer = fleet.answer("on_unmask", ME, bodies[ME])
    share = {"device-004": bytes(33)}
    other_set = resigned(fleet, ME, answer, UnmaskResponse, survivors=bytes(32))
    assert_refused(state.on_unmask_response, "device-004", answer, "unmask-response.peer")
    assert_refused(state.on_unmask_response, ME, other_set, "unmask-response.survivors")
    for wrong in ({"seeds": share}, {"keys": {OTHER: bytes(33)}}):
        body = resigned(fleet, ME, answer, UnmaskResponse, **wrong)
        assert_refused(state.on_unmask_response, ME, body, "unmask-response.shares")
    assert_refused(state.on_unmask_response(ME, answer).on_unmask_response, ME, answer, "unmask-response.repeated")


def test_a_response_of_a_device_that_did_not_sign_is_refused(fleet_of: FleetOf) -> None:
    fleet = fleet_of(5)
    dropouts = {"survivors": [ME]}
    state, bodies = fleet.confirm(*fleet.collect(fleet.establish()), dropouts)
    assert ME not in bodies
    answer = fleet.answer("on_unmask", OTHER, bodies[OTHER])
    assert_refused(state.on_unmask_response, ME, answer, "unmask-response.peer")


def test_a_round_is_unmasked_once(fleet: Any) -> None:
    state, bodies = fleet.confirm(*fleet.collect(fleet.establish()))
    for name in bodies:
        state = state.on_unmask_response(name, fleet.answer("on_unmask", name, bodies[name]))
    _, result = state.close()
    fleet.assert_sum(result)
    with refused(ProtocolError, "single-use", value="sum"):
        state.close()


def test_a_round_is_not_unmasked_again_from_an_earlier_state(fleet: Any) -> None:
    state, bodies = fleet.confirm(*fleet.collect(fleet.establish()))
    states = []
    for name in bodies:
        state = state.on_unmask_response(name, fleet.answer("on_unmask", name, bodies[name]))
        states.append(state)
    assert states[2].close().detail == "3 unmask responses, 4 are needed"
    _, result = states[3].close()
    fleet.assert_sum(result)
    with refused(ProtocolError, "single-use", value="sum"):
        states[4].close()


def test_shares_are_sent_until_a_masked_input_shows_that_they_arrived(fleet: Any) -> None:
    session = fleet.establish()
    first, plans = fleet.begin(session)
    for name in plans:
        if name != ME:
            first = first.on_masked_input(name, fleet.contribute(name, plans[name]))
    state, _ = first.close()
    aborted = state.close()
    assert isinstance(aborted, RoundAborted)
    _, again = fleet.begin(aborted.session)
    assert len(again[ME]) > 2 * len(again[OTHER])
    _, result = fleet.round(aborted.session)
    assert len(result.survivors) == 5
    fleet.assert_sum(result)


def test_a_sum_that_honest_survivors_cannot_reach_counts_as_zero(fleet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # One device's vector is not masked as agreed in the plan: the sum is noise, and noise is out of range.
    state, plans = fleet.begin(fleet.establish(), cohort=sorted(fleet.devices)[:4])
    for name in plans:
        body = fleet.contribute(name, plans[name])
        if name == ME:
            body = resigned_input(fleet, name, body, bytes(range(7, 7 + 24)))
        state = state.on_masked_input(name, body)
    state, bodies = state.close()
    fleet.states[ME] = replace(fleet.states[ME], vector=hashlib.sha256(bytes(range(7, 7 + 24))).digest())
    _, result = fleet.open(*fleet.confirm(state, bodies))
    assert "more than 4 clients within its bound" in result.sums[0].spoiled
    assert not any(values.any() for values in result.values.values())


def test_closing_too_early_aborts_and_leaves_the_session(fleet: Any) -> None:
    state, _ = fleet.offer()
    assert state.close().reason is AbortReason.TOO_FEW
    session = fleet.establish()
    collecting, _ = fleet.begin(session)
    aborted = collecting.close()
    assert isinstance(aborted.session, Established)
    assert aborted.session.rounds_left == 2
    assert "0 masked inputs, 4 are needed" in aborted.detail


def test_a_session_without_rounds_left_begins_no_round(fleet: Any) -> None:
    session = fleet.establish()
    for _ in range(3):
        session = fleet.begin(session)[0].close().session
    over = fleet.begin(session)
    assert (over.reason, over.session) == (AbortReason.SESSION_OVER, session)


def test_a_plan_for_too_few_leaves_the_round_unused(fleet: Any) -> None:
    session = fleet.establish()
    aborted = fleet.begin(session, cohort=[ME])
    assert isinstance(aborted, RoundAborted)
    assert aborted.session.rounds_left == 3


def test_the_coordinators_key_is_in_no_repr(fleet: Any) -> None:
    assert str(fleet.key.raw) not in repr(fleet.offer()[0])


def test_masks_are_removed_for_every_pair_of_survivor_and_dropout(fleet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    genuine = masks.apply
    monkeypatch.setattr(
        masks, "apply", lambda vector, given, threads: genuine(vector, seen.append(list(given)) or seen[-1], threads)
    )
    _, result = fleet.round(fleet.establish(), {"input": ["device-002"]})
    assert len(seen[-1]) == 4 + 4 * 1
    fleet.assert_sum(result)
