"""What ends in a coordinator's state directory is shown in time: by the status, the page's view and the metrics."""

import json
import logging
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner

from aggregation.entropy import SystemEntropy
from aggregation.errors import TrustError
from aggregation.pki import Authority
from aggregation.pki.revocation import EXPIRED
from aggregation.pki.tls import TlsKey
from coordinator import expiry, runstate
from coordinator.cli import coordinator_group as coordinator
from coordinator.dashboard.view import Viewer, exposition
from coordinator.expiry import expiries
from coordinator.gateway.grid import serving
from coordinator.settings import FederationSettings
from coordinator.statedir import REVOKED, SERVICES_LOCK, CoordinatorStateDir
from edgeadapt.authority import AuthorityStore
from edgeadapt.formats import storage
from edgeadapt.formats.keyfiles import NEXT_TLS_KEY, TLS_CERTIFICATE, TLS_KEY
from edgeadapt.formats.registryfiles import TRANSCRIPT
from tests.support import refused
from tests.support.authority import signer, store
from tests.support.gateway import certify, wait_until

__all__ = ["signer", "store"]
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
        state_dir.locked(),
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
