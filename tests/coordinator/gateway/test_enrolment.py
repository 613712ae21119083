"""Enrolment over a network, with the real service on loopback: a token works once, for one device, for a time."""

import io
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import click
import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from adapters.gateway import frames, websocket
from adapters.gateway.invitation import ENROLMENT, Invitation, read_invitation
from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError, EdgeAdaptError, TrustError
from aggregation.pki import Authority, IdentityKey, Reason
from aggregation.pki.requests import request
from aggregation.pki.tls import RENEWAL
from client.gateway import enrolment as device_side
from client.gateway.enrolment import enrol_with
from client.node.statedir import DeviceSettings, DeviceStateDir
from coordinator.authority import AuthorityStore
from coordinator.authority.store import utc_now
from coordinator.gateway.enrolment import ATTEMPTS, PAGES, EnrolmentServer, EnrolmentService, PageEnrolment
from coordinator.gateway.places import RefusalRates
from coordinator.gateway.websocket import BrowserSettings
from tests.support import refused
from tests.support.authority import signer, store
from tests.support.gateway import HOST
from tests.support.trial import call

__all__ = ["signer", "store"]
COORDINATOR = IdentityKey(bytes(range(32))).public
SETTINGS = DeviceSettings(base="some_base")
Invite = Callable[..., Invitation]


@pytest.fixture
def service(store: AuthorityStore, signer: Authority) -> Iterator[EnrolmentServer]:
    server = EnrolmentServer(EnrolmentService(store, signer, 30), f"{HOST}:0", [HOST])
    yield server
    server.close()


@pytest.fixture
def invite(store: AuthorityStore, service: EnrolmentServer) -> Invite:
    def made(name: str = "kitchen", hours: float = 1.0) -> Invitation:
        addresses = f"{HOST}:{service.port}", "gateway.example:9443"
        found = Invitation(SystemEntropy().bytes(16), name, *addresses, store.root.der, COORDINATOR.raw)
        store.invite(name, found.key.public, hours)
        return found

    return made


def enrol(invitation: Invitation, folder: Path) -> None:
    enrol_with(invitation, folder, SETTINGS, SystemEntropy(), wait=lambda seconds: None)


def issued(store: AuthorityStore) -> list[tuple[str, str]]:
    return [(each.name, each.purpose.value) for each, _ in store.certificates() if each.name != "enrolment"]


@pytest.mark.parametrize("from_input", [False, True], ids=["file", "standard input"])
def test_a_device_enrols_with_a_token_by_commands(
    store: AuthorityStore,
    service: EnrolmentServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    from_input: bool,
) -> None:
    (tmp_path / "coordinator.pem").write_bytes(COORDINATOR.to_pem())
    addresses = ("--enrolment", f"{HOST}:{service.port}", "--gateway", "gateway.example:9443")
    call(
        "authority",
        "invite",
        store.folder,
        "--name",
        "kitchen",
        "--coordinator",
        tmp_path / "coordinator.pem",
        *addresses,
    )
    token = capsys.readouterr().out.strip()
    (tmp_path / "kitchen.token").write_text(f"{token}\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(f"{token}\n".encode())))
    source = "-" if from_input else tmp_path / "kitchen.token"
    call("device", "enrol", "--state", tmp_path / "kitchen", "--base", "some_base", "--token-file", source)
    shown, state_dir = capsys.readouterr().out, DeviceStateDir.open(tmp_path / "kitchen")
    assert token not in shown
    assert store.root.fingerprint in shown
    assert COORDINATOR.key_id in shown
    assert (state_dir.root(), state_dir.coordinator) == (store.root, COORDINATOR)
    assert state_dir.settings.gateway == "gateway.example:9443"
    assert store.root.verify(state_dir.certificate, utc_now()) == ("kitchen", state_dir.identity.public)
    assert issued(store) == [("kitchen", "identity"), ("kitchen", "device-tls")]
    secret = read_invitation(token).secret
    assert not any(
        secret in path.read_bytes() or secret.hex().encode() in path.read_bytes() for path in store.folder.iterdir()
    )


def test_a_token_that_was_used_is_refused(store: AuthorityStore, invite: Invite, tmp_path: Path) -> None:
    invitation = invite()
    enrol(invitation, tmp_path / "first")
    with refused(TrustError, "gateway"):
        enrol(invitation, tmp_path / "second")
    assert len(issued(store)) == 2


def test_a_token_that_has_expired_is_refused(store: AuthorityStore, invite: Invite, tmp_path: Path) -> None:
    invitation = invite()._replace(secret=SystemEntropy().bytes(16))
    earlier = replace(store, clock=lambda: utc_now() - timedelta(hours=2))
    earlier.invite("kitchen", invitation.key.public, 1.9)
    with refused(TrustError, "gateway"):
        enrol(invitation, tmp_path / "kitchen")
    assert issued(store) == []
    other = invitation._replace(secret=SystemEntropy().bytes(16))
    earlier.invite("kitchen", other.key.public, 2.1)
    enrol(other, tmp_path / "kitchen")  # goes on with the keys in the folder


def test_a_token_that_nobody_issued_or_for_another_name_is_refused(
    store: AuthorityStore, invite: Invite, tmp_path: Path
) -> None:
    invitation = invite()
    for changed in (invitation._replace(secret=bytes(16)), invitation._replace(device="garage")):
        with refused(TrustError, "gateway"):
            enrol(changed, tmp_path / changed.device)
    assert issued(store) == []


def test_an_enrolment_whose_answer_did_not_arrive_is_repeated_with_the_same_keys(
    store: AuthorityStore, invite: Invite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    invitation, folder, genuine = invite(), tmp_path / "kitchen", device_side._call

    def broken(*given: object) -> bytes:
        genuine(*given)  # type: ignore[arg-type]
        raise EdgeAdaptError("the connection broke", about="enrolment")

    with monkeypatch.context() as patch:
        patch.setattr(device_side, "_call", broken)
        with refused(EdgeAdaptError, "enrolment"):
            enrol(invitation, folder)
    key = DeviceStateDir.open(folder).identity.public
    enrol(invitation, folder)
    assert DeviceStateDir.open(folder).identity.public == key
    assert len(issued(store)) == 2
    with refused(ConfigError, "--state"):
        enrol(invitation, folder)


def test_a_service_of_another_authority_gets_no_token(
    store: AuthorityStore, signer: Authority, invite: Invite, tmp_path: Path
) -> None:
    other = AuthorityStore.create(tmp_path / "other", "fleet", 3650, 30, None)
    server = EnrolmentServer(EnrolmentService(other, other.unlock(None), 30), f"{HOST}:0", [HOST])
    with refused(EdgeAdaptError, "enrolment"):
        enrol(invite()._replace(enrolment=f"{HOST}:{server.port}"), tmp_path / "kitchen")
    server.close()


def test_an_authority_that_cannot_be_reached_leaves_a_folder_to_go_on_with(invite: Invite, tmp_path: Path) -> None:
    invitation = invite()
    with socket.socket() as closed:
        closed.bind((HOST, 0))
        with refused(EdgeAdaptError, "enrolment"):
            enrol(invitation._replace(enrolment=f"{HOST}:{closed.getsockname()[1]}"), tmp_path / "kitchen")
    enrol(invitation, tmp_path / "kitchen")


def test_a_device_that_has_a_valid_certificate_is_not_enrolled_again_under_another_key(
    store: AuthorityStore, invite: Invite, tmp_path: Path
) -> None:
    enrol(invite(), tmp_path / "first")
    with refused(TrustError, "gateway"):
        enrol(invite(), tmp_path / "second")
    assert len(issued(store)) == 2


def test_malformed_and_too_many_calls_are_refused(store: AuthorityStore, service: EnrolmentServer) -> None:
    credentials = grpc.ssl_channel_credentials(store.root.to_pem())
    with grpc.secure_channel(f"{HOST}:{service.port}", credentials) as channel:
        codes = []
        for raw in [b"", b"\xff", bytes(100), *[b"\x0a\x01x"] * 100]:
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary(frames.ENROL)(raw, timeout=10)
            codes.append(caught.value.code())
    assert set(codes[:3]) == {grpc.StatusCode.INVALID_ARGUMENT}
    assert codes[-1] is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_token_that_was_not_copied_as_a_whole_is_refused(invite: Invite) -> None:
    text = invite().to_text()
    assert read_invitation(f" {text}\n").to_text() == text
    for damaged in ("", text[:-1], text[1:], text[:40] + text[41:], text.replace("edgeadapt1", "edgeadapt2"), "é" * 40):
        with refused(ConfigError, "--token-file"):
            read_invitation(damaged)


@pytest.mark.parametrize(
    ("enrolment", "gateway"), [("fleet.example", "a:1"), ("a:1", "fleet.example"), ("a:1", ",a:1"), ("[::1]", "a:1")]
)
def test_no_token_is_made_for_an_address_without_a_port(invite: Invite, enrolment: str, gateway: str) -> None:
    with refused(ConfigError, "invitation"):
        invite()._replace(enrolment=enrolment, gateway=gateway).to_text()


@given(st.text(max_size=60))
def test_a_text_that_is_no_invitation_raises_one_error(text: str) -> None:
    for given_text in (text, f"edgeadapt1.{text}"):
        with pytest.raises(ConfigError):
            read_invitation(given_text)


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--name", "kitchen"),
        ("--gateway", "a:1", "--name", "kitchen"),
        ("--token-file", "-", "--name", "kitchen"),
        ("--token-file", "-", "--authority", "authority.pem"),
        ("--token", "edgeadapt1.x"),  # would be in the list of processes
    ],
)
def test_options_that_do_not_go_together_are_refused(options: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises((ConfigError, click.NoSuchOption)):
        call("device", "enrol", "--state", tmp_path / "kitchen", "--base", "base", *options)
    assert not (tmp_path / "kitchen").exists()


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfe", b"edgeadapt1.x", b"edgeadapt1." + bytes(2**20)])
def test_a_file_without_an_invitation_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "token").write_bytes(content)
    with refused(ConfigError, "--token-file"):
        call(
            "device",
            "enrol",
            "--state",
            tmp_path / "kitchen",
            "--base",
            "base",
            "--token-file",
            tmp_path / "token",
        )
    assert not (tmp_path / "kitchen").exists()


def test_a_token_file_that_never_ends_or_is_not_there_is_refused(tmp_path: Path) -> None:
    for source, kind in (("/dev/zero", ConfigError), (tmp_path / "missing", FileNotFoundError)):
        with pytest.raises(kind):
            call("device", "enrol", "--state", tmp_path / "kitchen", "--base", "base", "--token-file", source)
    assert not (tmp_path / "kitchen").exists()


@dataclass
class InvitedPage:
    """A page's side of an enrolment."""

    url: str
    invitation: Invitation
    identity: IdentityKey
    origin: str | None = "http://127.0.0.1:8765"

    def message(self, **changes: bytes) -> bytes:
        asked = {"request": request(self.identity, self.invitation.device)} | changes
        signed = {"invited": self.invitation.key.public.raw} | {
            "signature": self.invitation.key.sign(ENROLMENT, asked["request"])
        }
        return websocket.ENROLMENT.encode(websocket.SocketEnrolment(**{**signed, **asked}))

    def ask(self, message: bytes | str) -> tuple[bytes | None, int, str]:
        """The certificate, if there is one, the close code and the reason."""
        certificate = None
        with connect(self.url, origin=self.origin, compression=None, max_size=None, proxy=None) as connection:  # type: ignore[arg-type]
            connection.send(message)
            try:
                while True:
                    certificate = connection.recv(60)
            except ConnectionClosed as closed:
                code, reason = (closed.rcvd.code, closed.rcvd.reason) if closed.rcvd else (1006, "")
        assert not isinstance(certificate, str)
        return certificate, code, reason


InvitePage = Callable[..., InvitedPage]


@pytest.fixture
def pages(store: AuthorityStore, signer: Authority) -> Iterator[PageEnrolment]:
    settings = BrowserSettings(f"{HOST}:0", frozenset({"https://fleet.example"}))
    server = EnrolmentServer(EnrolmentService(store, signer, 30), f"{HOST}:0", [HOST], settings)
    assert server.pages
    yield server.pages
    server.close()


@pytest.fixture
def invite_page(store: AuthorityStore, pages: PageEnrolment) -> InvitePage:
    def made(name: str = "tab", ago: float = 0.0) -> InvitedPage:
        addresses = f"{HOST}:1", f"{HOST}:2"
        found = Invitation(SystemEntropy().bytes(16), name, *addresses, store.root.der, COORDINATOR.raw)
        replace(store, clock=lambda: utc_now() - timedelta(hours=ago)).invite(name, found.key.public, 1.0)
        return InvitedPage(pages.url, found, IdentityKey.generate(SystemEntropy()))

    return made


def test_a_page_enrols_once_with_a_token_and_gets_the_same_certificate_again(
    store: AuthorityStore, invite_page: InvitePage
) -> None:
    tab = invite_page()
    certificate, code, _ = tab.ask(tab.message())
    assert certificate
    assert code == 1000
    assert store.root.verify(certificate, utc_now()) == ("tab", tab.identity.public)
    assert tab.ask(tab.message())[0] == certificate
    thief = replace(tab, identity=IdentityKey.generate(SystemEntropy()))
    assert thief.ask(thief.message())[:2] == (None, 1008)
    assert issued(store) == [("tab", "identity")]


def test_a_page_without_a_valid_token_gets_no_certificate(store: AuthorityStore, invite_page: InvitePage) -> None:
    tab, other, late = invite_page(), invite_page("other"), invite_page("late", ago=1.1)
    nobody = replace(tab, invitation=tab.invitation._replace(secret=bytes(16)))
    for asked in (
        late.message(),
        nobody.message(),
        tab.message(request=request(tab.identity, "other")),
        tab.message(request=b"no request"),
        tab.message(signature=other.invitation.key.sign(ENROLMENT, request(tab.identity, "tab"))),
        tab.message(invited=bytes(32)),
    ):
        certificate, code, reason = tab.ask(asked)
        assert (certificate, code) == (None, 1008)
        assert reason
    assert issued(store) == []
    assert tab.ask(tab.message())[1] == 1000


def test_a_service_of_a_thief_that_passes_a_pages_message_on_has_no_other_key_certified(
    store: AuthorityStore, invite_page: InvitePage
) -> None:
    tab, own = invite_page(), IdentityKey.generate(SystemEntropy())
    seen = websocket.ENROLMENT.decode(tab.message())
    mixed = replace(seen, request=request(own, "tab"))
    assert tab.ask(websocket.ENROLMENT.encode(mixed))[:2] == (None, 1008)
    certificate, _, _ = tab.ask(websocket.ENROLMENT.encode(seen))
    assert certificate
    assert store.root.verify(certificate, utc_now())[1] == tab.identity.public


def renewal(certificate: bytes, signer: IdentityKey) -> bytes:
    asked = websocket.SocketRenewal(certificate, signer.sign(RENEWAL, certificate))
    return websocket.RENEWAL.encode(asked)


def renewing(tab: InvitedPage) -> InvitedPage:
    """The same page, at the address for renewals."""
    return replace(tab, url=tab.url.replace(websocket.ENROLMENT_PATH, websocket.RENEWAL_PATH))


def test_a_page_renews_its_certificate_for_the_same_key_until_it_has_expired_or_is_revoked(
    store: AuthorityStore, signer: Authority, pages: PageEnrolment, invite_page: InvitePage
) -> None:
    tab = invite_page()
    fresh, _, _ = tab.ask(tab.message())
    assert fresh
    assert renewing(tab).ask(renewal(fresh, tab.identity))[0] == fresh  # it does not end soon
    tab = invite_page("phone")
    pages.service.days = 20 / 1440  # less than a third of a validity that began an hour before
    first, _, _ = tab.ask(tab.message())
    pages.service.days = 30
    assert first
    second, code, _ = renewing(tab).ask(renewal(first, tab.identity))
    assert second
    assert code == 1000
    assert second != first
    assert store.root.verify(second, utc_now()) == ("phone", tab.identity.public)
    assert renewing(tab).ask(renewal(first, tab.identity))[0] == second  # as when the answer did not arrive
    earlier = replace(store, clock=lambda: utc_now() - timedelta(days=2))
    expired = earlier.issue(signer, "phone", tab.identity.public, 1)
    foreign = AuthorityStore.create(store.folder.with_name("other"), "fleet", 3650, 30, None)
    unknown = foreign.issue(foreign.unlock(None), "phone", tab.identity.public, 1)
    thief = IdentityKey.generate(SystemEntropy())
    for message in (renewal(expired, tab.identity), renewal(unknown, tab.identity), renewal(second, thief)):
        certificate, code, reason = renewing(tab).ask(message)
        assert (certificate, code) == (None, 1008)
        assert "enrol this device again, with a token" in reason
    store.revoke(signer, "phone", Reason.KEY_COMPROMISE, 30)
    certificate, code, reason = renewing(tab).ask(renewal(second, tab.identity))
    assert (certificate, code) == (None, 1008)
    assert "revoked" in reason
    for message in (b"", tab.message(), renewal(first, tab.identity)[:-1]):
        assert renewing(tab).ask(message)[:2] == (None, 1007)


def test_a_page_that_renews_without_end_is_refused_and_another_one_is_not(invite_page: InvitePage) -> None:
    tab, other = invite_page(), invite_page("other")
    certificates = [each.ask(each.message())[0] for each in (tab, other)]
    assert all(certificates)
    codes = [renewing(tab).ask(renewal(certificates[0] or b"", tab.identity))[1] for _ in range(ATTEMPTS + 1)]
    assert codes == [1000] * ATTEMPTS + [1013]  # which a page takes for no refusal
    assert renewing(other).ask(renewal(certificates[1] or b"", other.identity))[1] == 1000


def test_malformed_oversized_and_too_many_messages_of_pages_are_refused(invite_page: InvitePage) -> None:
    tab = invite_page()
    for message, code in ((b"", 1007), (b"\xff" * 200, 1007), ("text", 1007), (bytes(2**14 + 1), 1009)):
        assert tab.ask(message)[:2] == (None, code)
    assert tab.ask(tab.message()[:-1])[:2] == (None, 1007)
    assert tab.ask(tab.message())[1] == 1000
    codes = [tab.ask(b"")[1] for _ in range(80)]
    assert 1013 in codes


@pytest.mark.parametrize("flooded", PAGES)
def test_a_network_that_is_refused_too_often_has_to_wait_and_its_valid_pages_are_served(
    pages: PageEnrolment, invite_page: InvitePage, monkeypatch: pytest.MonkeyPatch, flooded: str
) -> None:
    tab, other = invite_page(), invite_page("other")
    certificate = tab.ask(tab.message())[0] or b""
    monkeypatch.setattr(pages.service, "_refusals", RefusalRates(4, 1e9))
    flood = replace(tab, url=tab.url.replace(websocket.ENROLMENT_PATH, flooded))
    assert [flood.ask(b"")[1] for _ in range(6)] == 4 * [1007] + 2 * [1013]
    assert other.ask(other.message())[1] == 1000
    assert renewing(tab).ask(renewal(certificate, tab.identity))[1] == 1000


def test_an_invitation_that_is_presented_without_end_has_to_wait_and_another_one_does_not(
    invite_page: InvitePage,
) -> None:
    tab, other = invite_page(), invite_page("other")
    codes = [tab.ask(tab.message())[1] for _ in range(ATTEMPTS + 1)]
    assert codes == [1000] * ATTEMPTS + [1013]
    assert other.ask(other.message())[1] == 1000


def test_a_page_of_another_origin_gets_no_connection_to_the_authority(invite_page: InvitePage) -> None:
    tab = invite_page()
    for origin in ("https://evil.example", None):
        with pytest.raises(InvalidStatus) as caught:
            replace(tab, origin=origin).ask(tab.message())
        assert caught.value.response.status_code == 403
    assert replace(tab, origin="https://fleet.example").ask(tab.message())[1] == 1000


def test_an_invitation_for_a_page_that_was_used_enrols_no_other_device(
    store: AuthorityStore, invite: Invite, invite_page: InvitePage, tmp_path: Path
) -> None:
    tab = invite_page()
    assert tab.ask(tab.message())[1] == 1000
    with refused(TrustError, "gateway"):
        enrol(tab.invitation._replace(enrolment=invite("another").enrolment), tmp_path / "tab")
    assert issued(store) == [("tab", "identity")]


def test_a_second_service_at_the_address_of_pages_is_refused_in_one_line(
    store: AuthorityStore, signer: Authority, pages: PageEnrolment
) -> None:
    address = pages.url.split("/")[2]
    with refused(ConfigError, "websocket", value=address):
        EnrolmentServer(EnrolmentService(store, signer, 30), f"{HOST}:0", [HOST], BrowserSettings(address))
