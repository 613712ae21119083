"""What the authority certifies again, without a network: until when, how often, and what a repeated request gets."""

from dataclasses import dataclass, field, replace
from datetime import timedelta

import pytest

from adapters.gateway.invitation import key as invitation_key
from aggregation.entropy import SystemEntropy
from aggregation.pki import Authority, IdentityKey
from aggregation.pki.certificates import load
from aggregation.pki.requests import request
from aggregation.pki.tls import RENEWAL, TlsKey
from coordinator.authority import AuthorityStore
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
        self.held = self.store.redeem(self.signer, SECRET, *requests, days=days)

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
