"""TLS certificates: of P-256, for one side only, and bound to the identity of the same device."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError, TrustError
from aggregation.pki import Authority, IdentityKey
from aggregation.pki.requests import read_request, request
from aggregation.pki.revocation import Revocation
from aggregation.pki.tls import TlsKey, TlsRole, bind, read_tls_request, verify_binding, verify_tls
from tests.support import refused

NOW = datetime(2026, 6, 1, tzinfo=UTC)
DAY = timedelta(days=1)
AUTHORITY = Authority.create("fleet", SystemEntropy(), NOW - DAY, NOW + 10 * DAY)
STRANGER = Authority.create("fleet", SystemEntropy(), NOW - DAY, NOW + 10 * DAY)
VALID: dict[str, Any] = {"not_before": NOW - DAY, "not_after": NOW + DAY, "serial": 7}


def leaf(name: str, authority: Authority = AUTHORITY, role: TlsRole = TlsRole.DEVICE, **changes: Any) -> bytes:
    asked, key = read_tls_request(TlsKey.generate(SystemEntropy()).request(name))
    hosts = ("gateway.example", "192.0.2.1", "::1") if role is TlsRole.GATEWAY else ()
    return authority.issue_tls(asked, key, role, hosts, **{**VALID, **changes})


def enrolled(name: str) -> tuple[IdentityKey, bytes]:
    identity = IdentityKey.generate(SystemEntropy())
    dates = {"not_before": NOW - DAY, "not_after": NOW + DAY}
    return identity, AUTHORITY.issue(name, identity.public, **dates)


def test_a_certificate_names_its_device_or_its_hosts() -> None:
    assert verify_tls(AUTHORITY.root, leaf("kitchen"), TlsRole.DEVICE, NOW) == "kitchen"
    of_gateway = leaf("gateway", role=TlsRole.GATEWAY)
    assert verify_tls(AUTHORITY.root, of_gateway, TlsRole.GATEWAY, NOW) == "gateway"
    names = x509.load_der_x509_certificate(of_gateway).extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert names.value.get_values_for_type(x509.DNSName) == ["gateway.example"]
    assert [str(each) for each in names.value.get_values_for_type(x509.IPAddress)] == ["192.0.2.1", "::1"]


def test_a_certificate_for_one_side_of_tls_is_refused_on_the_other() -> None:
    for role, other in ((TlsRole.DEVICE, TlsRole.GATEWAY), (TlsRole.GATEWAY, TlsRole.DEVICE)):
        with refused(TrustError, "tls.usage"):
            verify_tls(AUTHORITY.root, leaf("kitchen", role=role), other, NOW)


def test_an_identity_is_no_tls_certificate_and_a_tls_certificate_no_identity() -> None:
    _, certificate = enrolled("kitchen")
    with refused(TrustError, "tls.usage"):
        verify_tls(AUTHORITY.root, certificate, TlsRole.DEVICE, NOW)
    with refused(TrustError, "certificate.key"):
        AUTHORITY.root.verify(leaf("kitchen"), NOW)


def test_another_authority_of_the_same_name_is_refused() -> None:
    with refused(TrustError, "tls.issuer"):
        verify_tls(AUTHORITY.root, leaf("kitchen", STRANGER), TlsRole.DEVICE, NOW)


@pytest.mark.parametrize("at", [NOW - 2 * DAY, NOW + 2 * DAY])
def test_a_certificate_is_refused_outside_its_validity(at: datetime) -> None:
    with refused(TrustError, "tls.validity"):
        verify_tls(AUTHORITY.root, leaf("kitchen"), TlsRole.DEVICE, at)


def test_a_revoked_certificate_is_refused() -> None:
    listed = AUTHORITY.revocations(1, {7: Revocation(NOW)}, NOW, NOW + DAY)
    root = AUTHORITY.root.with_revocations(listed.der)
    assert verify_tls(root, leaf("kitchen", serial=8), TlsRole.DEVICE, NOW) == "kitchen"
    with refused(TrustError, "tls.revoked"):
        verify_tls(root, leaf("kitchen"), TlsRole.DEVICE, NOW)


def test_a_binding_names_the_device_that_has_both_keys() -> None:
    identity, certificate = enrolled("kitchen")
    own = leaf("kitchen")
    assert verify_binding(AUTHORITY.root, own, certificate, bind(identity, own), NOW) == "kitchen"


def test_a_connection_with_the_identity_of_another_device_is_refused() -> None:
    identity, certificate = enrolled("kitchen")
    other, other_certificate = enrolled("garage")
    own, second = leaf("kitchen"), leaf("kitchen")
    for tls, of, binding, about in (
        (own, other_certificate, bind(other, own), "tls.binding"),  # another device's name
        (own, certificate, bind(other, own), "signature"),  # signed by another device
        (second, certificate, bind(identity, own), "signature"),  # another key under the same name
        (own, certificate, b"", "signature"),
    ):
        with refused(TrustError, about):
            verify_binding(AUTHORITY.root, tls, of, binding, NOW)


def test_a_request_for_a_key_of_another_kind_is_refused() -> None:
    with refused(TrustError, "request.key"):
        read_tls_request(request(IdentityKey.generate(SystemEntropy()), "kitchen"))
    with refused(TrustError, "request.key"):
        read_request(TlsKey.generate(SystemEntropy()).request("kitchen"))


def test_a_gateway_has_hosts_and_a_device_has_none() -> None:
    _, key = read_tls_request(TlsKey.generate(SystemEntropy()).request("kitchen"))
    for role, hosts in ((TlsRole.GATEWAY, ()), (TlsRole.DEVICE, ("a.example",)), (TlsRole.GATEWAY, ("not a host",))):
        with refused(ConfigError, "tls.hosts"):
            AUTHORITY.issue_tls("kitchen", key, role, hosts, **VALID)


def test_a_key_shows_its_secret_in_no_repr_and_other_keys_are_refused() -> None:
    key = TlsKey.generate(SystemEntropy())
    assert repr(key) == "TlsKey()"
    for pem in (b"", b"no key", IdentityKey.generate(SystemEntropy()).to_pem()):
        with pytest.raises(TrustError):
            TlsKey(pem)


@given(st.binary(max_size=400))
def test_bytes_that_are_no_certificate_raise_one_error(raw: bytes) -> None:
    with pytest.raises(TrustError):
        verify_tls(AUTHORITY.root, raw, TlsRole.DEVICE, NOW)
    with pytest.raises(TrustError):
        read_tls_request(raw)
