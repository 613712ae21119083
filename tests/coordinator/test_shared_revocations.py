"""A revocation list that is copied to one of two coordinators is in force at both, over a real PostgreSQL."""

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from aggregation.entropy import SystemEntropy
from aggregation.errors import TrustError
from aggregation.pki import Authority
from aggregation.pki.certificates import serial
from aggregation.pki.revocation import Revocation
from coordinator.gateway.server import Gateway
from coordinator.registry import TranscriptTable, lease
from coordinator.statedir import REVOKED, CoordinatorStateDir
from edgeadapt.formats import storage
from edgeadapt.formats.registryfiles import TRANSCRIPT
from tests.coordinator.test_registry_elsewhere import move
from tests.support import FleetOf, refused
from tests.support.gateway import HOST, authority_of, server_tls, wait_until
from tests.support.lightdevice import Kind, LightDevice

Pair = tuple[Any, Path, Path]


def signed(authority: Authority, number: int, *serials: int) -> bytes:
    now = datetime.now(UTC)
    revoked = {each: Revocation(now) for each in serials}
    return authority.revocations(number, revoked, now, now + timedelta(days=1)).to_pem()


def number_at(folder: Path) -> int:
    """Of the list in force; 0 without one."""
    found = CoordinatorStateDir.open(folder).read_root(datetime.now(UTC)).revoked
    return found.number if found else 0


def warned(caplog: pytest.LogCaptureFixture, of: str) -> bool:
    """Whether lists were not shared because of this one; in one line."""
    found = [record.getMessage() for record in caplog.records if "are not shared" in record.getMessage()]
    assert not any("\n" in text for text in found)
    return any(of in text for text in found)


def test_an_older_list_that_is_copied_over_a_newer_one_is_reported_once(
    fleet_of: FleetOf, caplog: pytest.LogCaptureFixture
) -> None:
    fleet = fleet_of(3)
    folder = fleet.out / "coordinator"
    opened, authority = CoordinatorStateDir.open(folder), authority_of(fleet)
    (folder / TRANSCRIPT).mkdir(exist_ok=True)
    newest = signed(authority, 7, 1)
    (folder / TRANSCRIPT / REVOKED).write_bytes(newest)
    for number in (7, 6, 6, 5):
        (folder / REVOKED).write_bytes(newest if number == 7 else signed(authority, number))
        found = opened.read_root(datetime.now(UTC)).revoked
        assert found is not None
        assert found.number == 7
    opened.registry.close()
    lines = [record.getMessage() for record in caplog.records if record.name == "edgeadapt.coordinator"]
    assert [line.partition(",")[0] for line in lines] == [f"{folder / REVOKED} is list {number}" for number in (6, 5)]
    assert not any("\n" in line for line in lines)


@pytest.fixture
def pair(app_fleet_of: FleetOf, postgresql: str, monkeypatch: pytest.MonkeyPatch) -> Pair:
    """The fleet, and the state directories of two machines."""
    monkeypatch.setattr(lease, "RENEWAL", 0.1)
    fleet = app_fleet_of(3)
    first = move(fleet, postgresql)
    return authority_of(fleet), first, Path(shutil.copytree(first, fleet.out / "second"))


@contextmanager
def leading(
    folder: Path, errors: list[Exception] | None = None, done: threading.Event | None = None
) -> Iterator[threading.Event]:
    """Lead, or wait for it, in a thread, until ``done``. Yields what is set once it leads."""
    leads, done = threading.Event(), done or threading.Event()

    def lead() -> None:
        try:
            with CoordinatorStateDir.open(folder).leading():
                leads.set()
                done.wait(300)
        except TrustError as error:
            if errors is None:
                raise
            errors.append(error)

    thread = threading.Thread(target=lead)
    thread.start()
    try:
        yield leads
    finally:
        done.set()
        thread.join()


def test_a_list_that_only_the_waiting_coordinator_was_given_is_in_force_at_the_leader(pair: Pair) -> None:
    authority, first, second = pair
    ended = threading.Event()
    with leading(first, done=ended) as leads:
        assert leads.wait(120)
        with leading(second) as other:
            storage.replace(second / REVOKED, signed(authority, 1))
            wait_until(lambda: number_at(first) == 1, 120)
            storage.replace(first / REVOKED, signed(authority, 2))
            wait_until(lambda: number_at(second) == 2, 120)
            storage.replace(first / REVOKED, signed(authority, 1))  # an older one comes to nothing
            wait_until(lambda: authority.root.revocations((first / REVOKED).read_bytes()).number == 2, 120)
            assert not other.is_set()
            ended.set()
            assert other.wait(120)
    assert number_at(first) == number_at(second) == 2


def test_the_gateway_of_a_coordinator_that_takes_over_refuses_a_device_that_the_other_one_knew_as_revoked(
    pair: Pair,
) -> None:
    authority, first, second = pair
    (second / REVOKED).write_bytes(signed(authority, 1))  # left behind
    opened = CoordinatorStateDir.open(second)
    gateway = Gateway(f"{HOST}:0", server_tls(authority), opened.read_root, lambda number, answer: None)
    thief, kitchen = (LightDevice(gateway, authority, name) for name in ("thief", "kitchen"))
    try:
        thief.attend()
        (first / REVOKED).write_bytes(signed(authority, 2, serial(thief.certificate)))
        with leading(first) as leads:
            assert leads.wait(120)
        with leading(second) as leads:
            assert leads.wait(120)
            wait_until(lambda: gateway.devices() == (), 60)  # as each session does; a list is read once a second
            over = thief.greet().ended()
            assert over.kind is Kind.REFUSED
            assert "revoked" in over.reason
            kitchen.attend()
            assert gateway.devices() == ("kitchen",)
    finally:
        for device in (thief, kitchen):
            device.close()
        gateway.close()


def test_a_list_of_another_authority_is_refused_and_goes_no_further(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    authority, first, second = pair
    now = datetime.now(UTC)
    foreign = Authority.create("other", SystemEntropy(), now - timedelta(days=1), now + timedelta(days=9))
    errors, ended = list[Exception](), threading.Event()
    (first / REVOKED).write_bytes(signed(authority, 1))
    with leading(first, done=ended) as leads:
        assert leads.wait(120)
        wait_until(lambda: number_at(second) == 0 and number_at(first) == 1, 60)
        storage.replace(second / REVOKED, signed(foreign, 9))
        with leading(second, errors) as other:
            try:
                wait_until(lambda: warned(caplog, str(second / REVOKED)), 120)
                # What somebody with access to the database writes there is refused as well.
                table = TranscriptTable(CoordinatorStateDir.open(first).registry.engine)
                table.offer_revocations(signed(foreign, 9), table.revocations())
                (second / REVOKED).unlink()
                wait_until(lambda: warned(caplog, "the revocation list in the database"), 120)
            finally:
                ended.set()
            wait_until(lambda: errors, 120)
            assert not other.is_set()
        assert "the revocation list in the database" in str(errors[0])
        assert number_at(first) == 1
        assert not (second / REVOKED).exists()
    for folder in (first, second):
        with refused(TrustError, "revocations.signature"), CoordinatorStateDir.open(folder).leading():
            pass
        assert not CoordinatorStateDir.open(folder).leadership().in_force  # another one need not wait for its end


def test_a_list_that_is_half_copied_ends_no_coordinator_that_waits(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    authority, first, second = pair
    whole, ended = signed(authority, 1), threading.Event()
    with leading(first, done=ended) as leads:
        assert leads.wait(120)
        with leading(second) as other:
            try:
                storage.replace(second / REVOKED, whole[:100])
                wait_until(lambda: warned(caplog, str(second / REVOKED)), 120)
                storage.replace(second / REVOKED, whole)
                wait_until(lambda: number_at(first) == 1, 120)
            finally:
                ended.set()
            assert other.wait(120)


def test_of_two_lists_that_are_offered_at_once_the_one_that_saw_the_other_last_stays(pair: Pair) -> None:
    authority, first, _ = pair
    table = TranscriptTable(CoordinatorStateDir.open(first).registry.engine)
    lists = [signed(authority, number) for number in (1, 2, 3)]
    table.offer_revocations(lists[0], None)
    table.offer_revocations(lists[1], None)
    assert table.revocations() == lists[0]
    table.offer_revocations(lists[2], lists[0])
    table.offer_revocations(lists[1], lists[0])
    assert table.revocations() == lists[2]


def test_a_session_that_begins_lowers_no_list_that_another_coordinator_was_given_meanwhile(pair: Pair) -> None:
    authority, first, _ = pair
    older, newer = signed(authority, 7), signed(authority, 8)
    now = datetime.now(UTC)
    foreign = signed(Authority.create("other", SystemEntropy(), now - timedelta(days=1), now + timedelta(days=9)), 9)
    storage.replace(first / REVOKED, older)
    opened = CoordinatorStateDir.open(first)
    table, listed = TranscriptTable(opened.registry.engine), authority.root.revocations(older)
    for before, after in ((older, older), (foreign, older), (newer, newer)):
        table.offer_revocations(before, table.revocations())
        opened.transcripts.begin(bytes(32), listed)
        assert table.revocations() == after
        opened.transcripts.finish()
    storage.replace(first / TRANSCRIPT / REVOKED, newer)
    assert number_at(first) == 8  # of two lists the newer one, wherever it is
    storage.replace(first / REVOKED, signed(authority, 9))
    assert number_at(first) == 9
