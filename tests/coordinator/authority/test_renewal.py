"""What the authority certifies again, without a network: until when, how often, and what a repeated request gets."""

from dataclasses import dataclass, field, replace
from datetime import timedelta

import pytest

from adapters.gateway.invitation import key as invitation_key
from aggregation.entropy import SystemEntropy
from aggregation.errors import TrustError
from aggregation.pki import Authority, IdentityKey
from aggregation.pki.certificates import load
from aggregation.pki.requests import request
from aggregation.pki.tls import RENEWAL, TlsKey
from coordinator.authority import AuthorityStore
from coordinator.authority.rules import MOST_TLS
from tests.support import refused
from tests.support.authority import new_key

SECRET = bytes(range(16))
DAYS = 30


@dataclass
class Device:
    """A device with certificates, at a time ``after`` now."""

    store: AuthorityStore
    signer: Authority
    identity: IdentityKey = field(default_factory=new_key)
    tls_key: TlsKey = field(default_factory=lambda: TlsKey.generate(SystemEntropy()))
    held: tuple[bytes, bytes] = (b"", b"")

    def enrol(self, days: float = DAYS) -> None:
        self.store.invite("kitchen", invitation_key(SECRET).public, 1.0)
        requests = request(self.identity, "kitchen"), self.tls_key.request("kitchen")
        self.held = self.store.redeem(self.signer, SECRET, *requests, days=days, admit=lambda token: None)

    def at(self, **after: float) -> AuthorityStore:
        now = self.store.clock() + timedelta(**after)
        return replace(self.store, clock=lambda: now)

    def renew(self, store: AuthorityStore, key: TlsKey, held: tuple[bytes, bytes] | None = None) -> tuple[bytes, bytes]:
        (certificate, tls), asked = held or self.held, key.request("kitchen")
        signature = self.identity.sign(RENEWAL, asked)
        return store.renew(self.signer, tls, certificate, signature, asked, days=DAYS, admit=lambda name: None)

    def renew_page(self, store: AuthorityStore, certificate: bytes) -> bytes:
        signature = self.identity.sign(RENEWAL, certificate)
        return store.renew_page(self.signer, certificate, signature, days=DAYS, admit=lambda name: None)


@pytest.fixture
def device(store: AuthorityStore, signer: Authority) -> Device:
    found = Device(store, signer)
    found.enrol()
    return found


def new_tls() -> TlsKey:
    return TlsKey.generate(SystemEntropy())


def test_the_last_renewals_end_with_the_authority(store: AuthorityStore, signer: Authority) -> None:
    device = Device(store, signer)
    device.enrol(3645)
    later = device.at(days=3640)
    for der in (*device.renew(later, new_tls()), device.renew_page(later, device.held[0])):
        assert load(der).not_valid_after_utc == store.root.not_after


def test_a_fresh_device_gets_no_other_tls_key_and_a_fresh_page_what_it_has(device: Device) -> None:
    issued = len(device.store.certificates())
    for early in (device.store, device.at(days=14)):
        with refused(TrustError, "renewal.due") as caught:
            device.renew(early, new_tls())
        assert "can be renewed from" in str(caught.value)
        assert device.renew(early, device.tls_key) == device.held
        assert device.renew_page(early, device.held[0]) == device.held[0]
    assert len(device.store.certificates()) == issued


def test_a_clock_that_is_a_sixth_of_the_validity_ahead_is_no_obstacle(device: Device) -> None:
    """A device asks when a third is left."""
    renewed = device.renew(device.at(days=16), new_tls())
    assert not set(renewed) & set(device.held)


def test_an_answer_that_did_not_arrive_is_given_once_more(device: Device) -> None:
    late, key = device.at(days=25), new_tls()
    renewed, issued = device.renew(late, key), len(device.store.certificates())
    assert device.renew(device.at(days=26), key) == renewed
    assert device.renew_page(late, device.held[0]) == renewed[0]
    assert len(device.store.certificates()) == issued
    again = device.renew(device.at(days=50), key, renewed)  # which ends soon by now
    assert not set(again) & set(renewed)


def test_a_device_that_asks_for_ever_new_tls_keys_gets_few(device: Device) -> None:
    late = device.at(days=25)
    with refused(TrustError, "renewal.count") as caught:
        for _ in range(MOST_TLS + 1):
            device.renew(late, new_tls())
    assert "with a token" in str(caught.value)
    assert len(device.store.certificates()) == 2 + MOST_TLS  # with both of its first, and one for the identity


def test_the_record_does_not_grow_when_the_authority_ends_soon(store: AuthorityStore, signer: Authority) -> None:
    device, key = Device(store, signer), new_tls()
    device.enrol(3645)
    renewed, issued = device.renew(device.at(days=3640), key), len(store.certificates())
    assert device.renew(device.at(days=3649), key, renewed) == renewed
    assert len(store.certificates()) == issued
