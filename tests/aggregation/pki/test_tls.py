"""TLS certificates of gateways: of P-256, for the server's side only, with the names of its hosts."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError, TrustError
from aggregation.pki import Authority, IdentityKey
from aggregation.pki.requests import read_request, request
from aggregation.pki.revocation import Revocation
from aggregation.pki.tls import TlsKey, hosts_of, read_tls_request, verify_tls
from tests.support import refused

NOW = datetime(2026, 6, 1, tzinfo=UTC)
DAY = timedelta(days=1)
AUTHORITY = Authority.create("fleet", SystemEntropy(), NOW - DAY, NOW + 10 * DAY)
STRANGER = Authority.create("fleet", SystemEntropy(), NOW - DAY, NOW + 10 * DAY)
VALID: dict[str, Any] = {"not_before": NOW - DAY, "not_after": NOW + DAY, "serial": 7}


HOSTS = ("gateway.example", "192.0.2.1", "::1")


def leaf(authority: Authority = AUTHORITY, **changes: Any) -> bytes:
    name, key = read_tls_request(TlsKey.generate(SystemEntropy()).request("gateway"))
    return authority.issue_tls(name, key, HOSTS, **{**VALID, **changes})


def test_a_certificate_names_its_gateway_and_its_hosts() -> None:
    assert verify_tls(AUTHORITY.root, leaf(), NOW) == "gateway"
    assert hosts_of(leaf()) == HOSTS


def test_what_a_device_has_is_not_a_gateways_tls_certificate_and_the_reverse(monkeypatch: pytest.MonkeyPatch) -> None:
    dates = {"not_before": NOW - DAY, "not_after": NOW + DAY}
    identity = AUTHORITY.issue("kitchen", IdentityKey.generate(SystemEntropy()).public, **dates)
    client = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])  # of a light device until 2026-12
    monkeypatch.setattr("aggregation.pki.authority.extensions", lambda hosts: (client,))
    for der in (identity, leaf()):
        with refused(TrustError, "tls.usage"):
            verify_tls(AUTHORITY.root, der, NOW)
    with refused(TrustError, "certificate.key"):
        AUTHORITY.root.verify(leaf(), NOW)


def test_another_authority_of_the_same_name_is_refused() -> None:
    with refused(TrustError, "tls.issuer"):
        verify_tls(AUTHORITY.root, leaf(STRANGER), NOW)


@pytest.mark.parametrize("at", [NOW - 2 * DAY, NOW + 2 * DAY])
def test_a_certificate_is_refused_outside_its_validity(at: datetime) -> None:
    with refused(TrustError, "tls.validity"):
        verify_tls(AUTHORITY.root, leaf(), at)


def test_a_revoked_certificate_is_refused() -> None:
    listed = AUTHORITY.revocations(1, {7: Revocation(NOW)}, NOW, NOW + DAY)
    root = AUTHORITY.root.with_revocations(listed.der)
    assert verify_tls(root, leaf(serial=8), NOW) == "gateway"
    with refused(TrustError, "tls.revoked"):
        verify_tls(root, leaf(), NOW)


def test_a_request_for_a_key_of_another_kind_is_refused() -> None:
    with refused(TrustError, "request.key"):
        read_tls_request(request(IdentityKey.generate(SystemEntropy()), "kitchen"))
    with refused(TrustError, "request.key"):
        read_request(TlsKey.generate(SystemEntropy()).request("kitchen"))


def test_a_gateway_has_hosts() -> None:
    _, key = read_tls_request(TlsKey.generate(SystemEntropy()).request("gateway"))
    for hosts in ((), ("not a host",)):
        with refused(ConfigError, "tls.hosts"):
            AUTHORITY.issue_tls("gateway", key, hosts, **VALID)


def test_a_key_shows_its_secret_in_no_repr_and_other_keys_are_refused() -> None:
    key = TlsKey.generate(SystemEntropy())
    assert repr(key) == "TlsKey()"
    for pem in (b"", b"no key", IdentityKey.generate(SystemEntropy()).to_pem()):
        with pytest.raises(TrustError):
            TlsKey(pem)
