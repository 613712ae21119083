"""What the authority certifies again, without a network: until when, how often, and what a repeated request gets."""

from dataclasses import replace
from datetime import timedelta

import pytest

from aggregation.errors import TrustError
from aggregation.pki import Authority
from aggregation.pki.certificates import load
from aggregation.pki.requests import request
from edgeadapt.authority import AuthorityStore
from edgeadapt.formats.gateway.invitation import ENROLMENT
from edgeadapt.formats.gateway.invitation import key as invitation_key
from edgeadapt.formats.gateway.messages import RENEWAL_TAG
from tests.support import refused
from tests.support.authority import new_key

INVITED = invitation_key(bytes(range(16)))
DAYS = 30


class Device:
    """A device with a certificate of so many days."""

    def __init__(self, store: AuthorityStore, signer: Authority, days: float = DAYS) -> None:
        self.store, self.signer, self.identity = store, signer, new_key()
        store.invite("kitchen", INVITED.public, 1.0)
        asked = request(self.identity, "kitchen")
        signed = INVITED.public.raw, INVITED.sign(ENROLMENT, asked), asked
        self.held = store.redeem(signer, *signed, days=days, admit=lambda token: None)

    def renew(self, held: bytes, **after: float) -> bytes:
        now = self.store.clock() + timedelta(**after)
        store, signature = replace(self.store, clock=lambda: now), self.identity.sign(RENEWAL_TAG, held)
        return store.renew(self.signer, held, signature, days=DAYS, admit=lambda name: None)


def test_a_device_gets_the_certificate_that_it_has_until_that_has_half_of_its_validity_left(
    store: AuthorityStore, signer: Authority
) -> None:
    """It asks when a third is left: its clock may be a sixth of the validity ahead."""
    device = Device(store, signer)
    assert {device.renew(device.held, days=days) for days in (0, 14)} == {device.held}
    renewed = device.renew(device.held, days=16)
    assert renewed != device.held
    assert device.renew(device.held, days=25) == renewed  # an answer that did not arrive is given once more
    assert len(store.certificates()) == 2
    assert device.renew(renewed, days=40) not in (renewed, device.held)
    with refused(TrustError, "certificate.validity"):
        device.renew(device.held, days=31)


def test_the_last_renewals_end_with_the_authority_and_the_record_does_not_grow(
    store: AuthorityStore, signer: Authority
) -> None:
    device = Device(store, signer, 3645)
    renewed = device.renew(device.held, days=3640)
    assert load(renewed).not_valid_after_utc == store.root.not_after
    assert device.renew(renewed, days=3649) == renewed
    assert len(store.certificates()) == 2


@pytest.mark.parametrize("tls_key", ["null", '"0123456789abcdef"', None], ids=["page", "light device", "now"])
def test_an_invitation_that_was_used_before_is_for_its_key_still(
    store: AuthorityStore, signer: Authority, tls_key: str | None
) -> None:
    """Until 2026-12 the record had the TLS keys of light devices."""
    device, record = Device(store, signer), store.folder / "record.jsonl"
    text = record.read_text()
    assert ', "tls_key": null' in text
    record.write_text(text.replace(', "tls_key": null', f', "tls_key": {tls_key}' if tls_key else ""))
    asked = request(device.identity, "kitchen")
    signed = INVITED.public.raw, INVITED.sign(ENROLMENT, asked), asked
    assert store.redeem(signer, *signed, days=DAYS, admit=lambda token: None) == device.held
