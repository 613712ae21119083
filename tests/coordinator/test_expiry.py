"""What ends in a coordinator's state directory is shown in time: by the status, the page's view and the metrics."""

import json
import logging
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from aggregation.entropy import SystemEntropy
from aggregation.errors import TrustError
from aggregation.pki import Authority
from aggregation.pki.certificates import serial
from aggregation.pki.revocation import EXPIRED, Revocation
from aggregation.pki.tls import TlsKey
from coordinator import expiry, runstate
from coordinator.cli import coordinator_group as coordinator
from coordinator.dashboard.view import Viewer, exposition
from coordinator.expiry import expiries
from coordinator.gateway.grid import serving
from coordinator.gateway.server import Gateway
from coordinator.registry import TranscriptTable, lease
from coordinator.settings import FederationSettings
from coordinator.statedir import REVOKED, SERVICES_LOCK, CoordinatorStateDir
from edgeadapt.authority import AuthorityStore
from edgeadapt.formats import storage
from edgeadapt.formats.keyfiles import NEXT_TLS_KEY, TLS_CERTIFICATE, TLS_KEY
from edgeadapt.formats.registryfiles import TRANSCRIPT
from tests.coordinator.test_registry_elsewhere import move
from tests.support import FleetOf, refused
from tests.support.authority import signer, store
from tests.support.gateway import HOST, authority_of, certify, server_tls, wait_until
from tests.support.lightdevice import Kind, LightDevice

__all__ = ["signer", "store"]  # fixtures


NOW = datetime.now(UTC).replace(microsecond=0)


@pytest.fixture
def state_dir(store: AuthorityStore, tmp_path: Path) -> CoordinatorStateDir:
    folder, pinned = tmp_path / "fleet", store.root.to_pem()
    return CoordinatorStateDir.create(folder, pinned, FederationSettings(), SystemEntropy())


def give(folder: Path, signer: Authority, before: float, after: float) -> None:
    """TLS files whose validity began so many days ago and ends in so many; and such a revocation list."""
    begin, end = NOW - timedelta(days=before), NOW + timedelta(days=after)
    key, certificate = certify(signer, not_before=begin, not_after=end)
    (folder / TLS_KEY).write_bytes(key)
    (folder / TLS_CERTIFICATE).write_bytes(certificate)
    (folder / REVOKED).write_bytes(signer.revocations(7, {}, begin, end).to_pem())


def warnings(folder: Path) -> list[str | None]:
    found = expiries(folder, NOW)
    assert list(found) == [TLS_CERTIFICATE, REVOKED]
    return [each["warning"] for each in found.values()]


def test_only_what_has_less_than_a_third_left_is_warned_of(state_dir: CoordinatorStateDir, signer: Authority) -> None:
    folder = state_dir.folder
    assert expiries(folder, NOW) == {}
    give(folder, signer, 59, 31)
    assert warnings(folder) == [None, None]
    give(folder, signer, 61, 29)
    assert [str(each).partition(":")[0] for each in warnings(folder)] == [
        f"{name} ends on {NOW + timedelta(days=29):%F}, in 29 days" for name in (TLS_CERTIFICATE, REVOKED)
    ]
    give(folder, signer, 90, -1)
    assert all(f"ended on {NOW - timedelta(days=1):%F}" in str(each) for each in warnings(folder))
    for content in (b"", b"-----BEGIN X509 CRL-----\n", b"\xff" * 2**22):
        for name in (TLS_CERTIFICATE, REVOKED):
            (folder / name).write_bytes(content)
        assert all("cannot be read" in str(each) and "\n" not in str(each) for each in warnings(folder))


def test_the_status_the_page_and_the_metrics_show_it(state_dir: CoordinatorStateDir, signer: Authority) -> None:
    give(state_dir.folder, signer, 61, 29)
    shown = CliRunner().invoke(coordinator, ["status", str(state_dir.folder)]).stdout
    assert "\ntls.pem ends on" in shown
    assert "'edgeadapt coordinator tls-request'" in shown
    assert "\nrevoked.crl ends on" in shown
    found = json.loads(CliRunner().invoke(coordinator, ["status", str(state_dir.folder), "--json"]).stdout)["expiries"]
    assert datetime.fromisoformat(found[TLS_CERTIFICATE]["until"]) == NOW + timedelta(days=29)
    view = Viewer(state_dir).look()
    assert view["expiries"] == found
    ends = (NOW + timedelta(days=29)).timestamp()
    lines = exposition(view).decode().splitlines()
    values = [float(line.split()[1]) for line in lines if line.startswith("edgeadapt_expiry_timestamp_seconds{")]
    assert values == [ends, ends]
    give(state_dir.folder, signer, 1, 89)
    assert "ends on" not in CliRunner().invoke(coordinator, ["status", str(state_dir.folder)]).stdout
    state_dir.registry.close()


def test_the_log_of_a_gateway_says_it_once_a_day_though_nobody_connects(
    state_dir: CoordinatorStateDir, signer: Authority, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    give(state_dir.folder, signer, 61, 29.5)
    monkeypatch.setattr(expiry, "EVERY", 0.0)
    looks: list[object] = []
    genuine = expiry.expiries
    monkeypatch.setattr(expiry, "expiries", lambda *given: looks.append(given) or genuine(*given))
    with (
        caplog.at_level(logging.WARNING, "edgeadapt.coordinator"),
        state_dir.leading(),
        serving(state_dir, "127.0.0.1:0", own_process=False),
    ):
        wait_until(lambda: len(looks) > 1, 120.0)
    lines = [record.getMessage() for record in caplog.records if record.name == "edgeadapt.coordinator"]
    assert [line.partition(":")[0] for line in lines] == [
        f"{name} ends on {NOW + timedelta(days=29.5):%F}, in 29 days" for name in (TLS_CERTIFICATE, REVOKED)
    ]


def test_the_list_is_the_one_that_a_session_takes(state_dir: CoordinatorStateDir, signer: Authority) -> None:
    kept = state_dir.folder / TRANSCRIPT / REVOKED
    kept.parent.mkdir(exist_ok=True)
    for number, days in ((9, 1), (6, 80)):
        begin, end = NOW - timedelta(days=29), NOW + timedelta(days=days)
        kept.write_bytes(signer.revocations(number, {}, begin, end).to_pem())
        give(state_dir.folder, signer, 61, 60)  # its list has number 7
        newest = state_dir.read_root(NOW).revoked
        assert newest is not None
        found = expiries(state_dir.folder, NOW)[REVOKED]
        assert datetime.fromisoformat(found["until"]) == newest.next_update
        assert (found["warning"] is None) == (number == 6)
        (state_dir.folder / REVOKED).unlink()
        assert datetime.fromisoformat(expiries(state_dir.folder, NOW)[REVOKED]["until"]) == end


def test_a_service_waits_while_the_list_has_expired_and_a_run_without_one_ends(
    state_dir: CoordinatorStateDir, signer: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    slept = list[float]()

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        assert runstate.read(state_dir.folder).waits_for is runstate.Need.REVOCATIONS
        if len(slept) == 3:
            give(state_dir.folder, signer, 1, 1)

    give(state_dir.folder, signer, 9, -1)
    with refused(TrustError, EXPIRED):
        state_dir.await_root(sleep)
    with storage.locked(state_dir.folder / SERVICES_LOCK, timeout=0):
        root = state_dir.await_root(sleep)
        assert root.revoked is not None
        assert (len(slept), len(caplog.records), runstate.read(state_dir.folder).waits_for) == (3, 1, None)
        (state_dir.folder / REVOKED).write_bytes(b"damaged")
        with pytest.raises(TrustError):
            state_dir.await_root(sleep)


def test_a_certificate_for_another_key_is_warned_of_and_nothing_is_renamed(
    state_dir: CoordinatorStateDir, signer: Authority
) -> None:
    give(state_dir.folder, signer, 1, 89)
    (state_dir.folder / TLS_KEY).rename(state_dir.folder / NEXT_TLS_KEY)
    (state_dir.folder / TLS_KEY).write_bytes(TlsKey.generate(SystemEntropy()).pem)
    assert warnings(state_dir.folder) == [None, None]
    assert (state_dir.folder / NEXT_TLS_KEY).exists()
    (state_dir.folder / NEXT_TLS_KEY).unlink()
    text, _ = warnings(state_dir.folder)
    with refused(TrustError, TLS_KEY) as caught:
        state_dir.read_tls(NOW)
    assert text == str(caught.value)
    assert str(text) in CliRunner().invoke(coordinator, ["status", str(state_dir.folder)]).stdout


# A revocation list that is copied to one of two coordinators is in force at both, over a real PostgreSQL.
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
