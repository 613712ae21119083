"""Receipts and passages: a device goes on only with a log that begins with what it saw and holds what it did."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregation import envelope, transcript
from aggregation.errors import ProtocolError
from aggregation.messages import ConsistencySignature, MaskedInput, Plan
from aggregation.pki.identity import IdentityKey
from aggregation.steps import Step
from aggregation.transcript import (
    LOG_STATE,
    NO_SESSION,
    RECEIPT,
    SESSION_CHAIN_PROOF,
    Abort,
    Checkpoint,
    LogState,
    Result,
    Stage,
    Transcript,
    session_chain_proof,
)
from tests.support import refused

KEY, STRANGER, DEVICE = IdentityKey(bytes(range(32))), IdentityKey(bytes(32)), IdentityKey(bytes([1]) * 32)
ME, OTHER = "a", "b"
OFFERS = [bytes([number]) * 32 for number in range(9)]
COUNTED = (ME, OTHER)


def plan(round_: int) -> Plan:
    return Plan(bytes(32), round_, COUNTED, round_, "ab" * 32, b"")


def said(message: MaskedInput | ConsistencySignature, key: IdentityKey = DEVICE) -> bytes:
    return envelope.sign(key, message)


def masked(round_: int) -> bytes:
    return said(MaskedInput(plan(round_).digest(), ME, bytes(32)))


def agreed(round_: int) -> bytes:
    return said(ConsistencySignature(plan(round_).digest(), ME))


@dataclass
class Session:
    """A coordinator's log of one session, and what the device ``ME`` keeps of it."""

    offer: bytes = OFFERS[1]
    previous: bytes = NO_SESSION
    word: bytes = b"advert"
    key: IdentityKey = KEY
    log: Transcript = field(init=False)

    def __post_init__(self) -> None:
        self.log = Transcript(self.offer, self.previous)
        self.log.sent(Step.OFFER, dict.fromkeys(COUNTED, b"offer"))
        self.log.received(Step.OFFER, ME, self.word)
        self.log.checkpoint(self.key)

    def round(self, number: int, *, without: tuple[Step, ...] = (), ending: Result | Abort | None = None) -> "Session":
        self.log.begin(plan(number))
        self.log.sent(Step.PLAN, dict.fromkeys(COUNTED, b"plan"))
        if Step.PLAN not in without:
            self.log.received(Step.PLAN, ME, masked(number) + len(masked(number)).to_bytes(4, "big"))
        if Step.SURVIVORS not in without:
            self.log.received(Step.SURVIVORS, ME, agreed(number))
        self.log.ended(self.key, ending or Result(plan(number).digest(), COUNTED, bytes(32), number + 1, "cd" * 32))
        return self

    def receipt(self) -> bytes:
        return transcript.receipts(self.log, [ME])[ME]

    def close(self) -> bytes:
        """Close the log; its last checkpoint, signed."""
        self.log.checkpoint(self.key, Stage.CLOSED)
        return self.log.checkpoints[max(self.log.checkpoints)]

    @property
    def end(self) -> bytes:
        return digest(self.log.checkpoints[max(self.log.checkpoints)])


def digest(signed: bytes) -> bytes:
    return Checkpoint.decode(envelope.unverified_body(signed)).digest()


def took_part(log_state: LogState, round_: int, upto: Step = Step.UNMASK) -> LogState:
    """After the device answered a round's steps up to this one."""
    log_state = log_state.contributed(plan(round_).digest(), masked(round_))
    if upto is not Step.PLAN:
        log_state = log_state.on_survivors(COUNTED, agreed(round_))
    return log_state.on_survivors(COUNTED) if upto is Step.UNMASK else log_state


def joined(session: Session) -> LogState:
    return LogState.initial(KEY.public, session_chain_proof(session.log, KEY), session.offer, ME)


def seen(rounds: int) -> LogState:
    """What the device keeps that took part in so many rounds and saw all but the end of the last one."""
    session, log_state = Session(), joined(Session())
    for number in range(1, rounds + 1):
        log_state = took_part(log_state.on_receipt(KEY.public, session.receipt()), number)
        session.round(number)
    return log_state


def log_of(rounds: int, **changes: object) -> Session:
    session = Session(**changes)  # type: ignore[arg-type]
    for number in range(1, rounds + 1):
        session.round(number)
    return session


def assert_refused(log_state: LogState, raw: bytes, about: str) -> None:
    with refused(ProtocolError, about):
        log_state.on_receipt(KEY.public, raw)


@pytest.mark.parametrize("rounds", [1, 2, 3, 7])
def test_a_log_that_grew_and_holds_the_round_is_accepted(rounds: int) -> None:
    after = seen(rounds).on_receipt(KEY.public, log_of(rounds).receipt())
    size = max(log_of(rounds).log.checkpoints)
    assert after == LogState(ME, OFFERS[1], NO_SESSION, size, log_of(rounds).log.tree.root(size))


def test_before_its_first_round_a_device_takes_the_log_as_it_is() -> None:
    assert joined(Session()).on_receipt(KEY.public, Session().receipt()).size == 2


def test_the_same_receipt_twice_is_no_harm() -> None:
    single_use = seen(2).on_receipt(KEY.public, log_of(2).receipt())
    assert single_use.on_receipt(KEY.public, log_of(2).receipt()) == single_use


@pytest.mark.parametrize("missed", [1, 3])
def test_a_device_that_was_not_heard_of_for_some_rounds_is_shown_the_end_of_its_own(missed: int) -> None:
    session = log_of(2)
    for number in range(3, 3 + missed):
        session.round(number, without=(Step.PLAN, Step.SURVIVORS))
    seen(2).on_receipt(KEY.public, session.receipt())


@pytest.mark.parametrize("missed", [1, 3])
def test_a_device_whose_answers_were_lost_is_shown_the_end_of_the_round_that_it_knows_of(missed: int) -> None:
    """It contributed to a round and nobody heard: no message of it is in the log, and it demands none."""
    session, log_state = log_of(1), seen(1)
    for number in range(2, 2 + missed):
        log_state = took_part(log_state.on_receipt(KEY.public, session.receipt()), number, Step.PLAN)
        others = Result(plan(number).digest(), (OTHER,), bytes(32), number + 1, "cd" * 32)
        session.round(number, without=(Step.PLAN, Step.SURVIVORS), ending=others)
    log_state.on_receipt(KEY.public, session.receipt())


def test_an_agreement_that_nobody_heard_is_not_demanded_but_the_masked_input_is() -> None:
    log_state = took_part(joined(Session()).on_receipt(KEY.public, Session().receipt()), 1, Step.SURVIVORS)
    log_state.on_receipt(KEY.public, Session().round(1, without=(Step.SURVIVORS,)).receipt())
    assert_refused(
        log_state, Session().round(1, without=(Step.PLAN, Step.SURVIVORS)).receipt(), "receipt.contributions"
    )


def test_an_aborted_round_is_an_end() -> None:
    session = log_of(1).round(2, ending=Abort(plan(2).digest(), "too-few"))
    seen(2).on_receipt(KEY.public, session.receipt())


def test_an_input_that_is_counted_is_in_the_log_even_if_the_device_was_not_told() -> None:
    log_state = took_part(joined(Session()).on_receipt(KEY.public, Session().receipt()), 1, Step.PLAN)
    log_state.on_receipt(KEY.public, Session().round(1).receipt())
    assert_refused(
        log_state, Session().round(1, without=(Step.PLAN, Step.SURVIVORS)).receipt(), "receipt.contributions"
    )


def test_other_survivors_than_the_device_was_told_are_refused() -> None:
    others = Result(plan(1).digest(), (ME,), bytes(32), 2, "cd" * 32)
    assert_refused(seen(1), Session().round(1, ending=others).receipt(), "receipt.survivors")


def test_the_end_of_another_round_is_refused() -> None:
    assert_refused(seen(2), log_of(1).receipt(), "receipt.endings")


def test_an_entry_that_is_not_in_the_log_is_refused() -> None:
    genuine, forged = (RECEIPT.decode(log_of(3, word=word).receipt()) for word in (b"advert", b"another"))
    for mixed in (replace(genuine, endings=forged.endings), replace(genuine, contributions=forged.contributions)):
        assert_refused(seen(3), RECEIPT.encode(mixed), "log.inclusion")


def test_another_session_or_another_coordinator_is_refused() -> None:
    assert_refused(seen(3), log_of(3, offer=OFFERS[2]).receipt(), "receipt.session")
    assert_refused(seen(3), log_of(3, previous=OFFERS[2]).receipt(), "receipt.session")
    assert_refused(seen(3), log_of(3, key=STRANGER).receipt(), "signature")


@settings(deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_in_what_a_device_checks_is_refused(place: float, bit: int) -> None:
    genuine, log_state = RECEIPT.decode(log_of(3).receipt()), seen(3)
    needed = replace(genuine, consistency={log_state.size: genuine.consistency[log_state.size]})
    raw = bytearray(RECEIPT.encode(needed))
    raw[int(place * len(raw))] ^= 1 << bit
    with pytest.raises(ProtocolError):
        log_state.on_receipt(KEY.public, bytes(raw))


@given(st.binary(max_size=300))
def test_any_bytes_are_refused(raw: bytes) -> None:
    with pytest.raises(ProtocolError):
        seen(1).on_receipt(KEY.public, raw)
    with pytest.raises(ProtocolError):
        seen(1).on_session_chain_proof(KEY.public, raw, OFFERS[2])
    with pytest.raises(ProtocolError):
        LogState.initial(KEY.public, raw, OFFERS[2], ME)


def test_a_receipt_of_a_long_session_is_small() -> None:
    assert len(log_of(64).receipt()) < 40_000


def test_a_witness_comes_back_from_its_bytes() -> None:
    for log_state in (joined(Session()), seen(3), took_part(seen(1), 2, Step.PLAN)):
        assert LOG_STATE.decode(LOG_STATE.encode(log_state)) == log_state


# From session to session


def chain(sessions: int, *, rounds: int = 2) -> tuple[list[Session], list[bytes]]:
    """Sessions one after the other, all closed but the last, which has just begun; and their last checkpoints."""
    made, closed = list[Session](), list[bytes]()
    for number in range(1, sessions + 1):
        previous = made[-1].end if made else NO_SESSION
        made.append(Session(OFFERS[number], previous))
        if number < sessions:
            for round_ in range(1, rounds + 1):
                made[-1].round(round_)
            closed.append(made[-1].close())
    return made, closed


def way(sessions: list[Session], closed: list[bytes]) -> bytes:
    """From the first session, in which the device took part, to the last."""
    return session_chain_proof(sessions[-1].log, KEY, sessions[0].receipt(), closed[1:])


@pytest.mark.parametrize("sessions", [2, 3, 8])
def test_a_device_is_led_from_its_last_session_to_the_new_one(sessions: int) -> None:
    made, closed = chain(sessions)
    after = seen(2).on_session_chain_proof(KEY.public, way(made, closed), OFFERS[sessions])
    assert after == LogState(ME, OFFERS[sessions], digest(closed[-1]))
    after.on_receipt(KEY.public, made[-1].receipt())


def test_a_session_that_was_closed_before_a_round_leads_on() -> None:
    made, closed = chain(2, rounds=0)
    joined(Session()).on_session_chain_proof(KEY.public, way(made, closed), OFFERS[2])


def assert_chain_refused(log_state: LogState, raw: bytes, offer: bytes, about: str) -> None:
    with refused(ProtocolError, about):
        log_state.on_session_chain_proof(KEY.public, raw, offer)


def test_a_session_that_is_left_out_is_missed() -> None:
    made, closed = chain(4)
    assert_chain_refused(
        seen(2), session_chain_proof(made[-1].log, KEY, made[0].receipt(), closed[2:]), OFFERS[4], "proof.closed"
    )
    assert_chain_refused(
        seen(2), session_chain_proof(made[-1].log, KEY, made[0].receipt(), closed[1:2]), OFFERS[4], "proof.previous"
    )


def test_a_session_that_is_not_closed_leads_nowhere() -> None:
    made, _ = chain(2)
    open_ = log_of(2)
    assert_chain_refused(seen(2), session_chain_proof(made[-1].log, KEY, open_.receipt()), OFFERS[2], "proof.stage")
    made, _ = chain(3)
    half = Session(OFFERS[2], made[0].end).log.checkpoints[2]
    assert_chain_refused(
        seen(2), session_chain_proof(made[-1].log, KEY, made[0].receipt(), [half]), OFFERS[3], "proof.stage"
    )


def test_what_a_receipt_must_prove_a_passage_must_prove_too() -> None:
    made, closed = chain(2)
    for word, about in ((b"another", "log.consistency"), (b"advert", "receipt.endings")):
        old = log_of(1 if word == b"advert" else 2, word=word)
        old.close()
        fresh = Session(OFFERS[2], old.end)
        assert_chain_refused(seen(2), session_chain_proof(fresh.log, KEY, old.receipt()), OFFERS[2], about)
    assert_chain_refused(
        seen(2),
        session_chain_proof(made[-1].log, KEY),
        OFFERS[2],
        "proof.receipt",
    )
    seen(2).on_session_chain_proof(KEY.public, way(made, closed), OFFERS[2])


def test_an_opening_of_another_session_is_refused() -> None:
    made, closed = chain(3)
    assert_chain_refused(seen(2), way(made, closed), OFFERS[4], "proof.start")
    with refused(ProtocolError, "proof.start"):
        LogState.initial(KEY.public, way(made, closed), OFFERS[4], ME)


@pytest.mark.parametrize(
    "change",
    [lambda c: replace(c, size=3), lambda c: replace(c, stage=Stage.CLOSED), lambda c: replace(c, offer=OFFERS[5])],
)
def test_a_checkpoint_of_a_log_that_has_begun_is_no_opening(change: Callable[[Checkpoint], Checkpoint]) -> None:
    made, _ = chain(2)
    given_ = SESSION_CHAIN_PROOF.decode(session_chain_proof(made[-1].log, KEY))
    opening = change(Checkpoint.decode(envelope.unverified_body(given_.start)))
    raw = SESSION_CHAIN_PROOF.encode(replace(given_, start=envelope.sign(KEY, opening)))
    with refused(ProtocolError, "proof.start"):
        LogState.initial(KEY.public, raw, OFFERS[2], ME)


@settings(deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_in_a_passage_is_refused(place: float, bit: int) -> None:
    made, closed = chain(3)
    raw, log_state = bytearray(way(made, closed)), seen(2)
    given_ = SESSION_CHAIN_PROOF.decode(bytes(raw))
    inner = RECEIPT.decode(given_.receipt)
    needed = replace(inner, consistency={log_state.size: inner.consistency[log_state.size]})
    raw = bytearray(SESSION_CHAIN_PROOF.encode(replace(given_, receipt=RECEIPT.encode(needed))))
    raw[int(place * len(raw))] ^= 1 << bit
    with pytest.raises(ProtocolError):
        log_state.on_session_chain_proof(KEY.public, bytes(raw), OFFERS[3])
