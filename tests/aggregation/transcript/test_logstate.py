"""Receipts and session chain proofs: a device continues only with a log that extends what it saw."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation import envelope
from aggregation.errors import ProtocolError
from aggregation.steps import Step
from aggregation.transcript.entries import Abort, AdapterId, Checkpoint, Stage
from aggregation.transcript.log import NO_SESSION
from aggregation.transcript.logstate import LOG_STATE, RECEIPT, SESSION_CHAIN_PROOF, LogState, session_chain_proof
from tests.support import bits_flipped, refused
from tests.support.logs import (
    KEY,
    ME,
    OFFERS,
    OTHER,
    SEED,
    STRANGER,
    LoggedSession,
    chain,
    chain_proof,
    digest,
    joined,
    log_of,
    plan,
    result,
    seen,
    took_part,
)


def assert_refused(log_state: LogState, raw: bytes, about: str) -> None:
    with refused(ProtocolError, about):
        log_state.on_receipt(KEY.public, raw)


@pytest.mark.parametrize("rounds", [1, 2, 3, 7])
def test_a_log_that_grew_and_holds_the_round_is_accepted(rounds: int) -> None:
    after = seen(rounds).on_receipt(KEY.public, log_of(rounds).receipt())
    size = max(log_of(rounds).log.checkpoints)
    log = log_of(rounds).log
    assert after == LogState(ME, OFFERS[1], NO_SESSION, *log.newest, size, log.tree.root(size))


def test_before_its_first_round_a_device_accepts_the_log_as_it_is() -> None:
    assert joined(LoggedSession()).on_receipt(KEY.public, LoggedSession().receipt()).size == 2


def test_the_same_receipt_is_accepted_twice() -> None:
    after = seen(2).on_receipt(KEY.public, log_of(2).receipt())
    assert after.on_receipt(KEY.public, log_of(2).receipt()) == after


@pytest.mark.parametrize("missed", [1, 3])
def test_a_device_that_missed_rounds_is_shown_the_end_of_its_last_one(missed: int) -> None:
    session = log_of(2)
    for number in range(3, 3 + missed):
        session.round(number, without=(Step.PLAN, Step.SURVIVORS))
    seen(2).on_receipt(KEY.public, session.receipt())


@pytest.mark.parametrize("missed", [1, 3])
def test_a_device_whose_answers_did_not_arrive_is_shown_the_end_of_its_last_round(missed: int) -> None:
    """Its messages of the round are not in the log, and it does not require them."""
    session, log_state = log_of(1), seen(1)
    for number in range(2, 2 + missed):
        log_state = took_part(log_state.on_receipt(KEY.public, session.receipt()), number, Step.PLAN)
        others = result(number, number + 1, (OTHER,))
        session.round(number, without=(Step.PLAN, Step.SURVIVORS), ending=others)
    log_state.on_receipt(KEY.public, session.receipt())


def test_an_unconfirmed_signature_is_not_required_but_the_masked_input_is() -> None:
    log_state = took_part(joined(LoggedSession()).on_receipt(KEY.public, LoggedSession().receipt()), 1, Step.SURVIVORS)
    log_state.on_receipt(KEY.public, LoggedSession().round(1, without=(Step.SURVIVORS,)).receipt())
    assert_refused(
        log_state, LoggedSession().round(1, without=(Step.PLAN, Step.SURVIVORS)).receipt(), "receipt.contributions"
    )


def test_an_abort_is_accepted_as_the_end_of_a_round() -> None:
    session = log_of(1).round(2, ending=Abort(plan(2).digest(), "too-few"))
    seen(2).on_receipt(KEY.public, session.receipt())


def test_a_summed_input_must_be_in_the_log_even_if_the_device_saw_no_survivors() -> None:
    log_state = took_part(joined(LoggedSession()).on_receipt(KEY.public, LoggedSession().receipt()), 1, Step.PLAN)
    log_state.on_receipt(KEY.public, LoggedSession().round(1).receipt())
    assert_refused(
        log_state, LoggedSession().round(1, without=(Step.PLAN, Step.SURVIVORS)).receipt(), "receipt.contributions"
    )


def test_an_entry_that_is_not_in_the_log_is_refused() -> None:
    genuine, forged = (RECEIPT.decode(log_of(3, advert=advert).receipt()) for advert in (b"advert", b"another"))
    for mixed in (replace(genuine, endings=forged.endings), replace(genuine, contributions=forged.contributions)):
        assert_refused(seen(3), RECEIPT.encode(mixed), "log.inclusion")


def test_another_session_or_another_coordinator_is_refused() -> None:
    assert_refused(seen(3), log_of(3, offer=OFFERS[2]).receipt(), "receipt.session")
    assert_refused(seen(3), log_of(3, previous=OFFERS[2]).receipt(), "receipt.session")
    assert_refused(seen(3), log_of(3, key=STRANGER).receipt(), "signature")


def for_one(log_state: LogState, receipt: bytes) -> bytes:
    """A receipt without the consistency proofs for devices that saw another checkpoint last."""
    genuine = RECEIPT.decode(receipt)
    return RECEIPT.encode(replace(genuine, consistency={log_state.size: genuine.consistency[log_state.size]}))


def test_a_flipped_bit_in_what_a_device_checks_is_refused() -> None:
    log_state = seen(3)
    raw = for_one(log_state, log_of(3).receipt())
    log_state.on_receipt(KEY.public, raw)
    for changed in bits_flipped(raw):
        with pytest.raises(ProtocolError):
            log_state.on_receipt(KEY.public, changed)


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


def test_a_log_state_round_trips() -> None:
    for log_state in (joined(LoggedSession()), seen(3), took_part(seen(1), 2, Step.PLAN)):
        assert LOG_STATE.decode(LOG_STATE.encode(log_state)) == log_state


# From session to session


@pytest.mark.parametrize("sessions", [2, 3, 8])
def test_a_chain_proof_leads_from_the_last_session_to_the_new_one(sessions: int) -> None:
    logged, closed = chain(sessions)
    after = seen(2).on_session_chain_proof(KEY.public, chain_proof(logged, closed), OFFERS[sessions])
    assert after == LogState(ME, OFFERS[sessions], digest(closed[-1]), *logged[-1].log.newest)
    after.on_receipt(KEY.public, logged[-1].receipt())


def test_a_session_closed_before_its_first_round_is_part_of_the_chain() -> None:
    logged, closed = chain(2, rounds=0)
    joined(LoggedSession()).on_session_chain_proof(KEY.public, chain_proof(logged, closed), OFFERS[2])


def assert_chain_refused(log_state: LogState, raw: bytes, offer: bytes, about: str) -> None:
    with refused(ProtocolError, about):
        log_state.on_session_chain_proof(KEY.public, raw, offer)


def test_a_session_that_is_left_out_is_missed() -> None:
    logged, closed = chain(4)
    assert_chain_refused(
        seen(2), session_chain_proof(logged[-1].log, KEY, logged[0].receipt(), closed[2:]), OFFERS[4], "proof.closed"
    )
    assert_chain_refused(
        seen(2), session_chain_proof(logged[-1].log, KEY, logged[0].receipt(), closed[1:2]), OFFERS[4], "proof.previous"
    )


def test_a_session_that_is_not_closed_is_refused() -> None:
    logged, _ = chain(2)
    open_ = log_of(2)
    assert_chain_refused(seen(2), session_chain_proof(logged[-1].log, KEY, open_.receipt()), OFFERS[2], "proof.stage")
    logged, _ = chain(3)
    half = LoggedSession(OFFERS[2], logged[0].end, start=logged[0].log.newest).log.checkpoints[2]
    assert_chain_refused(
        seen(2), session_chain_proof(logged[-1].log, KEY, logged[0].receipt(), [half]), OFFERS[3], "proof.stage"
    )


def test_a_chain_proof_must_prove_what_a_receipt_must_prove() -> None:
    logged, closed = chain(2)
    for advert, about in ((b"another", "log.consistency"), (b"advert", "receipt.endings")):
        old = log_of(1 if advert == b"advert" else 2, advert=advert)
        old.close()
        fresh = LoggedSession(OFFERS[2], old.end, start=old.log.newest)
        assert_chain_refused(seen(2), session_chain_proof(fresh.log, KEY, old.receipt()), OFFERS[2], about)
    assert_chain_refused(seen(2), session_chain_proof(logged[-1].log, KEY), OFFERS[2], "proof.receipt")
    seen(2).on_session_chain_proof(KEY.public, chain_proof(logged, closed), OFFERS[2])


def test_a_start_checkpoint_of_another_session_is_refused() -> None:
    logged, closed = chain(3)
    assert_chain_refused(seen(2), chain_proof(logged, closed), OFFERS[4], "proof.start")
    with refused(ProtocolError, "proof.start", peer="coordinator"):
        LogState.initial(KEY.public, chain_proof(logged, closed), OFFERS[4], ME)


@pytest.mark.parametrize(
    "change",
    [lambda c: replace(c, size=3), lambda c: replace(c, stage=Stage.CLOSED), lambda c: replace(c, offer=OFFERS[5])],
)
def test_a_checkpoint_of_a_log_that_has_begun_is_not_a_start(change: Callable[[Checkpoint], Checkpoint]) -> None:
    logged, _ = chain(2)
    given_ = SESSION_CHAIN_PROOF.decode(session_chain_proof(logged[-1].log, KEY))
    response = change(Checkpoint.decode(envelope.unverified_body(given_.start)))
    raw = SESSION_CHAIN_PROOF.encode(replace(given_, start=envelope.sign(KEY, response)))
    with refused(ProtocolError, "proof.start", peer="coordinator"):
        LogState.initial(KEY.public, raw, OFFERS[2], ME)


def test_a_flipped_bit_in_a_chain_proof_is_refused() -> None:
    logged, closed = chain(3)
    genuine, log_state = SESSION_CHAIN_PROOF.decode(chain_proof(logged, closed)), seen(2)
    raw = SESSION_CHAIN_PROOF.encode(replace(genuine, receipt=for_one(log_state, genuine.receipt)))
    log_state.on_session_chain_proof(KEY.public, raw, OFFERS[3])
    for changed in bits_flipped(raw):
        with pytest.raises(ProtocolError):
            log_state.on_session_chain_proof(KEY.public, changed, OFFERS[3])


# The newest adapter


def test_a_checkpoint_names_the_newest_adapter() -> None:
    session = log_of(2).round(3, ending=Abort(plan(3).digest(), "too-few"))
    named = [Checkpoint.decode(envelope.unverified_body(raw)).newest for raw in session.log.checkpoints.values()]
    assert named == [SEED, result(1, 2).produced, result(2, 3).produced, result(2, 3).produced]
    start = SESSION_CHAIN_PROOF.decode(session_chain_proof(session.log, KEY)).start
    assert Checkpoint.decode(envelope.unverified_body(start)).newest == SEED
    assert joined(session).newest == SEED


OLDER, BY_HAND, AHEAD = SEED, (3, "ee" * 32), result(3, 4).produced


@pytest.mark.parametrize("named", [OLDER, BY_HAND, AHEAD])
def test_a_checkpoint_that_names_another_adapter_than_the_results_is_refused(named: AdapterId) -> None:
    session = log_of(2)
    session.log.produced = named
    session.log.checkpoint(KEY)
    assert_refused(seen(2), session.receipt(), "receipt.adapter")


@pytest.mark.parametrize("versions", [(4,), (3, 3), (1,)])
def test_results_that_skip_or_repeat_a_version_are_refused(versions: tuple[int, ...]) -> None:
    """The last round that the device knows made version 2."""
    session, ending = log_of(1), 2
    for version in versions:
        made = replace(result(ending, version), adapter=f"{ending:064x}")
        session.round(ending, ending=made, without=() if ending == 2 else (Step.PLAN, Step.SURVIVORS))
        ending += 1
    assert_refused(seen(2), session.receipt(), "receipt.adapter")


@pytest.mark.parametrize("start", [OLDER, BY_HAND])
def test_a_missed_session_that_goes_back_or_replaces_an_adapter_is_refused(start: AdapterId) -> None:
    logged, _ = chain(2)
    missed = LoggedSession(OFFERS[2], logged[0].end, start=start)
    closed = missed.close()
    fresh = LoggedSession(OFFERS[3], missed.end, start=start)
    raw = session_chain_proof(fresh.log, KEY, logged[0].receipt(), [closed])
    assert_chain_refused(seen(2), raw, OFFERS[3], "proof.adapter")


@pytest.mark.parametrize("start", [AHEAD, BY_HAND, OLDER])
def test_only_on_another_base_may_a_session_start_from_a_newer_adapter_that_the_log_did_not_make(
    start: AdapterId,
) -> None:
    logged, _ = chain(2)
    fresh = LoggedSession(OFFERS[2], logged[0].end, start=start)
    raw = session_chain_proof(fresh.log, KEY, logged[0].receipt())
    assert_chain_refused(seen(2), raw, OFFERS[2], "proof.adapter")
    if start == AHEAD:
        assert seen(2).on_session_chain_proof(KEY.public, raw, OFFERS[2], other_base=True).newest == start
    else:
        with refused(ProtocolError, "proof.adapter"):
            seen(2).on_session_chain_proof(KEY.public, raw, OFFERS[2], other_base=True)
