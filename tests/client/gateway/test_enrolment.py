"""A device's side of the authority's service, by its commands and by its agent."""

import io
import json
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError, EdgeAdaptError, TrustError
from aggregation.pki import Authority, IdentityKey, Reason
from aggregation.pki.certificates import not_after
from client.cli import device
from client.gateway import enrolment as device_side
from client.gateway.agent import Agent
from client.gateway.enrolment import Renewal, enrol_with, renew, validity
from client.node.statedir import AGENT_LOCK, CERTIFICATE, DeviceSettings, DeviceStateDir
from coordinator.gateway.enrolment import EnrolmentServer, EnrolmentService
from coordinator.gateway.server import Gateway
from edgeadapt.authority import AuthorityStore
from edgeadapt.authority.store import utc_now
from edgeadapt.formats import storage
from edgeadapt.formats.gateway.invitation import Invitation, read_invitation
from tests.support import refused
from tests.support.authority import signer, store
from tests.support.gateway import HOST, attending, server_tls, wait_until
from tests.support.trial import call

__all__ = ["signer", "store"]
COORDINATOR = IdentityKey(bytes(range(32))).public
SHORT = 20 / 1440  # days of a first certificate: less than a third of its validity, which began an hour before
ENTROPY = SystemEntropy()
GATEWAY = "gateway.example:9443"


@dataclass
class Site:
    """An authority with its service, which makes first certificates that end soon, and later ones of 30 days."""

    store: AuthorityStore
    server: EnrolmentServer
    folder: Path

    @property
    def address(self) -> str:
        return f"{HOST}:{self.server.port}"

    def invite(self, name: str = "kitchen") -> Invitation:
        invitation = Invitation(ENTROPY.bytes(16), name, self.address, GATEWAY, self.store.root.der, COORDINATOR.raw)
        self.store.invite(name, invitation.key.public, 1.0)
        return invitation

    def enrol(self, invitation: Invitation, name: str = "kitchen") -> DeviceStateDir:
        enrol_with(invitation, self.folder / name, DeviceSettings(base="some_base"), ENTROPY, wait=lambda seconds: None)
        return DeviceStateDir.open(self.folder / name)

    def enrolled(self, name: str = "kitchen", days: float = SHORT) -> DeviceStateDir:
        self.server.service.days = days
        state_dir = self.enrol(self.invite(name), name)
        self.server.service.days = 30
        return state_dir

    def issued(self, name: str = "kitchen") -> int:
        return sum(each.name == name for each, _ in self.store.certificates())


@pytest.fixture
def site(store: AuthorityStore, signer: Authority, tmp_path: Path) -> Iterator[Site]:
    server = EnrolmentServer(EnrolmentService(store, signer, 30), f"{HOST}:0", [HOST])
    yield Site(store, server, tmp_path)
    server.close()


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# A first certificate.


@pytest.mark.parametrize("from_input", [False, True], ids=["file", "standard input"])
def test_a_device_enrols_with_a_token_by_commands(
    site: Site, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, from_input: bool
) -> None:
    coordinator, store = site.folder / "coordinator.pem", site.store
    coordinator.write_bytes(COORDINATOR.to_pem())
    given = ("--coordinator", coordinator, "--enrolment", site.address, "--gateway", GATEWAY)
    call("authority", "invite", store.folder, "--name", "kitchen", *given)
    token = capsys.readouterr().out.strip()
    (site.folder / "kitchen.token").write_text(f"{token}\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(f"{token}\n".encode())))
    source = "-" if from_input else site.folder / "kitchen.token"
    call("device", "enrol", "--state", site.folder / "kitchen", "--base", "some_base", "--token-file", source)
    shown, state_dir = capsys.readouterr().out, DeviceStateDir.open(site.folder / "kitchen")
    assert token not in shown
    assert store.root.fingerprint in shown
    assert COORDINATOR.key_id in shown
    assert (state_dir.root(), state_dir.coordinator) == (store.root, COORDINATOR)
    assert (state_dir.settings.gateway, state_dir.settings.renewal) == (GATEWAY, site.address)
    assert store.root.verify(state_dir.certificate, utc_now()) == ("kitchen", state_dir.identity.public)
    secret = read_invitation(token).secret
    assert not any(secret in raw or secret.hex().encode() in raw for raw in files(store.folder).values())


def test_an_enrolment_whose_answer_did_not_arrive_is_repeated_with_the_same_key(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    invitation, genuine = site.invite(), device_side.ask

    def broken(*given: Any) -> bytes:
        genuine(*given)
        raise EdgeAdaptError("the connection broke", about="enrolment")

    with monkeypatch.context() as patch:
        patch.setattr(device_side, "ask", broken)
        with refused(EdgeAdaptError, "enrolment"):
            site.enrol(invitation)
    key = DeviceStateDir.open(site.folder / "kitchen").identity.public
    assert site.enrol(invitation).identity.public == key
    assert site.issued() == 1
    with refused(ConfigError, "--state"):
        site.enrol(invitation)


def test_a_service_of_another_authority_gets_no_message(site: Site) -> None:
    other = AuthorityStore.create(site.folder / "other", "fleet", 3650, 30, None)
    server = EnrolmentServer(EnrolmentService(other, other.unlock(None), 30), f"{HOST}:0", [HOST])
    invitation = site.invite()
    other.invite("kitchen", invitation.key.public, 1.0)
    with refused(EdgeAdaptError, "enrolment"):
        site.enrol(invitation._replace(enrolment=f"{HOST}:{server.port}"))
    server.close()
    assert [each.name for each, _ in other.certificates()] == ["enrolment"]


def test_an_authority_that_cannot_be_reached_leaves_a_folder_to_go_on_with(site: Site) -> None:
    invitation = site.invite()
    with socket.socket() as closed:
        closed.bind((HOST, 0))
        with refused(EdgeAdaptError, "enrolment"):
            site.enrol(invitation._replace(enrolment=f"{HOST}:{closed.getsockname()[1]}"))
    with refused(ConfigError, "--token-file"):  # it has another coordinator
        site.enrol(invitation._replace(coordinator=IdentityKey(bytes(32)).public.raw))
    site.enrol(invitation)


def test_a_refused_invitation_is_a_line_of_the_authority(site: Site) -> None:
    with refused(TrustError, "gateway") as caught:
        site.enrol(site.invite()._replace(secret=bytes(16)))
    assert "ask for a new one" in str(caught.value)


def test_a_token_that_was_not_copied_as_a_whole_is_refused(site: Site) -> None:
    text = site.invite().to_text()
    assert read_invitation(f" {text}\n").to_text() == text
    for damaged in ("", text[:-1], text[1:], text[:40] + text[41:], text.replace("edgeadapt2", "edgeadapt1"), "é" * 40):
        with refused(ConfigError, "--token-file"):
            read_invitation(damaged)


@pytest.mark.parametrize(
    ("enrolment", "gateway"), [("fleet.example", "a:1"), ("a:1", "fleet.example"), ("a:1", ",a:1"), ("[::1]", "a:1")]
)
def test_no_token_is_made_for_an_address_without_a_port(enrolment: str, gateway: str) -> None:
    with refused(ConfigError, "invitation"):
        Invitation(bytes(16), "kitchen", enrolment, gateway, b"", COORDINATOR.raw).to_text()


@given(st.text(max_size=60))
def test_a_text_that_is_not_an_invitation_raises_one_error(text: str) -> None:
    for given_text in (text, f"edgeadapt2.{text}"):
        with pytest.raises(ConfigError):
            read_invitation(given_text)


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--gateway", "a:1", "--name", "kitchen"),
        ("--token-file", "-", "--authority", "authority.pem"),
        ("--token", "edgeadapt2.x"),  # would be in the list of processes
        ("--token-file", "/dev/zero"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises((ConfigError, click.NoSuchOption)):
        call("device", "enrol", "--state", tmp_path / "kitchen", "--base", "base", *options)
    assert not (tmp_path / "kitchen").exists()


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"edgeadapt2.x", b"edgeadapt2." + bytes(2**20)])
def test_a_file_without_an_invitation_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "token").write_bytes(content)
    with refused(ConfigError, "--token-file"):
        given_token = ("--token-file", tmp_path / "token")
        call("device", "enrol", "--state", tmp_path / "kitchen", "--base", "base", *given_token)
    assert not (tmp_path / "kitchen").exists()


# A newer certificate.


def test_a_renewal_keeps_the_key_and_is_due_in_the_last_third_of_the_validity(site: Site) -> None:
    state_dir = site.enrolled()
    identity = state_dir.identity.public
    assert validity(state_dir, utc_now())[0]
    renew(state_dir, site.address)
    assert site.store.root.verify(state_dir.certificate, utc_now()) == ("kitchen", identity)
    due = [validity(state_dir, utc_now() + timedelta(days=days))[0] for days in (0, 19, 21)]
    assert due == [False, False, True]
    with refused(TrustError, "certificate.validity") as caught:
        validity(state_dir, utc_now() + timedelta(days=31))
    assert "enrol this device again" in str(caught.value)


def command(*arguments: object) -> Any:
    return CliRunner().invoke(device, ["enrol", "--renew", *map(str, arguments)])


def test_the_command_renews_what_is_due_and_nothing_else(site: Site) -> None:
    state_dir = site.enrolled()
    done = command("--state", state_dir.folder, "--json")
    assert done.exception is None, done.exception
    end = not_after(state_dir.certificate)
    assert json.loads(done.stdout) == {"device": "kitchen", "renewed": True, "until": end.isoformat()}
    assert end > utc_now() + timedelta(days=29)
    kept, issued = files(state_dir.folder), site.issued()
    assert "not renewed before the last third" in command("--state", state_dir.folder).stdout
    assert (files(state_dir.folder), site.issued()) == (kept, issued)


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
    site.store.revoke(site.server.service.authority, "kitchen", Reason.KEY_COMPROMISE, 30)
    assert "was revoked: enrol this device again" in line(TrustError, "gateway")
    (state_dir.folder / CERTIFICATE).write_bytes(b"damaged")
    line(TrustError, "certificate")
    (state_dir.folder / CERTIFICATE).unlink()
    line(TrustError, CERTIFICATE)


def test_the_directory_of_a_device_that_has_a_tls_key_of_before_opens_and_renews_at_the_authoritys_address(
    site: Site,
) -> None:
    """Until 2026-12 light devices had TLS keys, and a port of the service renewed both certificates."""
    state_dir = site.enrolled()
    for name in ("tls.key", "tls.pem"):
        (state_dir.folder / name).write_bytes(b"of before")
    settings = state_dir.folder / "device.toml"
    settings.write_text(settings.read_text().replace(site.address, f"{HOST}:1"))
    assert not Renewal(state_dir.folder).attempt()
    done = command("--state", state_dir.folder, "--renewal", site.address)
    assert done.exception is None, done.exception
    assert not validity(DeviceStateDir.open(state_dir.folder), utc_now())[0]


def test_two_threads_renew_once(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """An agent pauses in one thread, while another looks at its conditions."""
    state_dir, both, calls = site.enrolled(), threading.Barrier(2), []
    genuine = device_side.ask

    def met(*given: Any) -> bytes:
        calls.append(given)
        with suppress(threading.BrokenBarrierError):  # the other one renews nothing
            both.wait(1.0)
        return genuine(*given)

    monkeypatch.setattr(device_side, "ask", met)
    agent = Renewal(state_dir.folder)
    with ThreadPoolExecutor(2) as threads:
        found = [each.result() for each in [threads.submit(agent.attempt) for _ in range(2)]]
    assert sorted(found) == [False, True]
    assert len(calls) == 1


def test_a_disk_that_fails_leaves_the_old_certificate_and_ends_no_look_at_the_conditions(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    state_dir = site.enrolled()
    kept, agent = files(state_dir.folder), Agent(state_dir.folder, ())

    def failing(*_: object) -> Any:
        raise OSError(28, "No space left on device")

    for broken in ((Path, "is_file"), (storage, "read")):
        with monkeypatch.context() as patch:
            patch.setattr(*broken, failing)
            assert not agent._renewed()
    with monkeypatch.context() as patch:
        patch.setattr("client.node.statedir.replace", failing)
        assert not agent._renewed()
    assert files(state_dir.folder) == kept
    assert Renewal(state_dir.folder).attempt()


def test_an_agent_renews_by_itself_and_goes_on_at_the_gateway_with_the_new_certificate(site: Site) -> None:
    state_dir, authority = site.enrolled(), site.server.service.authority
    settings = state_dir.folder / "device.toml"
    text, old = settings.read_text(), state_dir.certificate
    settings.write_text(text.replace(site.address, ""))  # until it is connected
    gateway = Gateway(f"{HOST}:0", server_tls(authority), lambda at: site.store.root, lambda *_: None)

    async def connected() -> list[bytes]:
        return [each.credentials.certificate for each in gateway.service.hub.streams() if not each.over]

    try:
        with attending(gateway.port, [state_dir.folder], look=0.1):
            wait_until(gateway.devices, 120.0)
            assert gateway.call(connected()) == [old]
            storage.replace(settings, text.encode())
            wait_until(lambda: gateway.call(connected()) not in ([], [old]), 120.0)
            assert gateway.call(connected()) == [state_dir.certificate]
            assert not_after(state_dir.certificate) > utc_now() + timedelta(days=29)
    finally:
        gateway.close()


def test_an_agent_whose_certificate_has_expired_says_to_enrol_again(site: Site) -> None:
    state_dir = site.enrolled()
    earlier = replace(site.store, clock=lambda: utc_now() - timedelta(days=2))
    old = earlier.issue(site.server.service.authority, "kitchen", state_dir.identity.public, 1)
    storage.replace(state_dir.folder / CERTIFICATE, old)
    with refused(TrustError, "certificate.validity") as caught:
        Renewal(state_dir.folder).attempt()
    assert "with a token" in str(caught.value)


def test_a_revoked_device_is_refused_keeps_what_it_has_and_asks_again_after_a_pause(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    state_dir = site.enrolled()
    site.store.revoke(site.server.service.authority, "kitchen", Reason.KEY_COMPROMISE, 30)
    kept, issued, agent = files(state_dir.folder), site.issued(), Renewal(state_dir.folder)
    with caplog.at_level(logging.WARNING, "edgeadapt.agent"):
        assert not agent.attempt()
        assert not agent.attempt()  # not before its pause is over
    (line,) = [record.getMessage() for record in caplog.records if record.name == "edgeadapt.agent"]
    assert "was revoked: enrol this device again, with a token" in line
    assert "\n" not in line
    assert (files(state_dir.folder), site.issued()) == (kept, issued)


def test_a_flood_of_enrolments_keeps_no_device_from_renewing(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    kitchen, over, begun = site.enrolled(), threading.Event(), threading.Semaphore(0)
    genuine: Callable[..., bytes] = EnrolmentService.enrol

    def slow(self: EnrolmentService, raw: bytes) -> bytes:
        begun.release()
        over.wait(120)
        return genuine(self, raw)

    monkeypatch.setattr(site.server.service.__class__, "enrol", slow)
    server = EnrolmentServer(site.server.service, f"{HOST}:0", [HOST])
    invitation = site.invite("garage")._replace(enrolment=f"{HOST}:{server.port}")
    with ThreadPoolExecutor(8) as threads:
        calls = [threads.submit(site.enrol, invitation, f"garage-{number}") for number in range(8)]
        try:
            assert begun.acquire(timeout=60)
            assert renew(kitchen, f"{HOST}:{server.port}")
        finally:
            over.set()
        assert sum(each.exception() is None for each in calls) == 1
    server.close()
