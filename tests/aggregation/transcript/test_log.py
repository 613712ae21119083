"""The log as it is written and read: what becomes an entry, what a checkpoint covers, where reading ends."""

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation import envelope, ring
from aggregation.errors import ProtocolError
from aggregation.messages import Assignment, EncryptedShares, MaskedInput, Plan
from aggregation.pki.identity import IdentityKey
from aggregation.steps import Step
from aggregation.transcript.entries import (
    ENTRY,
    EVERYONE,
    MAGIC,
    Abort,
    AdapterId,
    Checkpoint,
    Entry,
    Result,
    Stage,
    read,
    write,
)
from aggregation.transcript.log import ANSWERS, NO_SESSION, Transcript, packed_vector, resume
from aggregation.transcript.merkle import verify_consistency, verify_inclusion
from tests.support import FleetOf

AT = 1_770_000_000  # 2026-02-02, in seconds since 1970
START: AdapterId = (4, "ef" * 32)
KEY = IdentityKey(bytes(range(32)))
OFFER = bytes([9]) * 32
PLAN = Plan(bytes(32), 2, ("a", "b"), 1, "ab" * 32, b"")
ENDINGS = (Result(bytes(32), ("a", "b"), bytes(32), 1, "ab" * 32), Abort(bytes(32), "too-few"))


@pytest.fixture
def log() -> Transcript:
    return Transcript(OFFER, START)


def entries(raw: bytes) -> tuple[Entry, ...]:
    reading = read(MAGIC + raw)
    assert reading.problem == ""
    assert reading.end == len(MAGIC + raw)
    return reading.entries


def test_a_message_that_all_devices_receive_alike_is_one_entry(log: Transcript) -> None:
    (entry,) = entries(log.sent(Step.OFFER, {"a": b"same", "b": b"same"}, AT))
    assert entry == Entry(0, "offer", 0, EVERYONE, b"same", AT)


def test_requests_and_endings_have_a_time_that_never_goes_back_and_nothing_else_has_one(log: Transcript) -> None:
    raw = log.sent(Step.OFFER, {"a": b"offer"}, AT) + log.received(Step.OFFER, "a", b"advert")
    raw += log.sent(Step.ROSTER, {"a": b"roster"}, AT - 5) + log.checkpoint(KEY)
    log.begin(PLAN)
    raw += log.ended(KEY, ENDINGS[0], AT + 5)
    assert [entry.at for entry in entries(raw)] == [AT, None, AT, None, AT + 5, None]
    assert log.latest == AT + 5


def test_an_entry_of_an_earlier_version_has_no_time_and_the_same_bytes() -> None:
    old = Entry(3, "offer", 0, EVERYONE, b"offer")
    leaf = ENTRY.encode(old)
    assert ENTRY.decode(leaf) == old
    assert ENTRY.decode(leaf + AT.to_bytes(4, "big")) == replace(old, at=AT)
    for left in (1, 3, 5, 8):
        with pytest.raises(ProtocolError):
            ENTRY.decode(leaf + bytes(left))


def assignment(encrypted_shares: dict[str, EncryptedShares]) -> bytes:
    return envelope.sign(KEY, Assignment(PLAN, encrypted_shares))


def test_of_assignments_with_shares_the_first_is_logged_and_the_others_without_body(log: Transcript) -> None:
    encrypted = EncryptedShares(b"sealed", (bytes(range(16)),))
    bodies = {
        "a": assignment({"b": encrypted}),
        "b": assignment({"a": encrypted}),
        "c": assignment({}),
        "d": assignment({}),
    }
    log.begin(PLAN)
    first, second, rest = entries(log.sent(Step.PLAN, bodies, AT))
    assert (first.peer, first.message) == ("a", bodies["a"])
    assert (second.peer, second.message) == ("b", envelope.with_body(bodies["b"], b""))
    assert envelope.with_body(second.message, envelope.unverified_body(bodies["b"])) == bodies["b"]
    assert (rest.peer, rest.message) == (EVERYONE, bodies["c"])
    assert {entry.round for entry in (first, second, rest)} == {2}


def test_a_single_assignment_without_shares_is_logged_complete(log: Transcript) -> None:
    bodies = {"a": assignment({"b": EncryptedShares(b"sealed", (bytes(range(16)),))}), "b": assignment({})}
    log.begin(PLAN)
    assert [entry.message for entry in entries(log.sent(Step.PLAN, bodies, AT))] == list(bodies.values())


def test_the_assignment_of_a_single_device_is_logged_under_its_name(log: Transcript) -> None:
    log.begin(PLAN)
    (entry,) = entries(log.sent(Step.PLAN, {"a": assignment({})}, AT))
    assert entry.peer == "a"
    (entry,) = entries(log.sent(Step.SURVIVORS, {"a": b"one set"}, AT))
    assert entry.peer == EVERYONE


def test_different_messages_to_devices_show_in_the_log(log: Transcript) -> None:
    found = entries(log.sent(Step.SURVIVORS, {"a": b"one set", "b": b"another"}, AT))
    assert [entry.message for entry in found] == [b"one set", b"another"]


def test_of_a_masked_input_the_signed_header_is_logged(log: Transcript) -> None:
    header = MaskedInput(bytes(32), "a", bytes(32))
    body = envelope.sign_vector(KEY, header, b"packed")
    (entry,) = entries(log.received(Step.PLAN, "a", body))
    assert envelope.open_verified(MaskedInput, entry.message, KEY.public, "a") == header
    assert packed_vector(body) == b"packed"


@pytest.mark.parametrize("step", [step for step in Step if step not in (Step.CHECK_IN, Step.PLAN)])
def test_every_other_answer_is_logged_as_it_arrived(log: Transcript, step: Step) -> None:
    (entry,) = entries(log.received(step, "a", b"answer"))
    assert (entry.kind, entry.peer, entry.message) == (ANSWERS[step].TAG, "a", b"answer")


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_round_ends_with_a_signed_ending_and_a_checkpoint(log: Transcript, ending: Result | Abort) -> None:
    log.begin(PLAN)
    ended, checkpoint = entries(log.ended(KEY, ending, AT))
    assert envelope.open_verified(type(ending), ended.message, KEY.public, "coordinator") == ending
    assert (ended.round, checkpoint.round) == (2, 2)


def test_a_checkpoint_signs_the_entries_before_it(log: Transcript) -> None:
    before = log.sent(Step.OFFER, {"a": b"offer"}, AT) + log.received(Step.OFFER, "a", b"advert")
    *_, entry = entries(before + log.checkpoint(KEY, Stage.CLOSED))
    found = envelope.open_verified(Checkpoint, entry.message, KEY.public, "coordinator")
    assert (found.offer, found.size, found.stage, found.previous) == (OFFER, 2, Stage.CLOSED, NO_SESSION)
    leaves = [ENTRY.encode(leaf) for leaf in entries(before)]
    verify_inclusion(found.root, 2, 1, leaves[1], log.tree.inclusion(1, 2))
    verify_consistency(found.root, 2, log.tree.root(), 3, log.tree.consistency(2))


def test_a_resumed_log_continues_where_it_stopped(fleet_of: FleetOf) -> None:
    offering, offer = fleet_of(3).offer()
    log = Transcript(offering.offer, START, bytes([7]) * 32)
    raw = log.sent(Step.OFFER, {"a": offer}, AT)
    raw += log.checkpoint(KEY)
    log.begin(replace(PLAN, round=1))
    raw += log.sent(Step.PLAN, dict.fromkeys("ab", envelope.sign(KEY, Assignment(replace(PLAN, round=1), {}))), AT)
    raw += log.ended(KEY, Abort(replace(PLAN, round=1).digest(), "too-few"), AT)
    log.begin(PLAN)
    raw += log.sent(Step.PLAN, dict.fromkeys("ab", envelope.sign(KEY, Assignment(PLAN, {}))), AT)
    body = envelope.sign(KEY, MaskedInput(PLAN.digest(), "a", bytes(32)))
    raw += log.received(Step.PLAN, "a", b"vector" + body + len(body).to_bytes(4, "big"))
    raw += log.received(Step.SURVIVORS, "a", b"consistency-signature")
    again = resume(entries(raw), START, log.previous)
    assert (again.round, again.plan, again.tree.root()) == (2, PLAN.digest(), log.tree.root())
    assert (again.endings, again.checkpoints, again.contributions) == (log.endings, log.checkpoints, log.contributions)
    assert [leaf.message for leaf in map(ENTRY.decode, (leaf for _, leaf in again.contributions["a"][1]))] == [
        body,
        b"consistency-signature",
    ]
    assert again.checkpoint(KEY) == log.checkpoint(KEY)


def test_a_log_without_an_offer_cannot_be_resumed(log: Transcript) -> None:
    with pytest.raises(ProtocolError):
        resume(entries(log.received(Step.OFFER, "a", b"advert")), START, log.previous)


@given(st.binary(max_size=300), st.booleans())
def test_reading_any_bytes_ends_in_a_reading(raw: bytes, headed: bool) -> None:
    given_bytes = MAGIC + raw if headed else raw
    reading = read(given_bytes)
    assert reading.end <= len(given_bytes)
    assert bool(reading.problem) == (reading.end < len(given_bytes) or not given_bytes)
    assert write(reading.entries)[len(MAGIC) :] == given_bytes[len(MAGIC) : reading.end]


def test_equal_entries_are_equal_bytes(log: Transcript) -> None:
    raw = MAGIC + log.sent(Step.OFFER, {"a": b"offer"}, AT) + log.received(Step.OFFER, "a", b"advert")
    assert write(read(raw).entries) == raw
    for at in range(len(raw)):
        for mask in range(1, 256):
            other = raw[:at] + bytes([raw[at] ^ mask]) + raw[at + 1 :]
            reading = read(other)
            assert reading.end == 0 if at < len(MAGIC) else write(reading.entries) == other[: reading.end]


@pytest.mark.parametrize("cut", range(1, 30))
def test_a_torn_last_entry_ends_the_reading_before_it(log: Transcript, cut: int) -> None:
    whole = MAGIC + log.received(Step.OFFER, "a", b"advert")
    reading = read((whole + log.received(Step.OFFER, "b", b"advert"))[:-cut])
    assert reading.end == len(whole)
    assert "in entry 1" in reading.problem
    assert [entry.peer for entry in reading.entries] == ["a"]


def test_a_length_over_the_limit_is_refused_before_it_is_read(log: Transcript) -> None:
    assert "entry 0" in read(MAGIC + b"\xff\xff\xff\xff").problem


@pytest.mark.parametrize("message", [*ENDINGS, Checkpoint(OFFER, 3, bytes(32), bytes(32), *START, Stage.OPEN)])
def test_messages_of_the_log_have_one_encoding(message: Any) -> None:
    raw = message.encode()
    assert type(message).decode(raw) == message
    assert len(raw) < message.LIMIT
    with pytest.raises(ProtocolError):
        type(message).decode(raw + b"\x00")


def test_the_coordinators_result_names_the_sum_by_digest(fleet_of: FleetOf) -> None:
    fleet = fleet_of(4)
    _, result = fleet.round(fleet.establish())
    whole = {segment.name: result.values[segment.name] for segment in fleet.spec.vector.segments}
    steps = [whole[segment.name] / fleet.spec.vector.step(segment) for segment in fleet.spec.vector.segments]
    packed = ring.pack(np.concatenate(steps).astype(np.int64).astype(np.uint32), fleet.spec.vector.ring_bits)
    assert result.digest == hashlib.sha256(packed).digest()
