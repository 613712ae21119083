"""Any change of a log without the coordinator's key is found, and its place is named."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aggregation.errors import TrustError
from aggregation.transcript.entries import ENTRY, MAGIC, Checkpoint, Entry, read, record, write
from edgeadapt.auditing import Check, Problem, Report, Status, audit, checkpoints
from tests.support import refused
from tests.support.sessions import LoggedSession

ENTRIES = 51  # of the fixture's log
QUIET = [HealthCheck.function_scoped_fixture]


def flipped(raw: bytes, at: int, mask: int) -> bytes:
    return raw[:at] + bytes([raw[at] ^ mask]) + raw[at + 1 :]


def first(report: Report) -> int:
    """The place of the earliest failure."""
    earliest = report.failed[0]
    with refused(TrustError, earliest.check.value, value=earliest.text):
        report.require()
    assert earliest.place is not None
    assert str(earliest.place) in earliest.text
    return earliest.place.index


@pytest.mark.parametrize("index", range(ENTRIES))
def test_a_flipped_bit_in_a_message_is_found_in_that_message(logged: LoggedSession, index: int) -> None:
    end = logged.ends()[index]
    damaged = bytearray(logged.raw)
    damaged[end - 70] ^= 1  # in the body, just before the signature
    assert first(logged.audit(bytes(damaged), vectors=False)) == index


@pytest.fixture(scope="module")
def small(logged_of: Any) -> LoggedSession:
    return logged_of([{}], devices=3)  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize("mask", [0x01, 0x80, 0xFF])
def test_no_byte_of_a_log_can_be_flipped(small: LoggedSession, mask: int) -> None:
    """The first check of the audit finds nearly all; what it lets pass is left to the whole audit."""

    def passes(raw: bytes) -> bool:
        try:
            checkpoints(read(raw), small.fleet.key.public)
        except Problem:
            return False
        return not small.audit(raw, vectors=False).failed

    assert passes(small.raw)
    assert [at for at in range(len(small.raw)) if passes(flipped(small.raw, at, mask))] == []


def test_a_log_has_no_header_but_one(small: LoggedSession) -> None:
    for at in range(len(MAGIC)):
        for mask in range(1, 256):
            assert first(small.audit(flipped(small.raw, at, mask))) == 0


def test_a_flipped_bit_is_found_in_its_entry(logged: LoggedSession) -> None:
    ends = logged.ends()
    for at in [*range(len(MAGIC)), *range(len(MAGIC), len(logged.raw), 173)]:
        index = next(index for index, end in enumerate(ends) if at < end)
        found = first(logged.audit(flipped(logged.raw, at, 1 << at % 8), vectors=False))
        if logged.entries[index].at is not None and at >= ends[index] - 4:  # its time, which that signs
            assert found <= next(each.index for each in logged.entries[index:] if each.kind == Checkpoint.TAG)
        else:
            assert found == index


@pytest.mark.parametrize("peer", ["device-000", "device-003", "j"])
def test_a_checkpoint_under_the_name_of_a_device_is_found(logged: LoggedSession, peer: str) -> None:
    """Also the last one, whose place no other checkpoint covers."""
    for index, entry in enumerate(logged.entries):
        if entry.kind == Checkpoint.TAG:
            changed = [replace(each, peer=peer) if each == entry else each for each in logged.entries]
            assert first(logged.audit(write(changed), vectors=False)) == index


def test_a_message_to_all_under_the_name_of_one_device_is_found_in_its_entry(logged: LoggedSession) -> None:
    for index, entry in enumerate(logged.entries):
        if entry.peer == "*":
            changed = [replace(each, peer="j") if each == entry else each for each in logged.entries]  # one bit
            assert first(logged.audit(write(changed), vectors=False)) == index


def test_a_checkpoint_under_another_round_is_found_in_its_entry(logged: LoggedSession) -> None:
    for index, entry in enumerate(logged.entries):
        if entry.kind == "checkpoint":
            changed = [replace(each, round=each.round ^ 16) if each == entry else each for each in logged.entries]
            assert first(logged.audit(write(changed), vectors=False)) == index


def test_a_flipped_bit_in_every_field_of_an_entry_is_found(logged: LoggedSession) -> None:
    index = 16
    start, end = logged.ends()[index - 1], logged.ends()[index]
    for at in range(start, end - 150):  # length, number, kind, round, peer, and the message's own length
        damaged = bytearray(logged.raw)
        damaged[at] ^= 1
        assert first(logged.audit(bytes(damaged), vectors=False)) == index


@pytest.mark.parametrize("index", range(ENTRIES - 1))
def test_a_removed_entry_is_found(logged: LoggedSession, index: int) -> None:
    left = [entry for entry in logged.entries if entry.index != index]
    place = first(logged.audit(write(left), vectors=False))
    assert place == index


@pytest.mark.parametrize("index", range(ENTRIES - 1))
def test_swapped_entries_are_found(logged: LoggedSession, index: int) -> None:
    entries = list(logged.entries)
    entries[index], entries[index + 1] = entries[index + 1], entries[index]
    assert first(logged.audit(write(entries), vectors=False)) <= index


@pytest.mark.parametrize("index", range(ENTRIES))
def test_a_repeated_entry_is_found(logged: LoggedSession, index: int) -> None:
    entries = list(logged.entries)
    entries.insert(index, entries[index])
    assert first(logged.audit(write(entries), vectors=False)) <= index + 1


@pytest.mark.parametrize("change", ["removed", "swapped", "repeated"])
def test_numbering_the_entries_anew_does_not_hide_it(logged: LoggedSession, change: str) -> None:
    entries = list(logged.entries)
    if change == "removed":
        del entries[16]
    elif change == "swapped":  # two adverts: either order would be valid, but only one was signed
        entries[1], entries[2] = entries[2], entries[1]
    else:
        entries.insert(16, entries[16])
    numbered = [replace(entry, index=index) for index, entry in enumerate(entries)]
    report = logged.audit(write(numbered))
    assert Check.LOG in {finding.check for finding in report.failed}
    assert report.findings[0].about == "checkpoint.root"


@settings(max_examples=40, deadline=None, suppress_health_check=QUIET)
@given(place=st.floats(0, 1, exclude_max=True))
def test_a_log_that_is_cut_off_anywhere_is_found(logged: LoggedSession, place: float) -> None:
    report = logged.audit(logged.raw[: int(place * len(logged.raw))], vectors=False)
    assert report.findings[0].status in (Status.FAIL, Status.OPEN)


def test_a_log_that_is_cut_off_between_entries_is_found(logged: LoggedSession) -> None:
    for end in logged.ends()[:-1]:
        report = logged.audit(logged.raw[:end], vectors=False)
        assert (report.findings[0].status, report.findings[0].about, report.closed) == (Status.OPEN, "log.open", False)
        assert logged.audit(logged.raw[:end], vectors=False, unfinished=True).findings[0].status is Status.PASS


def test_a_log_that_goes_on_after_its_end_is_found(logged: LoggedSession) -> None:
    again = Entry(ENTRIES, *(getattr(logged.entries[-1], name) for name in ("kind", "round", "peer", "message")))
    assert first(logged.audit(logged.raw + record(ENTRY.encode(again)))) == ENTRIES
    assert first(logged.audit(logged.raw + b"\x00")) == ENTRIES
    assert (
        first(logged.audit(logged.raw + logged.raw[len(MAGIC) :])) == ENTRIES
    )  # although it says that it is the first


@settings(max_examples=100, deadline=None, suppress_health_check=QUIET)
@given(raw=st.binary(max_size=200), headed=st.booleans())
def test_any_bytes_end_in_a_report_that_fails(logged: LoggedSession, raw: bytes, headed: bool) -> None:
    assert logged.audit(MAGIC + raw if headed else raw).failed


def test_another_authority_or_coordinator_is_found(logged: LoggedSession, logged_of: Any, entropy: Any) -> None:
    other = logged_of([], devices=3)
    other.fleet.key = type(other.fleet.key).generate(entropy)
    report = audit(logged.raw, logged.fleet.authority.root, other.fleet.key.public)
    assert {finding.check for finding in report.failed} >= {Check.LOG, Check.IDENTITIES}
