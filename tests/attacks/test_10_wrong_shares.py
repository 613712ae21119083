"""A device that reveals or deals wrong shares is blamed, and the round ends with the right sum or without one."""

import dataclasses
import hashlib
from collections.abc import Collection
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Error, Message

from aggregation import envelope, masks, recovery, sharing
from aggregation.errors import EdgeAdaptError
from aggregation.messages import Shares, UnmaskResponse
from aggregation.server import AbortReason, RoundAborted, Unmasking
from aggregation.sharing import SharePair
from aggregation.steps import BODY, RECORD, Step
from client.node.app import app as client_app
from tests.support import FleetOf, refused
from tests.support.hostile import audit_failures

SMALL = "device-000"  # first in order: its shares are among the first t


def spoiled_share(share: bytes) -> bytes:
    """An unrelated value: errors of one in several shares could cancel."""
    return b"\x00" + hashlib.sha256(share).digest()


def wrong_response(fleet: Any, name: str, raw: bytes) -> bytes:
    device = fleet.devices[name]
    message = envelope.open_verified(UnmaskResponse, raw, device.identity.public, name)
    changed = {
        "seeds": {dealer: spoiled_share(share) for dealer, share in message.seeds.items()},
        "keys": {dealer: spoiled_share(share) for dealer, share in message.keys.items()},
    }
    return envelope.sign(device.identity, dataclasses.replace(message, **changed))


def round_with_liars(fleet: Any, liars: Collection[str], dropouts: Collection[str] = ()) -> Any:
    state, bodies = fleet.confirm(*fleet.collect(fleet.establish(), {"input": dropouts}))
    for name in bodies:
        answer = fleet.answer("on_unmask", name, bodies[name])
        state = state.on_unmask_response(name, wrong_response(fleet, name, answer) if name in liars else answer)
    return state.close()


@pytest.mark.parametrize("dropouts", [(), ("device-003",)])
def test_a_device_that_reveals_wrong_shares_is_blamed_and_the_sum_is_right(
    fleet_of: FleetOf, dropouts: tuple[str, ...]
) -> None:
    fleet = fleet_of(8)
    _, result = round_with_liars(fleet, [SMALL], dropouts)
    assert result.blamed == (SMALL,)
    fleet.assert_sum(result)


def test_as_many_liars_as_leave_a_threshold_of_good_shares_are_all_blamed(fleet_of: FleetOf) -> None:
    fleet = fleet_of(10)
    liars = sorted(fleet.devices)[: 10 - fleet.spec.threshold]
    _, result = round_with_liars(fleet, liars)
    assert result.blamed == tuple(liars)
    fleet.assert_sum(result)


def test_one_liar_more_aborts_the_round_and_all_are_blamed(fleet_of: FleetOf) -> None:
    fleet = fleet_of(10)
    liars = sorted(fleet.devices)[: 11 - fleet.spec.threshold]
    outcome = round_with_liars(fleet, liars)
    assert isinstance(outcome, RoundAborted)
    assert outcome.reason is AbortReason.UNRECOVERABLE
    assert outcome.blamed == tuple(liars)
    honest = sorted(set(fleet.devices) - set(liars))
    assert fleet.begin(outcome.session, cohort=honest).reason is AbortReason.TOO_FEW


def test_with_commitments_unchecked_a_wrong_share_produces_a_wrong_seed(
    fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    matched: list[bool] = []
    genuine = recovery.commitment

    class Anything(bytes):
        """A commitment that equals every other."""

        def __eq__(self, other: object) -> bool:
            matched.append(bytes(self) == other)
            return True

        __hash__ = bytes.__hash__

    monkeypatch.setattr(recovery, "commitment", lambda *given: Anything(genuine(*given)))
    fleet = fleet_of(8)
    outcome = round_with_liars(fleet, [SMALL])
    assert matched == [False] * 8  # every seed is wrong, and no device is blamed
    assert isinstance(outcome, RoundAborted) or not np.allclose(
        outcome[1].values["delta"], np.sum([own["delta"] for own in fleet.plain.values()], axis=0)
    )


def deal_badly(fleet: Any, dealer: str, cheated: Collection[str], *, digests: bool, monkeypatch: Any) -> Any:
    """``dealer`` deals ``cheated`` wrong shares, with digests of these or of the right ones."""
    genuine = sharing.encrypt

    def encrypt(session: Any, share_key: Any, who: str, holder: str, pairs: dict[int, SharePair]) -> Any:
        right = genuine(session, share_key, who, holder, pairs)
        if who != dealer or holder not in cheated:
            return right
        wrong = {number: SharePair(spoiled_share(pair.seed), spoiled_share(pair.key)) for number, pair in pairs.items()}
        encrypted = genuine(session, share_key, who, holder, wrong)
        return encrypted if digests else dataclasses.replace(encrypted, digests=right.digests)

    monkeypatch.setattr(sharing, "encrypt", encrypt)
    session = fleet.establish()
    monkeypatch.setattr(sharing, "encrypt", genuine)
    return session


def test_a_dealer_of_inconsistent_shares_is_blamed_and_not_its_holders(
    fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = fleet_of(8)
    session = deal_badly(fleet, "device-005", ["device-000"], digests=True, monkeypatch=monkeypatch)
    _, result = fleet.round(session)
    assert result.blamed == ("device-005",)
    fleet.assert_sum(result)


def test_a_dealer_that_cheats_its_holders_aborts_one_round_and_is_excluded(
    fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = fleet_of(8)
    others = sorted(set(fleet.devices) - {"device-005"})
    session = deal_badly(fleet, "device-005", others[::2], digests=True, monkeypatch=monkeypatch)
    outcome = fleet.round(session)
    assert isinstance(outcome, RoundAborted)
    assert outcome.blamed == ("device-005",)
    _, result = fleet.round(outcome.session)
    assert list(result.survivors) == others
    fleet.assert_sum(result)


@pytest.mark.parametrize(("devices", "cheated"), [(10, (0, 2, 9)), (24, tuple(range(9)))])
def test_the_sum_is_right_if_a_dealer_left_a_threshold_of_good_shares(
    fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch, devices: int, cheated: tuple[int, ...]
) -> None:
    fleet = fleet_of(devices)
    assert devices - len(cheated) >= fleet.spec.threshold
    names = sorted(fleet.devices)
    wronged = [names[place] for place in cheated if names[place] != "device-005"]
    _, result = fleet.round(deal_badly(fleet, "device-005", wronged, digests=True, monkeypatch=monkeypatch))
    assert result.blamed == ("device-005",)
    fleet.assert_sum(result)


@pytest.mark.parametrize("dropouts", [(), ("device-005",)])
def test_a_dealer_whose_shares_do_not_decrypt_costs_one_round(
    fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch, dropouts: tuple[str, ...]
) -> None:
    fleet = fleet_of(8)
    others = sorted(set(fleet.devices) - {"device-005"})
    session = deal_badly(fleet, "device-005", others, digests=False, monkeypatch=monkeypatch)
    outcome = fleet.round(session, {"input": dropouts})
    assert isinstance(outcome, RoundAborted)
    assert (outcome.reason, outcome.blamed) == (AbortReason.UNRECOVERABLE, ("device-005",))
    _, result = fleet.round(outcome.session)
    assert list(result.survivors) == others
    fleet.assert_sum(result)


def test_a_device_that_withholds_its_shares_excludes_no_other_device(fleet_of: FleetOf) -> None:
    fleet = fleet_of(8)
    threshold = fleet.spec.threshold
    state, bodies = fleet.confirm(*fleet.collect(fleet.establish()))
    for name in sorted(bodies)[:threshold]:  # a threshold of devices, one of which reveals nothing
        answer = fleet.answer("on_unmask", name, bodies[name])
        if name == SMALL:
            identity = fleet.devices[name].identity
            message = envelope.open_verified(UnmaskResponse, answer, identity.public, name)
            answer = envelope.sign(identity, dataclasses.replace(message, seeds={}, keys={}))
        state = state.on_unmask_response(name, answer)
    outcome = state.close()
    assert isinstance(outcome, RoundAborted)
    assert (outcome.reason, outcome.blamed) == (AbortReason.TOO_FEW, ())
    _, result = fleet.round(outcome.session)
    assert len(result.survivors) == 8


DEALER, LATE = "device-02", "device-07"
WITHHOLD = ("device-05", "device-06")  # as many as the policy of a device assumes in a cohort of 11


@pytest.mark.parametrize("weakened", [False, True])
def test_as_many_devices_as_may_be_corrupt_frame_no_dealer(
    app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch, weakened: bool
) -> None:
    """They say that they have no share of it. The roster lacks a device, and so does the unmasking.

    If the coordinator believed them, it would wait until the authority revokes the dealer.
    """
    fleet = app_fleet_of(11, rounds=2, aggregation__session_rounds=2)

    def call(message: Message, context: Context) -> Message:
        step, group = Step(message.metadata.message_type.partition(".")[2]), message.metadata.group_id
        name = str(context.node_config["state"]).rpartition("/")[2]
        if (step, name) == (Step.OFFER, "device-10") or (group, step, name) == ("1", Step.UNMASK, LATE):
            return Message(Error(101, "its disk is full"), reply_to=message)
        reply = client_app(message, context)
        if (group, step) == ("1", Step.UNMASK) and name in WITHHOLD:
            identity, record = fleet.state_dir(name).identity, reply.content.config_records[RECORD]
            answer = envelope.open_verified(UnmaskResponse, record[BODY], identity.public, name)
            kept = {dealer: share for dealer, share in answer.seeds.items() if dealer != DEALER}
            record[BODY] = envelope.sign(identity, dataclasses.replace(answer, seeds=kept))
        return reply

    if weakened:
        close = Unmasking.close
        monkeypatch.setattr(Unmasking, "close", lambda state, threads, corrupt: close(state, threads))
        with refused(EdgeAdaptError, "session") as caught:
            fleet.federate(fleet.grid(app=call))
        assert f"until the authority revokes {DEALER}" in str(caught.value)
        return
    first, second = fleet.federate(fleet.grid(app=call))
    assert (first.reason, first.blamed) == ("too-few", ())
    assert (second.version, len(second.survivors)) == (1, 10)
    assert audit_failures(fleet.out) == set()


@pytest.mark.parametrize("dropouts", [(), ("device-005",)])
def test_a_dealer_whose_shares_do_not_match_their_digests_stops_no_round(
    fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch, dropouts: tuple[str, ...]
) -> None:
    # The holder finds out when it decrypts; it then has no share of that dealer, and no device is blamed.
    fleet = fleet_of(8)
    session = deal_badly(fleet, "device-005", ["device-000"], digests=False, monkeypatch=monkeypatch)
    _, result = fleet.round(session, {"input": dropouts})
    assert result.blamed == ()
    fleet.assert_sum(result)


def test_shares_that_do_not_decrypt_stop_no_round(fleet_of: FleetOf) -> None:
    fleet = fleet_of(8)
    state, offer = fleet.offer()
    for name in sorted(fleet.devices):
        state = state.on_advert(name, fleet.join(name, offer))
    sharing, roster = state.close()
    for name in sorted(fleet.devices):
        raw = fleet.share(name, roster)
        if name == "device-005":
            device = fleet.devices[name]
            message = envelope.open_verified(Shares, raw, device.identity.public, name)
            encrypted = message.encrypted_shares[SMALL]
            junk = dataclasses.replace(encrypted, ciphertext=bytes(len(encrypted.ciphertext)))
            raw = envelope.sign(
                device.identity,
                dataclasses.replace(message, encrypted_shares={**message.encrypted_shares, SMALL: junk}),
            )
        sharing = sharing.on_shares(name, raw)
    _, result = fleet.round(sharing.close())
    assert len(result.survivors) == 8
    fleet.assert_sum(result)


@pytest.mark.parametrize("rounds", [(1, 2), (1, 2, 3, 4)])
def test_shares_for_another_number_of_rounds_are_dropped(fleet_of: FleetOf, rounds: tuple[int, ...]) -> None:
    """The dealer encrypted and digested them correctly; the coordinator forwards them against the rules."""
    fleet = fleet_of(4)
    established = fleet.establish()
    dealer = fleet.states["device-001"]
    pair = SharePair(bytes(33), bytes(33))
    key = masks.private_key(dealer.share_key)
    encrypted = sharing.encrypt(established.session, key, "device-001", SMALL, dict.fromkeys(rounds, pair))
    held = masks.private_key(fleet.states[SMALL].share_key)
    assert sharing.decrypt(established.session, held, "device-001", SMALL, encrypted) is None


@pytest.mark.parametrize("cut", [{"ciphertext": b""}, {"digests": ()}])
def test_shares_of_another_size_are_dropped(fleet_of: FleetOf, cut: dict[str, Any]) -> None:
    fleet = fleet_of(4)
    established = fleet.establish()
    encrypted = dataclasses.replace(established.encrypted_shares["device-001"][SMALL], **cut)
    held = masks.private_key(fleet.states[SMALL].share_key)
    assert sharing.decrypt(established.session, held, "device-001", SMALL, encrypted) is None


@pytest.mark.parametrize("dealt", [True, False])
def test_a_share_outside_the_field_is_a_wrong_share(
    fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch, dealt: bool
) -> None:
    monkeypatch.setitem(globals(), "spoiled_share", lambda share: b"\xff" * len(share))
    fleet = fleet_of(8)
    if dealt:
        _, result = fleet.round(deal_badly(fleet, "device-005", [SMALL], digests=True, monkeypatch=monkeypatch))
    else:
        _, result = round_with_liars(fleet, [SMALL])
    assert result.blamed == ("device-005" if dealt else SMALL,)
    fleet.assert_sum(result)
