"""Receipts: a device goes on only with a log that has its round in it and begins with what it saw before."""

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aggregation.errors import ProtocolError
from aggregation.identity import IdentityKey
from aggregation.messages import Plan
from aggregation.receipts import RECEIPT, Witness, receipt
from aggregation.steps import Step
from aggregation.transcript import Abort, Result, Transcript

KEY, STRANGER = IdentityKey(bytes(range(32))), IdentityKey(bytes(32))
OFFER = bytes([9]) * 32


def plan(round_: int) -> Plan:
    return Plan(bytes(32), round_, ("a", "b"), round_, "ab" * 32, b"")


def log_of(rounds: int, *, word: bytes = b"advert", key: IdentityKey = KEY, offer: bytes = OFFER) -> Transcript:
    """A session of so many rounds; the second one ends without a sum."""
    log = Transcript(offer)
    log.sent(Step.OFFER, dict.fromkeys("ab", b"offer"))
    log.received(Step.OFFER, "a", word)
    log.checkpoint(key)
    for number in range(1, rounds + 1):
        add_round(log, number, key)
    return log


def add_round(log: Transcript, number: int, key: IdentityKey = KEY) -> None:
    log.begin(plan(number))
    log.sent(Step.PLAN, dict.fromkeys("ab", b"plan"))
    digest = plan(number).digest()
    result = Result(digest, ("a", "b"), bytes(32), number + 1, "cd" * 32)
    log.ended(key, Abort(digest, "too-few") if number == 2 else result)


def seen(rounds: int) -> Witness:
    """What a device keeps that saw the log after so many rounds."""
    return Witness(OFFER).on_receipt(KEY.public, receipt(log_of(rounds)), None)[0]


@pytest.mark.parametrize("before", range(4))
@pytest.mark.parametrize("last", [1, 2, 3])
def test_a_log_that_grew_and_holds_the_round_is_accepted(before: int, last: int) -> None:
    witness, ending = seen(before).on_receipt(KEY.public, receipt(log_of(3), last), plan(last).digest())
    assert ending is not None
    assert ending.plan == plan(last).digest()
    assert isinstance(ending, Abort) == (last == 2)
    assert witness == seen(3)


def test_a_device_that_saw_nothing_yet_takes_the_log_as_it_is() -> None:
    witness, ending = Witness(OFFER).on_receipt(KEY.public, receipt(log_of(0)), None)
    assert ending is None
    assert witness.size == 2


def test_the_same_receipt_twice_is_no_harm() -> None:
    once = seen(2)
    assert once.on_receipt(KEY.public, receipt(log_of(2)), None)[0] == once


def refused(witness: Witness, raw: bytes, plan_: bytes | None, reason: str) -> None:
    with pytest.raises(ProtocolError, match=reason):
        witness.on_receipt(KEY.public, raw, plan_)


def test_a_log_that_was_rewritten_is_refused() -> None:
    refused(seen(1), receipt(log_of(3, word=b"another"), 1), plan(1).digest(), "is not shown to begin with")


def test_a_log_that_is_shorter_than_what_was_seen_is_refused() -> None:
    refused(seen(3), receipt(log_of(2), 1), plan(1).digest(), "is not shown to begin with")


def test_two_devices_that_were_shown_two_logs_never_meet_in_one() -> None:
    one, other = log_of(1), log_of(1, word=b"another")
    for grown in (one, other):
        add_round(grown, 2)
    mine = seen(1)
    assert mine.on_receipt(KEY.public, receipt(one, 1), plan(1).digest())
    refused(mine, receipt(other, 1), plan(1).digest(), "is not shown to begin with")


def test_the_end_of_another_round_is_refused() -> None:
    refused(seen(1), receipt(log_of(3), 2), plan(3).digest(), "another round than this device took part in")


def test_a_log_without_the_round_is_refused() -> None:
    refused(seen(1), receipt(log_of(3)), plan(3).digest(), "truncated")


def test_an_ending_that_is_not_in_the_log_is_refused() -> None:
    forged = RECEIPT.decode(receipt(log_of(3, word=b"another"), 3))
    mixed = replace(RECEIPT.decode(receipt(log_of(3), 3)), ending=forged.ending, inclusion=forged.inclusion)
    refused(seen(1), RECEIPT.encode(mixed), plan(3).digest(), "is not shown to be in the log")


def test_another_session_or_another_coordinator_is_refused() -> None:
    refused(seen(1), receipt(log_of(3, offer=bytes(32)), 1), plan(1).digest(), "of another session")
    refused(seen(1), receipt(log_of(3, key=STRANGER), 1), plan(1).digest(), "is not valid")


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_in_what_this_device_checks_is_refused(place: float, bit: int) -> None:
    genuine = RECEIPT.decode(receipt(log_of(3), 3))
    witness = seen(1)
    needed = replace(genuine, consistency={witness.size: genuine.consistency[witness.size]})
    raw = bytearray(RECEIPT.encode(needed))
    raw[int(place * len(raw))] ^= 1 << bit
    with pytest.raises(ProtocolError):
        witness.on_receipt(KEY.public, bytes(raw), plan(3).digest())


@given(st.binary(max_size=300))
def test_any_bytes_are_refused(raw: bytes) -> None:
    with pytest.raises(ProtocolError):
        seen(1).on_receipt(KEY.public, raw, None)


def test_a_receipt_of_a_long_session_is_small() -> None:
    assert len(receipt(log_of(64), 64)) < 40_000
