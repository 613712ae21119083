"""Two coordinators with one key, at a takeover: each leads a part of the devices on, as if the other did not exist.

Both logs begin with the same sessions, and both are signed with the key that devices trust. A device follows one of
them only, so that it helps to no sum of the other one. An auditor who has both logs finds the fork; who has one log
only finds nothing (docs/explanation/threat-model.md).
"""

from types import SimpleNamespace
from typing import Any

import pytest

from aggregation.errors import ProtocolError, TrustError
from aggregation.transcript.logstate import LogState, session_chain_proof
from edgeadapt.auditing import auditor
from tests.support import refused
from tests.support.logs import KEY, ME, OFFERS, LoggedSession, chain, joined, result, took_part

FIRST, SECOND, THIRD = OFFERS[2:5]


def forked() -> tuple[LoggedSession, LoggedSession, LoggedSession]:
    """A closed session, and two that follow it: of each coordinator one, with one round and another result."""
    (before, _), _ = chain(2, rounds=1)
    version = before.log.newest[0] + 1
    one, other = (LoggedSession(offer, before.end, start=before.log.newest) for offer in (FIRST, SECOND))
    one.round(1, ending=result(1, version))
    other.round(1, ending=result(1, version, survivors=(ME, "c")))
    return before, one, other


def member(before: LoggedSession, own: LoggedSession) -> LogState:
    """A device that took part in the session before, and then in a round of one of the two."""
    first = LoggedSession(before.offer)
    known = took_part(joined(first).on_receipt(KEY.public, first.receipt()), 1)
    begun = LoggedSession(own.offer, before.end, start=before.log.newest)
    known = known.on_session_chain_proof(
        KEY.public, session_chain_proof(begun.log, KEY, before.receipt(), []), own.offer
    )
    return took_part(known.on_receipt(KEY.public, begun.receipt()), 1)


def joins(known: LogState, raw: bytes) -> bool:
    try:
        known.on_session_chain_proof(KEY.public, raw, THIRD)
    except ProtocolError:
        return False
    return True


@pytest.mark.parametrize("with_the_fork", [False, True])
def test_a_device_never_joins_a_session_after_the_other_coordinators(
    monkeypatch: pytest.MonkeyPatch, with_the_fork: bool
) -> None:
    """Whether the proof names the other session or not."""
    before, one, other = forked()
    known, closed = member(before, one), other.close()
    one.close()
    mine, theirs = (LoggedSession(THIRD, each.end, start=each.log.newest) for each in (one, other))
    assert joins(known, session_chain_proof(mine.log, KEY, one.receipt(), []))
    raw = session_chain_proof(theirs.log, KEY, one.receipt(), [closed] if with_the_fork else [])
    assert not joins(known, raw)
    monkeypatch.setattr(
        LogState, "on_session_chain_proof", lambda self, key, raw, offer: LogState.initial(key, raw, offer, ME)
    )
    assert joins(known, raw)


def test_a_device_answers_no_plan_with_the_log_of_the_other_coordinator() -> None:
    before, one, other = forked()
    known = member(before, one)
    known.on_receipt(KEY.public, one.receipt())
    with refused(ProtocolError, "receipt.session", peer="coordinator"):
        known.on_receipt(KEY.public, other.receipt())


def report(session: LoggedSession, start: Any) -> Any:
    """What ``auditor.chain`` reads of the report on a log."""
    newest = session.log.newest
    return SimpleNamespace(
        previous=session.previous,
        last=session.end,
        start=start,
        newest=newest,
        base="base",
        began=None,
        latest=None,
        closed=True,
    )


def test_an_auditor_who_has_both_logs_finds_the_fork_and_one_who_has_one_does_not() -> None:
    before, one, other = forked()
    reports = {"session 1": report(before, None)}
    reports |= {"session 2": report(one, before.log.newest), "session 3": report(other, before.log.newest)}
    with refused(TrustError, "session", value="session 3"):
        auditor.chain(reports)
    for kept in ("session 2", "session 3"):
        auditor.chain({name: each for name, each in reports.items() if name in ("session 1", kept)})
