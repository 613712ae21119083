"""A log that is rewritten, forked or truncated, or omits a device's messages; withheld proofs; replayed offers.

The coordinator holds its own key, so it can sign any log, but it cannot make a device forget what it saw. Each attack
is also run without the check that stops it, and then succeeds: the device continues.
"""

import pytest

from aggregation.errors import ProtocolError
from aggregation.steps import Step
from aggregation.transcript import logstate, merkle
from aggregation.transcript.entries import Abort
from aggregation.transcript.log import NO_SESSION
from aggregation.transcript.logstate import LogState, session_chain_proof
from tests.support import refused
from tests.support.logs import KEY, ME, OFFERS, OTHER, LoggedSession, chain, chain_proof, log_of, plan, result, seen


def goes_on(log_state: LogState, raw: bytes) -> bool:
    """Whether a device takes part in the next round when its plan comes with this receipt."""
    try:
        log_state.on_receipt(KEY.public, raw)
    except ProtocolError:
        return False
    return True


def joins(log_state: LogState, raw: bytes, offer: bytes) -> bool:
    try:
        log_state.on_session_chain_proof(KEY.public, raw, offer)
    except ProtocolError:
        return False
    return True


def no_check(*_: object) -> None: ...


def test_a_log_rewritten_before_the_checkpoint_that_a_device_saw_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    log_state, rewritten = seen(3), log_of(3, advert=b"another advert").receipt()
    with refused(ProtocolError, "log.consistency", peer="coordinator", value=7):
        seen(2).on_receipt(KEY.public, log_of(2, advert=b"another advert").receipt())
    assert not goes_on(log_state, rewritten)
    monkeypatch.setattr(merkle, "verify_consistency", no_check)
    assert goes_on(log_state, rewritten)


def test_two_devices_that_were_shown_two_logs_never_meet_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, fork = seen(2), log_of(2, advert=b"a forked advert")
    assert goes_on(mine, log_of(2).receipt())
    assert not goes_on(mine, fork.receipt())
    monkeypatch.setattr(merkle, "verify_consistency", no_check)
    assert goes_on(mine, fork.receipt())


def test_a_log_cut_back_to_before_a_devices_last_round_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    log_state, cut = seen(3), log_of(1).receipt()
    assert not goes_on(log_state, cut)
    monkeypatch.setattr(merkle, "verify_consistency", no_check)
    assert not goes_on(log_state, cut)  # nor does it have the end of the round
    monkeypatch.setattr(logstate, "check_last_round", no_check)
    assert not goes_on(log_state, cut)  # and it names an older adapter
    monkeypatch.setattr(logstate, "check_adapter", no_check)
    assert goes_on(log_state, cut)


@pytest.mark.parametrize("omitted", [(Step.PLAN, Step.SURVIVORS), (Step.PLAN,), (Step.SURVIVORS,)])
def test_a_log_without_a_devices_messages_of_its_last_round_is_refused(
    monkeypatch: pytest.MonkeyPatch, omitted: tuple[Step, ...]
) -> None:
    log_state, raw = seen(2), log_of(1).round(2, without=omitted).receipt()
    assert not goes_on(log_state, raw)
    monkeypatch.setattr(logstate, "check_last_round", no_check)
    assert goes_on(log_state, raw)


def test_a_log_with_other_survivors_of_the_round_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum was over both devices; the log names this device alone."""
    log_state = seen(2)
    raw = log_of(1).round(2, ending=result(2, 3, (ME,))).receipt()
    assert not goes_on(log_state, raw)
    monkeypatch.setattr(logstate, "digest_of", lambda devices: bytes(32))
    assert goes_on(LogState(**{**fields(log_state), "survivors": bytes(32)}), raw)


def fields(log_state: LogState) -> dict[str, object]:
    return {name: getattr(log_state, name) for name in LogState.__dataclass_fields__}


def test_the_end_of_another_round_does_not_pass_for_the_withheld_one(monkeypatch: pytest.MonkeyPatch) -> None:
    log_state = seen(2)
    raw = log_of(1).round(2, ending=Abort(plan(1).digest(), "too-few")).receipt()
    assert not goes_on(log_state, raw)
    monkeypatch.setattr(logstate, "check_last_round", no_check)
    assert goes_on(log_state, raw)


def test_a_withheld_proof_is_refused() -> None:
    assert not goes_on(seen(1), b"")
    logged, _ = chain(2)
    assert not joins(seen(2), session_chain_proof(logged[-1].log, KEY), OFFERS[2])
    assert not joins(seen(2), b"", OFFERS[2])


def test_a_recorded_offer_is_refused_although_the_coordinator_signed_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded offers and proofs are replayed to a device that has joined two later sessions."""
    logged, closed = chain(3)
    recorded = {
        1: session_chain_proof(logged[0].log, KEY),  # as sent before any entry was logged
        2: session_chain_proof(logged[1].log, KEY, logged[0].receipt(), []),
    }
    log_state = seen(2).on_session_chain_proof(KEY.public, recorded[2], OFFERS[2])
    for session, old in recorded.items():
        assert not joins(log_state, old, OFFERS[session])
    with refused(ProtocolError, "offer.repeated", peer="coordinator"):
        log_state.on_session_chain_proof(KEY.public, recorded[2], OFFERS[2])
    assert joins(seen(2), chain_proof(logged, closed), OFFERS[3])
    monkeypatch.setattr(
        LogState, "on_session_chain_proof", lambda self, key, raw, offer: LogState.initial(key, raw, offer, ME)
    )
    assert joins(log_state, recorded[1], OFFERS[1])
    assert joins(log_state, recorded[2], OFFERS[2])


def test_a_session_that_went_on_with_others_cannot_be_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """The coordinator ran a session without the device and offers the next one as if there had been none."""
    logged, _ = chain(3)
    hidden = LoggedSession(OFFERS[3], logged[0].end, start=logged[0].log.newest)
    raw = session_chain_proof(logged[-1].log, KEY, logged[0].receipt())
    assert not joins(seen(2), raw, OFFERS[3])
    # It may omit the session from its chain, but then for every device: the devices of that session never continue.
    assert joins(seen(2), session_chain_proof(hidden.log, KEY, logged[0].receipt()), OFFERS[3])
    theirs = LogState(OTHER, OFFERS[2], logged[0].end, *logged[0].log.newest)
    logged[1].close()
    assert not joins(theirs, session_chain_proof(hidden.log, KEY, logged[1].receipt()), OFFERS[3])


def test_a_new_chain_of_sessions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = LoggedSession(OFFERS[2], NO_SESSION)
    old, _ = chain(2)
    raw = session_chain_proof(fresh.log, KEY, old[0].receipt())
    assert not joins(seen(2), raw, OFFERS[2])
