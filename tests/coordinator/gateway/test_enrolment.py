"""The authority's service over both carriers: who gets a first certificate, who a newer one, and who none."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta

import pytest
from websockets.exceptions import InvalidStatus

from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError
from aggregation.pki import Authority, IdentityKey, Reason
from aggregation.pki.requests import request
from coordinator.gateway.carriers import BrowserSettings
from coordinator.gateway.enrolment import ATTEMPTS, LARGEST, EnrolmentServer, EnrolmentService
from coordinator.gateway.places import RefusalRates
from edgeadapt.authority import AuthorityStore
from edgeadapt.authority.store import utc_now
from edgeadapt.formats.gateway import messages
from edgeadapt.formats.gateway.invitation import ENROLMENT, Invitation
from tests.support import refused
from tests.support.authority import new_key, signer, store
from tests.support.gateway import HOST
from tests.support.lightdevice import CARRIERS, SOCKET, Kind, Over, talk_of

__all__ = ["signer", "store"]
COORDINATOR = IdentityKey(bytes(range(32))).public
PATHS = messages.ENROL, messages.RENEW


@pytest.fixture
def service(store: AuthorityStore, signer: Authority) -> Iterator[EnrolmentServer]:
    browsers = BrowserSettings(f"{HOST}:0", frozenset({"https://fleet.example"}))
    server = EnrolmentServer(EnrolmentService(store, signer, 30), f"{HOST}:0", [HOST], browsers)
    yield server
    server.close()


@dataclass
class InvitedDevice:
    """A device's side, message by message."""

    server: EnrolmentServer
    authority: Authority
    invitation: Invitation
    carrier: str
    identity: IdentityKey = field(default_factory=new_key)

    def enrolment(self, **changes: bytes) -> bytes:
        asked = {"request": request(self.identity, self.invitation.device)} | changes
        signed = {"invited": self.invitation.key.public.raw} | {
            "signature": self.invitation.key.sign(ENROLMENT, asked["request"])
        }
        return messages.ENROLMENT.encode(messages.DeviceEnrolment(**{**signed, **asked}))

    def renewal(self, certificate: bytes, key: IdentityKey | None = None) -> bytes:
        signature = (key or self.identity).sign(messages.RENEWAL_TAG, certificate)
        return messages.RENEWAL.encode(messages.DeviceRenewal(certificate, signature))

    def ask(self, message: bytes, path: str = messages.ENROL, **options: object) -> bytes | Over:
        """The certificate, or why there is none."""
        talk = talk_of(self.carrier, self.server, path, self.authority, **options)
        talk.send(message)
        try:
            return talk.receive(60)
        except Over as over:
            return over
        finally:
            talk.close()

    def kind(self, message: bytes, path: str = messages.ENROL) -> Kind:
        found = self.ask(message, path)
        return found.kind if isinstance(found, Over) else Kind.DONE

    def enrolled(self) -> bytes:
        found = self.ask(self.enrolment())
        assert isinstance(found, bytes), found
        return found


Invite = Callable[..., InvitedDevice]


@pytest.fixture(params=CARRIERS)
def invite(
    request: pytest.FixtureRequest, store: AuthorityStore, signer: Authority, service: EnrolmentServer
) -> Invite:
    def made(name: str = "kitchen", ago: float = 0.0) -> InvitedDevice:
        addresses = f"{HOST}:{service.port}", f"{HOST}:1"
        found = Invitation(SystemEntropy().bytes(16), name, *addresses, store.root.der, COORDINATOR.raw)
        replace(store, clock=lambda: utc_now() - timedelta(hours=ago)).invite(name, found.key.public, 1.0)
        return InvitedDevice(service, signer, found, str(request.param))

    return made


def issued(store: AuthorityStore) -> list[tuple[str, str]]:
    return [(each.name, each.purpose.value) for each, _ in store.certificates() if each.name != "enrolment"]


def test_a_device_enrols_once_with_a_token_and_gets_the_same_certificate_again(
    store: AuthorityStore, invite: Invite
) -> None:
    kitchen = invite()
    certificate = kitchen.enrolled()
    assert store.root.verify(certificate, utc_now()) == ("kitchen", kitchen.identity.public)
    assert kitchen.enrolled() == certificate
    thief = replace(kitchen, identity=new_key(), carrier=next(each for each in CARRIERS if each != kitchen.carrier))
    assert thief.kind(thief.enrolment()) is Kind.REFUSED
    assert issued(store) == [("kitchen", "identity")]


def test_a_device_without_a_valid_token_gets_no_certificate(store: AuthorityStore, invite: Invite) -> None:
    kitchen, other, late = invite(), invite("other"), invite("late", ago=1.1)
    nobody = replace(kitchen, invitation=kitchen.invitation._replace(secret=bytes(16)))
    for asked in (
        late.enrolment(),
        nobody.enrolment(),
        kitchen.enrolment(request=request(kitchen.identity, "other")),
        kitchen.enrolment(request=b"no request"),
        kitchen.enrolment(signature=other.invitation.key.sign(ENROLMENT, request(kitchen.identity, "kitchen"))),
        kitchen.enrolment(invited=bytes(32)),
    ):
        found = kitchen.ask(asked)
        assert isinstance(found, Over)
        assert found.kind is Kind.REFUSED
        assert found.reason
    assert issued(store) == []
    kitchen.enrolled()
    second = invite()
    assert second.kind(second.enrolment()) is Kind.REFUSED  # the name has a valid certificate with another key


def test_whoever_passes_a_message_on_has_no_other_key_certified(store: AuthorityStore, invite: Invite) -> None:
    kitchen, own = invite(), new_key()
    seen = messages.ENROLMENT.decode(kitchen.enrolment())
    mixed = replace(seen, request=request(own, "kitchen"))
    assert kitchen.kind(messages.ENROLMENT.encode(mixed)) is Kind.REFUSED
    certificate = kitchen.ask(messages.ENROLMENT.encode(seen))
    assert isinstance(certificate, bytes)
    assert store.root.verify(certificate, utc_now())[1] == kitchen.identity.public


def test_a_device_renews_its_certificate_for_the_same_key_until_it_has_expired_or_is_revoked(
    store: AuthorityStore, signer: Authority, service: EnrolmentServer, invite: Invite
) -> None:
    kitchen = invite()
    fresh = kitchen.enrolled()
    assert kitchen.ask(kitchen.renewal(fresh), messages.RENEW) == fresh  # it does not end soon
    phone = invite("phone")
    service.service.days = 20 / 1440  # less than a third of a validity that began an hour before
    first = phone.enrolled()
    service.service.days = 30
    second = phone.ask(phone.renewal(first), messages.RENEW)
    assert isinstance(second, bytes)
    assert second != first
    assert store.root.verify(second, utc_now()) == ("phone", phone.identity.public)
    assert phone.ask(phone.renewal(first), messages.RENEW) == second  # as when the answer did not arrive
    earlier = replace(store, clock=lambda: utc_now() - timedelta(days=2))
    expired = earlier.issue(signer, "phone", phone.identity.public, 1)
    foreign = AuthorityStore.create(store.folder.with_name("other"), "fleet", 3650, 30, None)
    unknown = foreign.issue(foreign.unlock(None), "phone", phone.identity.public, 1)
    asked = phone.renewal(expired), phone.renewal(unknown), phone.renewal(second, new_key())
    refusals = [phone.ask(message, messages.RENEW) for message in asked]
    store.revoke(signer, "phone", Reason.KEY_COMPROMISE, 30)
    refusals.append(phone.ask(phone.renewal(second), messages.RENEW))
    for found in refusals:
        assert isinstance(found, Over)
        assert found.kind is Kind.REFUSED
        assert "enrol this device again, with a token" in found.reason
    for message in (b"", phone.enrolment(), phone.renewal(first)[:-1]):
        assert phone.kind(message, messages.RENEW) is Kind.INVALID


def test_who_renews_or_presents_a_token_without_end_has_to_wait_and_others_do_not(invite: Invite) -> None:
    kitchen, other = invite(), invite("other")
    enrolments = [kitchen.kind(kitchen.enrolment()) for _ in range(ATTEMPTS + 1)]
    certificate = other.enrolled()
    renewals = [other.kind(other.renewal(certificate), messages.RENEW) for _ in range(ATTEMPTS + 1)]
    assert enrolments == renewals == [Kind.DONE] * ATTEMPTS + [Kind.LATER]
    invite("third").enrolled()


@pytest.mark.parametrize("flooded", PATHS)
def test_a_network_that_is_refused_too_often_has_to_wait_and_its_valid_devices_are_served(
    service: EnrolmentServer, invite: Invite, monkeypatch: pytest.MonkeyPatch, flooded: str
) -> None:
    kitchen, other = invite(), invite("other")
    certificate = kitchen.enrolled()
    monkeypatch.setattr(service.service, "_refusals", RefusalRates(4, 1e9))
    assert [kitchen.kind(b"", flooded) for _ in range(6)] == 4 * [Kind.INVALID] + 2 * [Kind.LATER]
    other.enrolled()
    assert kitchen.kind(kitchen.renewal(certificate), messages.RENEW) is Kind.DONE


def test_malformed_and_oversized_messages_are_refused(invite: Invite) -> None:
    kitchen = invite()
    for message in (b"", b"\xff" * 200, kitchen.enrolment()[:-1]):
        assert kitchen.kind(message) is Kind.INVALID
    assert kitchen.kind(bytes(LARGEST + 1)) is Kind.LATER
    kitchen.enrolled()


def test_a_page_of_another_origin_gets_no_connection_to_the_authority(invite: Invite) -> None:
    tab = replace(invite(), carrier=SOCKET)
    for origin in ("https://evil.example", None):
        with pytest.raises(InvalidStatus) as caught:
            tab.ask(tab.enrolment(), origin=origin)
        assert caught.value.response.status_code == 403
    assert isinstance(tab.ask(tab.enrolment(), origin="https://fleet.example"), bytes)


def test_a_second_service_at_an_address_is_refused_in_one_line(
    store: AuthorityStore, signer: Authority, service: EnrolmentServer
) -> None:
    second = EnrolmentService(store, signer, 30)
    with refused(ConfigError, "--listen", value=f"{HOST}:{service.port}"):
        EnrolmentServer(second, f"{HOST}:{service.port}", [HOST])
    pages = service.url("").split("/")[2]
    with refused(ConfigError, "websocket", value=pages):
        EnrolmentServer(second, f"{HOST}:0", [HOST], BrowserSettings(pages))
