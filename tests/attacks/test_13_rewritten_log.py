"""A log that is rewritten, forked or cut, or that leaves a device out; proofs withheld; and offers played again.

The coordinator holds its own key, so it can sign any log. What it cannot do is make a device forget what it saw. Each
attack is also run with the check that it breaks on taken out, and then succeeds: the device goes on.
"""

import runpy
from pathlib import Path

import pytest

from aggregation.errors import ProtocolError
from aggregation.steps import Step
from aggregation.transcript import NO_SESSION, Abort, LogState, Result, logstate, merkle, session_chain_proof
from tests.support import refused

_honest = runpy.run_path(str(Path(__file__).parent.parent / "aggregation" / "test_receipts.py"))
Session, seen, log_of, chain, way, plan = (
    _honest[name] for name in ("Session", "seen", "log_of", "chain", "way", "plan")
)
KEY, ME, OTHER, OFFERS = (_honest[name] for name in ("KEY", "ME", "OTHER", "OFFERS"))


def goes_on(log_state: LogState, raw: bytes) -> bool:
    """Whether a device takes part in the next round with this receipt beside its plan."""
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


def anything(*_: object) -> None:
    """In the place of a check."""


def test_a_log_rewritten_before_the_checkpoint_that_a_device_saw_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    log_state, rewritten = seen(3), log_of(3, word=b"what was never said").receipt()
    with refused(ProtocolError, "log.consistency"):
        seen(2).on_receipt(KEY.public, log_of(2, word=b"what was never said").receipt())
    assert not goes_on(log_state, rewritten)
    monkeypatch.setattr(merkle, "verify_consistency", anything)
    assert goes_on(log_state, rewritten)


def test_two_devices_that_were_shown_two_logs_never_meet_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, fork = seen(2), log_of(2, word=b"to another device")
    assert goes_on(mine, log_of(2).receipt())
    assert not goes_on(mine, fork.receipt())
    monkeypatch.setattr(merkle, "verify_consistency", anything)
    assert goes_on(mine, fork.receipt())


def test_a_log_cut_back_to_before_a_devices_last_round_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    log_state, cut = seen(3), log_of(1).receipt()
    assert not goes_on(log_state, cut)
    monkeypatch.setattr(merkle, "verify_consistency", anything)
    assert not goes_on(log_state, cut)  # nor does it hold the end of the round
    monkeypatch.setattr(logstate, "check_last_round", anything)
    assert goes_on(log_state, cut)


@pytest.mark.parametrize("left_out", [(Step.PLAN, Step.SURVIVORS), (Step.PLAN,), (Step.SURVIVORS,)])
def test_a_log_without_what_a_device_said_in_its_last_round_is_refused(
    monkeypatch: pytest.MonkeyPatch, left_out: tuple[Step, ...]
) -> None:
    log_state, raw = seen(2), log_of(1).round(2, without=left_out).receipt()
    assert not goes_on(log_state, raw)
    monkeypatch.setattr(logstate, "check_last_round", anything)
    assert goes_on(log_state, raw)


def test_a_log_that_says_that_the_round_ended_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum was opened over both; the log says that it was over this device alone."""
    log_state = seen(2)
    raw = log_of(1).round(2, ending=Result(plan(2).digest(), (ME,), bytes(32), 3, "cd" * 32)).receipt()
    assert not goes_on(log_state, raw)
    monkeypatch.setattr(logstate, "digest_of", lambda devices: bytes(32))
    assert goes_on(LogState(**{**fields(log_state), "survivors": bytes(32)}), raw)


def fields(log_state: LogState) -> dict[str, object]:
    return {name: getattr(log_state, name) for name in LogState.__dataclass_fields__}


def test_the_end_of_another_round_does_not_pass_for_the_one_that_is_kept_back(monkeypatch: pytest.MonkeyPatch) -> None:
    log_state = seen(2)
    raw = log_of(1).round(2, ending=Abort(plan(1).digest(), "too-few")).receipt()
    assert not goes_on(log_state, raw)
    monkeypatch.setattr(logstate, "check_last_round", anything)
    assert goes_on(log_state, raw)


def test_a_withheld_proof_is_refused() -> None:
    assert not goes_on(seen(1), b"")
    made, _ = chain(2)
    assert not joins(seen(2), session_chain_proof(made[-1].log, KEY), OFFERS[2])
    assert not joins(seen(2), b"", OFFERS[2])


def test_a_recorded_offer_is_refused_although_it_is_the_coordinators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever recorded offers and passages plays them again, to a device that is two sessions further on."""
    made, closed = chain(3)
    recorded = {
        1: session_chain_proof(made[0].log, KEY),  # as it went out before anything was logged
        2: session_chain_proof(made[1].log, KEY, made[0].receipt(), []),
    }
    log_state = seen(2).on_session_chain_proof(KEY.public, recorded[2], OFFERS[2])
    for session, old in recorded.items():
        assert not joins(log_state, old, OFFERS[session])
    with refused(ProtocolError, "offer.repeated"):
        log_state.on_session_chain_proof(KEY.public, recorded[2], OFFERS[2])
    assert joins(seen(2), way(made, closed), OFFERS[3])
    monkeypatch.setattr(
        LogState, "on_session_chain_proof", lambda self, key, raw, offer: LogState.initial(key, raw, offer, ME)
    )
    assert joins(log_state, recorded[1], OFFERS[1])
    assert joins(log_state, recorded[2], OFFERS[2])


def test_a_session_that_went_on_with_others_cannot_be_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """The coordinator ran a session without the device, and opens the next one as if there had been none."""
    made, _ = chain(3)
    hidden = Session(OFFERS[3], made[0].end)
    raw = session_chain_proof(made[-1].log, KEY, made[0].receipt())
    assert not joins(seen(2), raw, OFFERS[3])
    # It may leave the session out of its own chain, but then it is out for everyone: that one's devices never go on.
    assert joins(seen(2), session_chain_proof(hidden.log, KEY, made[0].receipt()), OFFERS[3])
    theirs = LogState(OTHER, OFFERS[2], made[0].end)
    made[1].close()
    assert not joins(theirs, session_chain_proof(hidden.log, KEY, made[1].receipt()), OFFERS[3])


def test_a_new_start_without_a_past_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = Session(OFFERS[2], NO_SESSION)
    old, _ = chain(2)
    raw = session_chain_proof(fresh.log, KEY, old[0].receipt())
    assert not joins(seen(2), raw, OFFERS[2])
