"""A device's certificates are renewed over mutual TLS at the real service, and a kill leaves a pair that works."""

import json
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from click.testing import CliRunner

from adapters import storage
from adapters.gateway import frames
from adapters.gateway import gateway_pb2 as pb
from adapters.gateway.invitation import Invitation
from adapters.keyfiles import NEXT_TLS_KEY, TLS_CERTIFICATE, TLS_KEY
from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError, EdgeAdaptError, TrustError
from aggregation.pki import Authority, IdentityKey, Reason
from aggregation.pki.certificates import load, serial, subject, to_der
from aggregation.pki.tls import RENEWAL, TlsKey, TlsRole, verify_tls
from client.cli import device
from client.gateway import renewal as device_side
from client.gateway.agent import Agent
from client.gateway.enrolment import enrol_with
from client.gateway.renewal import Renewal, renew, tls_pair, validity
from client.node.statedir import AGENT_LOCK, DeviceSettings, DeviceStateDir
from coordinator.authority import AuthorityStore
from coordinator.authority.store import utc_now
from coordinator.gateway.enrolment import ATTEMPTS, THREADS, EnrolmentServer, EnrolmentService
from coordinator.gateway.places import REFUSALS
from coordinator.gateway.server import Gateway
from tests.support import refused
from tests.support.authority import signer, store
from tests.support.gateway import HOST, attending, certify, channel, server_tls, wait_until

__all__ = ["signer", "store"]
COORDINATOR = IdentityKey(bytes(range(32))).public
SHORT = 20 / 1440  # days of a first certificate: less than a third of its validity, which began an hour before
ENTROPY = SystemEntropy()


@dataclass
class Site:
    """An authority with its service, which makes first certificates that end soon, and later ones of 30 days."""

    store: AuthorityStore
    service: EnrolmentService
    server: EnrolmentServer
    folder: Path

    @property
    def address(self) -> str:
        return f"{HOST}:{self.server.renewal_port}"

    def enrolled(self, name: str = "kitchen", days: float = SHORT) -> DeviceStateDir:
        addresses = f"{HOST}:{self.server.port}", f"{HOST}:1", self.store.root.der, COORDINATOR.raw, self.address
        invitation = Invitation(ENTROPY.bytes(16), name, *addresses)
        self.store.invite(name, invitation.key.public, 1.0)
        self.service.days = days
        enrol_with(invitation, self.folder / name, DeviceSettings(base="some_base"), ENTROPY)
        self.service.days = 30
        return DeviceStateDir.open(self.folder / name)

    def issued(self, name: str) -> int:
        return sum(each.name == name for each, _ in self.store.certificates())


@pytest.fixture
def site(store: AuthorityStore, signer: Authority, tmp_path: Path) -> Iterator[Site]:
    service = EnrolmentService(store, signer, 30)
    server = EnrolmentServer(service, f"{HOST}:0", [HOST], renewal=f"{HOST}:0")
    yield Site(store, service, server, tmp_path)
    server.close()


def ends(state_dir: DeviceStateDir) -> list[datetime]:
    return [load(der).not_valid_after_utc for der in (state_dir.certificate, to_der(tls_pair(state_dir.folder)[1]))]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def status_of(call: Callable[[], Any]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code(), str(caught.value.details())


def asked(state_dir: DeviceStateDir, key: TlsKey, name: str, signer: IdentityKey | None = None) -> bytes:
    """What a device sends, for any key, name and signature."""
    request = key.request(name)
    signature = (signer or state_dir.identity).sign(RENEWAL, request)
    message = pb.RenewRequest(certificate=state_dir.certificate, signature=signature, tls_request=request)
    return bytes(message.SerializeToString())


def test_a_renewal_keeps_the_identity_and_changes_the_tls_key(site: Site) -> None:
    state_dir = site.enrolled()
    before, identity = tls_pair(state_dir.folder), state_dir.identity.public
    assert validity(state_dir, utc_now())[0]
    renew(state_dir, site.address, ENTROPY)
    key, certificate = tls_pair(state_dir.folder)
    assert key != before[0]
    assert site.store.root.verify(state_dir.certificate, utc_now()) == ("kitchen", identity)
    assert verify_tls(site.store.root, to_der(certificate), TlsRole.DEVICE, utc_now()) == "kitchen"
    assert all(end > utc_now() + timedelta(days=29) for end in ends(state_dir))
    assert not validity(state_dir, utc_now())[0]
    assert not (state_dir.folder / NEXT_TLS_KEY).exists()


def test_certificates_are_due_in_the_last_third_of_their_validity_and_refused_after_it(site: Site) -> None:
    state_dir, now = site.enrolled(days=30), utc_now()
    assert not validity(state_dir, now + timedelta(days=19))[0]
    assert validity(state_dir, now + timedelta(days=21))[0]
    with refused(TrustError, "certificate.validity") as caught:
        validity(state_dir, now + timedelta(days=31))
    assert "enrol this device again" in str(caught.value)


def command(*arguments: object) -> Any:
    return CliRunner().invoke(device, ["renew", *map(str, arguments)])


def test_the_command_renews_what_is_due_and_nothing_else(site: Site) -> None:
    state_dir = site.enrolled()
    before, identity = tls_pair(state_dir.folder), state_dir.identity.public
    done = command("--state", state_dir.folder, "--json")
    assert done.exception is None, done.exception
    end = min(ends(state_dir))
    assert json.loads(done.stdout) == {"device": "kitchen", "renewed": True, "until": end.isoformat()}
    assert end > utc_now() + timedelta(days=29)
    assert tls_pair(state_dir.folder)[0] != before[0]
    assert DeviceStateDir.open(state_dir.folder).identity.public == identity
    kept, issued = files(state_dir.folder), site.issued("kitchen")
    again = command("--state", state_dir.folder)
    assert (
        again.stdout
        == f"kitchen: certificates valid until {end:%F}, not renewed before the last third of their validity\n"
    )
    assert (files(state_dir.folder), site.issued("kitchen")) == (kept, issued)


def test_the_command_refuses_in_one_line_and_changes_nothing(site: Site) -> None:
    state_dir = site.enrolled()
    settings = state_dir.folder / "device.toml"
    text = settings.read_text()

    def line(kind: type[EdgeAdaptError], about: str, *arguments: object) -> str:
        before = files(state_dir.folder)
        error = command("--state", state_dir.folder, *arguments).exception
        assert (type(error), error.about) == (kind, about), error
        assert "\n" not in str(error)
        assert before.items() <= files(state_dir.folder).items()
        return str(error)

    settings.write_text(text.replace(site.address, ""))
    assert "give --renewal" in line(ConfigError, "--renewal")
    assert "cannot be reached" in line(EdgeAdaptError, "renewal", "--renewal", f"{HOST}:1")
    settings.write_text(text)
    with storage.locked(state_dir.folder / AGENT_LOCK):
        assert "an agent, or another" in line(ConfigError, AGENT_LOCK)
    site.store.revoke(site.service.authority, "kitchen", Reason.KEY_COMPROMISE, 30)
    assert "was revoked: enrol this device again" in line(TrustError, "gateway")
    certificate = (state_dir.folder / TLS_CERTIFICATE).read_bytes()
    for damaged in (b"", certificate[:100], b"\xff" * 2**17):
        (state_dir.folder / TLS_CERTIFICATE).write_bytes(damaged)
        error = command("--state", state_dir.folder).exception
        assert isinstance(error, EdgeAdaptError), error
        assert "\n" not in str(error)
    (state_dir.folder / TLS_CERTIFICATE).unlink()
    line(TrustError, TLS_CERTIFICATE)


def test_two_threads_renew_once_and_the_pair_works(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """An agent pauses in one thread, while another looks at its conditions."""
    state_dir, both, calls = site.enrolled(), threading.Barrier(2), []
    genuine = device_side._call

    def met(*given: Any) -> bytes:
        calls.append(given)
        with suppress(threading.BrokenBarrierError):  # the other one renews nothing
            both.wait(1.0)
        return genuine(*given)

    monkeypatch.setattr(device_side, "_call", met)
    agent = Renewal(state_dir.folder)
    with ThreadPoolExecutor(2) as threads:
        found = [each.result() for each in [threads.submit(agent.attempt) for _ in range(2)]]
    assert sorted(found) == [False, True]
    assert len(calls) == 1
    assert tls_pair(state_dir.folder)[0].pem == files(state_dir.folder)[TLS_KEY]
    assert not validity(state_dir, utc_now())[0]


def test_a_disk_that_fails_for_a_moment_does_not_end_the_look_at_the_conditions(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = Agent(site.enrolled().folder, ())
    with monkeypatch.context() as patch:
        patch.setattr(Path, "is_file", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        assert not agent._renewed()
    assert agent._renewed()


@pytest.mark.slow
def test_an_agent_renews_by_itself_and_goes_on_at_the_gateway_with_the_new_certificate(site: Site) -> None:
    state_dir = site.enrolled()
    settings = state_dir.folder / "device.toml"
    text, old = settings.read_text(), serial(to_der(tls_pair(state_dir.folder)[1]))
    settings.write_text(text.replace(site.address, ""))  # until it is connected
    gateway = Gateway(f"{HOST}:0", server_tls(site.service.authority), lambda at: site.store.root, lambda *_: None)

    async def connected() -> list[int]:
        streams = gateway.service.hub.streams()
        return [serial(each.credentials.signed) for each in streams if not each.over]

    try:
        with attending(gateway.port, [state_dir.folder]):
            wait_until(gateway.devices, 120.0)
            assert gateway.call(connected()) == [old]
            storage.replace(settings, text.encode())
            wait_until(lambda: gateway.call(connected()) not in ([], [old]), 120.0)
            assert gateway.call(connected()) == [serial(to_der(tls_pair(state_dir.folder)[1]))]
            assert min(ends(state_dir)) > utc_now() + timedelta(days=29)
    finally:
        gateway.close()


def test_an_agent_whose_certificate_has_expired_says_to_enrol_again(site: Site) -> None:
    state_dir = site.enrolled()
    earlier = replace(site.store, clock=lambda: utc_now() - timedelta(days=2))
    old = earlier.issue(site.service.authority, "kitchen", state_dir.identity.public, 1)
    storage.replace(state_dir.folder / "certificate.der", old)
    with refused(TrustError, "certificate.validity") as caught:
        Renewal(state_dir.folder).attempt()
    assert "with a token" in str(caught.value)
    # Whatever its clock says, the authority refuses as well.
    key, certificate = tls_pair(state_dir.folder)
    with channel(site.server.renewal_port, key.pem, certificate, site.service.authority) as connection:
        raw = asked(state_dir, TlsKey.generate(ENTROPY), "kitchen")
        code, text = status_of(lambda: connection.unary_unary(frames.RENEW)(raw, timeout=60))
    assert code is grpc.StatusCode.PERMISSION_DENIED
    assert "enrol this device again, with a token" in text


def test_a_tls_certificate_that_has_expired_gets_no_connection(site: Site) -> None:
    now = datetime.now(UTC)
    dates = {"not_before": now - timedelta(days=2), "not_after": now - timedelta(days=1)}
    key, certificate = certify(site.service.authority, "kitchen", TlsRole.DEVICE, **dates)
    with channel(site.server.renewal_port, key, certificate, site.service.authority) as connection:
        assert (
            status_of(lambda: connection.unary_unary(frames.RENEW)(b"", timeout=60))[0] is grpc.StatusCode.UNAVAILABLE
        )


def test_a_revoked_device_is_refused_and_keeps_what_it_has(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    state_dir = site.enrolled()
    site.store.revoke(site.service.authority, "kitchen", Reason.KEY_COMPROMISE, 30)
    kept, issued, agent = files(state_dir.folder), site.issued("kitchen"), Renewal(state_dir.folder)
    with caplog.at_level(logging.WARNING, "edgeadapt.agent"):
        assert not agent.attempt()
        assert not agent.attempt()  # not before its pause is over
    (line,) = [record.getMessage() for record in caplog.records if record.name == "edgeadapt.agent"]
    assert "was revoked: enrol this device again, with a token" in line
    assert "\n" not in line
    after = files(state_dir.folder)
    del after[NEXT_TLS_KEY]
    assert (after, site.issued("kitchen")) == (kept, issued)


def test_a_revoked_tls_key_is_not_certified_again(site: Site) -> None:
    state_dir = site.enrolled()
    key, certificate = tls_pair(state_dir.folder)
    renew(state_dir, site.address, ENTROPY)
    site.store.revoke(site.service.authority, f"{serial(to_der(certificate)):x}", Reason.KEY_COMPROMISE, 30)
    newest = tls_pair(state_dir.folder)
    for pair, following in (((key, certificate), TlsKey.generate(ENTROPY)), (newest, key)):
        with channel(site.server.renewal_port, pair[0].pem, pair[1], site.service.authority) as connection:
            raw = asked(state_dir, following, "kitchen")
            code, text = status_of(lambda c=connection, raw=raw: c.unary_unary(frames.RENEW)(raw, timeout=60))
        assert code is grpc.StatusCode.PERMISSION_DENIED
        assert "was revoked" in text


def test_only_the_device_that_the_connection_names_is_certified(site: Site) -> None:
    kitchen, garage = site.enrolled(), site.enrolled("garage")
    key, certificate = tls_pair(kitchen.folder)
    new, thief = TlsKey.generate(ENTROPY), IdentityKey.generate(ENTROPY)
    issued = site.issued("kitchen"), site.issued("garage")
    with channel(site.server.renewal_port, key.pem, certificate, site.service.authority) as connection:
        call = connection.unary_unary(frames.RENEW)
        for raw in (
            asked(kitchen, new, "garage"),  # for another name
            asked(garage, new, "garage"),  # with another identity
            asked(garage, new, "kitchen"),
            asked(kitchen, new, "kitchen", thief),  # with a copied TLS key, and no identity
        ):
            assert status_of(lambda raw=raw: call(raw, timeout=60))[0] is grpc.StatusCode.PERMISSION_DENIED
        for raw in (b"", b"\xff", bytes(100), asked(kitchen, new, "kitchen")[:-40]):
            assert status_of(lambda raw=raw: call(raw, timeout=60))[0] is grpc.StatusCode.INVALID_ARGUMENT
    assert (site.issued("kitchen"), site.issued("garage")) == issued


def test_a_gateway_and_whoever_has_no_certificate_cannot_renew(site: Site) -> None:
    state_dir, authority = site.enrolled(), site.service.authority
    raw = asked(state_dir, TlsKey.generate(ENTROPY), "kitchen")
    pairs = {
        site.server.port: (None, None),
        site.server.renewal_port: certify(authority, "kitchen", TlsRole.GATEWAY),
    }
    for port, pair in pairs.items():
        with channel(port, *pair, authority) as connection:
            code, _ = status_of(lambda c=connection: c.unary_unary(frames.RENEW)(raw, timeout=60))
        assert code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAVAILABLE)
    assert site.issued("kitchen") == 2


def test_a_device_that_renews_without_end_has_to_wait(site: Site) -> None:
    state_dir, other = site.enrolled(), site.enrolled("garage")
    renew(state_dir, site.address, ENTROPY)
    issued = site.issued("kitchen")
    for _ in range(ATTEMPTS - 1):
        with refused(TrustError, "gateway") as early:
            renew(state_dir, site.address, ENTROPY)
        assert "can be renewed from" in str(early.value)
    with refused(EdgeAdaptError, "renewal") as caught:
        renew(state_dir, site.address, ENTROPY)
    assert "too many calls" in str(caught.value)
    assert site.issued("kitchen") == issued
    renew(other, site.address, ENTROPY)


def test_a_copied_tls_key_does_not_use_up_the_renewals_of_its_device(site: Site) -> None:
    state_dir, thief = site.enrolled(), IdentityKey.generate(ENTROPY)
    key, certificate = tls_pair(state_dir.folder)
    with channel(site.server.renewal_port, key.pem, certificate, site.service.authority) as connection:
        raw = asked(state_dir, TlsKey.generate(ENTROPY), "kitchen", thief)
        for _ in range(ATTEMPTS + 1):
            code, _ = status_of(lambda: connection.unary_unary(frames.RENEW)(raw, timeout=60))
            assert code is grpc.StatusCode.PERMISSION_DENIED
    assert Renewal(state_dir.folder).attempt()


def test_a_flood_of_enrolments_keeps_no_device_from_renewing(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    kitchen, garage, over, genuine = site.enrolled(), site.enrolled("garage"), threading.Event(), frames.enrol_request

    def slow(raw: bytes) -> pb.EnrolRequest:
        over.wait(120)
        return genuine(raw)

    with channel(site.server.port, None, None, site.service.authority) as connection:
        call = connection.unary_unary(frames.ENROL)
        with monkeypatch.context() as patch:
            patch.setattr(frames, "enrol_request", slow)
            busy = [call.future(b"", timeout=120) for _ in range(2 * THREADS)]
            try:
                assert Renewal(kitchen.folder).attempt()
            finally:
                over.set()
            for each in busy:
                assert each.code() is grpc.StatusCode.INVALID_ARGUMENT
        codes = {status_of(lambda: call(b"", timeout=60))[0] for _ in range(2 * REFUSALS)}
    assert grpc.StatusCode.RESOURCE_EXHAUSTED in codes
    assert Renewal(garage.folder).attempt()


def test_a_full_disk_leaves_the_old_pair(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    state_dir = site.enrolled()
    kept, genuine = files(state_dir.folder), storage.replace
    for full in (NEXT_TLS_KEY, TLS_CERTIFICATE):

        def replace_until(path: Path, content: bytes, mode: int = storage.PRIVATE, full: str = full) -> None:
            if path.name == full:
                raise OSError(28, "No space left on device", str(path))
            genuine(path, content, mode)

        monkeypatch.setattr(storage, "replace", replace_until)
        assert not Renewal(state_dir.folder).attempt()
        monkeypatch.undo()
        for name in (TLS_KEY, TLS_CERTIFICATE):
            assert files(state_dir.folder)[name] == kept[name]
    assert tls_pair(state_dir.folder)[0].pem == kept[TLS_KEY]


def _renew_until(folder: Path, address: str, stage: str) -> None:
    """Renew, and be killed before or after a write."""
    when, _, name = stage.partition(" ")
    genuine_replace, genuine_rename = storage.replace, Path.replace

    def killed(at: str, path: Path, write: Callable[[], Any]) -> Any:
        if path.name == name and when == f"before-{at}":
            os.kill(os.getpid(), signal.SIGKILL)
        found = write()
        if path.name == name and when == f"after-{at}":
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    def replaced(path: Path, content: bytes, mode: int = storage.PRIVATE) -> None:
        killed("write", path, lambda: genuine_replace(path, content, mode))

    def renamed(self: Path, target: Path) -> Path:
        return Path(killed("rename", Path(target), lambda: genuine_rename(self, target)))

    storage.replace, Path.replace = replaced, renamed  # type: ignore[assignment,method-assign]
    renew(DeviceStateDir.open(folder), address, SystemEntropy())


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage",
    [
        f"after-write {NEXT_TLS_KEY}",
        "after-rename certificate.der",
        f"before-write {TLS_CERTIFICATE}",
        f"after-write {TLS_CERTIFICATE}",
        f"after-rename {TLS_KEY}",
    ],
)
def test_a_kill_at_any_write_leaves_a_pair_that_works(site: Site, stage: str) -> None:
    state_dir = site.enrolled()
    process = multiprocessing.get_context("spawn").Process(
        target=_renew_until, args=(state_dir.folder, site.address, stage)
    )
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL, stage
    key, certificate = tls_pair(state_dir.folder)
    assert subject(load(to_der(certificate))) == "kitchen"
    assert key.public() == load(to_der(certificate)).public_key()
    if validity(state_dir, utc_now())[0]:
        renew(state_dir, site.address, ENTROPY)
    with refused(TrustError, "gateway") as caught:
        renew(state_dir, site.address, ENTROPY)
    assert "can be renewed from" in str(caught.value)  # the authority takes the pair
    assert min(ends(state_dir)) > utc_now() + timedelta(days=29)
    assert site.issued("kitchen") == 4  # an answer that was lost is not certified twice
