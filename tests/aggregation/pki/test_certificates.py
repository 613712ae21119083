"""The authority: only what it certified is accepted."""

import base64
import datetime as dt
import itertools
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import NameOID
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aggregation.errors import ConfigError, TrustError
from aggregation.pki import Authority, Root, new_serial, requests
from aggregation.pki.identity import IdentityKey
from tests.support import bits_flipped, refused

BEGIN = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
END = dt.datetime(2027, 1, 1, tzinfo=dt.UTC)
DAY, SECOND = dt.timedelta(days=1), dt.timedelta(seconds=1)


@pytest.fixture
def authority(entropy: Any) -> Authority:
    return Authority.create("fleet", entropy, BEGIN, END)


@pytest.fixture
def identity(entropy: Any) -> IdentityKey:
    return IdentityKey.generate(entropy)


@pytest.fixture
def certificate(authority: Authority, identity: IdentityKey) -> bytes:
    return authority.issue("kitchen-1", identity.public, not_before=BEGIN, not_after=END)


def unknown(number: int, *, critical: bool) -> tuple[x509.ExtensionType, bool]:
    """An extension that no standard defines."""
    return x509.UnrecognizedExtension(x509.ObjectIdentifier(f"1.2.3.{number}"), b"\x05\x00"), critical


def twice(der: bytes, signer: IdentityKey) -> bytes:
    """With ``unknown(5)`` renumbered to 4, and signed again."""
    renamed = der[:-64].replace(b"\x2a\x03\x05", b"\x2a\x03\x04")
    assert renamed != der[:-64]
    body = x509.load_der_x509_certificate(renamed + der[-64:]).tbs_certificate_bytes
    return renamed + private(signer).sign(body)


def forged(
    issuer: Authority,
    subject: list[x509.NameAttribute],
    public: Any,
    *extensions: tuple[x509.ExtensionType, bool],
    extension: bool = True,
) -> bytes:
    """A certificate that the authority signs although ``issue`` would refuse it."""
    by = x509.load_der_x509_certificate(issuer.der).subject
    builder = x509.CertificateBuilder(by, x509.Name(subject), public, 7, BEGIN, END)
    leaf = x509.BasicConstraints(ca=False, path_length=None), True
    for value, critical in (*([leaf] if extension else []), *extensions):
        builder = builder.add_extension(value, critical)
    return builder.sign(private(issuer.key), None).public_bytes(serialization.Encoding.DER)


def private(key: IdentityKey) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(key.raw)


def pem_of(der: bytes) -> bytes:
    return x509.load_der_x509_certificate(der).public_bytes(serialization.Encoding.PEM)


@pytest.fixture
def public(identity: IdentityKey) -> Any:
    return private(identity).public_key()


def name(*values: str) -> list[x509.NameAttribute]:
    return [x509.NameAttribute(NameOID.COMMON_NAME, value) for value in values]


def test_a_certificate_gives_the_device_and_its_key(
    authority: Authority, identity: IdentityKey, certificate: bytes
) -> None:
    assert authority.root.verify(certificate) == ("kitchen-1", identity.public)
    assert authority.root.verify(certificate, BEGIN + DAY) == ("kitchen-1", identity.public)


def test_the_same_certificate_is_issued_for_the_same_fields(authority: Authority, identity: IdentityKey) -> None:
    first = authority.issue("a", identity.public, not_before=BEGIN, not_after=END)
    assert authority.issue("a", identity.public, not_before=BEGIN, not_after=END) == first
    assert authority.issue("a", identity.public, not_before=BEGIN + DAY, not_after=END) != first


@pytest.mark.parametrize(("last", "after"), [(BEGIN, BEGIN - SECOND), (END, END + SECOND)])
def test_a_certificate_is_valid_in_its_period_only(
    authority: Authority, certificate: bytes, last: dt.datetime, after: dt.datetime
) -> None:
    authority.root.verify(certificate, last)
    with refused(TrustError, "certificate.validity", value="kitchen-1"):
        authority.root.verify(certificate, after)


@pytest.mark.parametrize("when", [BEGIN - SECOND, END + SECOND])
def test_no_certificate_is_valid_outside_the_authoritys_own_period(
    authority: Authority, identity: IdentityKey, when: dt.datetime
) -> None:
    longer = authority.issue("kitchen-1", identity.public, not_before=BEGIN - DAY, not_after=END + DAY)
    authority.root.verify(longer, END)
    with refused(TrustError, "certificate.validity"):
        authority.root.verify(longer, when)


def test_a_certificate_of_another_authority_of_the_same_name_is_refused(entropy: Any, certificate: bytes) -> None:
    other = Authority.create("fleet", entropy, BEGIN, END)
    with refused(TrustError, "certificate.issuer"):
        other.root.verify(certificate)


def test_a_device_cannot_certify_another(authority: Authority, identity: IdentityKey, certificate: bytes) -> None:
    child = Authority(identity, certificate).issue("child", identity.public, not_before=BEGIN, not_after=END)
    with pytest.raises(TrustError):
        authority.root.verify(child)


def test_the_authoritys_own_certificate_is_not_a_devices(authority: Authority) -> None:
    with refused(TrustError, "certificate.basic-constraints"):
        authority.root.verify(authority.der)


def test_a_certificate_keeps_the_serial_that_it_was_given(authority: Authority, identity: IdentityKey) -> None:
    der = authority.issue("a", identity.public, not_before=BEGIN, not_after=END, serial=2**158 + 1)
    assert x509.load_der_x509_certificate(der).serial_number == 2**158 + 1


@pytest.mark.parametrize("names", [(), ("a", "b")])
def test_a_certificate_with_two_names_or_none_is_refused(
    authority: Authority, public: Any, names: tuple[str, ...]
) -> None:
    with refused(TrustError, "certificate.common-name"):
        authority.root.verify(forged(authority, name(*names), public))


# The last six look like a device's, and are not ASCII.
@pytest.mark.parametrize(
    "subject", ["../kitchen", "kitchen\0", "kitchen\n", "kitchеn", "ｋitchen", "kitchen\u200b", "kıtchen"]
)
def test_a_certified_name_that_is_not_a_device_id_is_refused(authority: Authority, public: Any, subject: str) -> None:
    with refused(TrustError, "certificate.common-name"):
        authority.root.verify(forged(authority, name(subject), public))


def test_a_certificate_without_basic_constraints_is_refused(authority: Authority, public: Any) -> None:
    with refused(TrustError, "certificate.basic-constraints"):
        authority.root.verify(forged(authority, name("a"), public, extension=False))


def test_a_critical_extension_that_is_not_understood_is_refused_and_another_is_not(
    authority: Authority, public: Any
) -> None:
    """RFC 5280, section 4.2: for example one that limits the certificate to another purpose."""
    for extension in (unknown(4, critical=True), (x509.ExtendedKeyUsage([x509.OID_SERVER_AUTH]), True)):
        with refused(TrustError, "certificate.extension", value=extension[0].oid.dotted_string):
            authority.root.verify(forged(authority, name("a"), public, extension))
    assert authority.root.verify(forged(authority, name("a"), public, unknown(4, critical=False)))[0] == "a"


def test_a_certificate_with_an_extension_twice_is_refused(authority: Authority, public: Any) -> None:
    der = forged(authority, name("a"), public, unknown(4, critical=False), unknown(5, critical=False))
    assert authority.root.verify(der)[0] == "a"
    with refused(TrustError, "certificate.extension"):
        authority.root.verify(twice(der, authority.key))


def test_a_certificate_for_the_authoritys_own_key_is_refused(authority: Authority) -> None:
    der = authority.issue("a", authority.key.public, not_before=BEGIN, not_after=END)
    with refused(TrustError, "certificate.key", value="a"):
        authority.root.verify(der)


def test_a_certificate_for_another_kind_of_key_is_refused(authority: Authority) -> None:
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    with refused(TrustError, "certificate.key", value="ECPublicKey"):
        authority.root.verify(forged(authority, name("a"), key))


def ends_in_zeros(der: bytes) -> bool:
    """Of such a signature some bits could be called unused, which would make other bytes of the same document."""
    return der[-1] & 7 == 0


def test_any_flipped_bit_is_refused(authority: Authority, identity: IdentityKey, certificate: bytes) -> None:
    issue = partial(authority.issue, public=identity.public, not_before=BEGIN, not_after=END)
    other = next(filter(ends_in_zeros, (issue(f"device-{number}") for number in itertools.count())))
    for changed in (*bits_flipped(certificate), *bits_flipped(other)):
        with pytest.raises(TrustError):
            authority.root.verify(changed)


def test_any_flipped_bit_of_the_authoritys_certificate_is_refused(entropy: Any) -> None:
    authorities = (Authority.create("fleet", entropy, BEGIN, END).root for _ in itertools.count())
    root = next(root for root in authorities if ends_in_zeros(root.der))
    assert Root.from_pem(as_pem(root.der)) == root
    for changed in bits_flipped(root.der):
        with pytest.raises(TrustError):
            Root.from_pem(as_pem(changed))


def as_pem(der: bytes) -> bytes:
    return b"-----BEGIN CERTIFICATE-----\n%b-----END CERTIFICATE-----\n" % base64.encodebytes(der)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(start=st.integers(0, 300), end=st.integers(0, 300), put=st.binary(max_size=12))
def test_any_insertion_or_deletion_is_refused(
    authority: Authority, certificate: bytes, start: int, end: int, put: bytes
) -> None:
    raw = certificate[:start] + put + certificate[end:]
    if raw != certificate:
        with pytest.raises(TrustError):
            authority.root.verify(raw)


def test_authority_and_root_round_trip_through_pem(authority: Authority) -> None:
    assert Authority.from_pem(authority.to_pem()) == authority
    assert Root.from_pem(authority.root.to_pem()) == authority.root


def test_key_and_certificate_of_different_authorities_are_refused(authority: Authority, entropy: Any) -> None:
    other = Authority.create("other", entropy, BEGIN, END)
    with refused(TrustError, "authority.key"):
        Authority.from_pem(other.key.to_pem() + authority.root.to_pem())


def test_a_device_certificate_cannot_be_pinned(authority: Authority, certificate: bytes) -> None:
    with pytest.raises(TrustError):
        Root.from_pem(pem_of(certificate))


def test_an_authority_signed_by_another_cannot_be_pinned(authority: Authority, public: Any) -> None:
    constraints = x509.BasicConstraints(ca=True, path_length=None), True
    with refused(TrustError, "authority.certificate"):
        Root.from_pem(pem_of(forged(authority, name("below"), public, constraints, extension=False)))


def test_a_certificate_over_the_limit_is_refused_unread(authority: Authority) -> None:
    with refused(TrustError, "certificate.size", value=2049):
        authority.root.verify(bytes(2049))
    with refused(TrustError, "certificate"):
        authority.root.verify(bytes(2048))


def test_a_self_signed_certificate_that_is_not_an_authoritys_cannot_be_pinned(authority: Authority) -> None:
    with refused(TrustError, "certificate.basic-constraints"):
        Root.from_pem(pem_of(forged(authority, name("fleet"), private(authority.key).public_key())))


def test_an_authority_with_another_kind_of_key_cannot_be_pinned() -> None:
    key, subject = ec.generate_private_key(ec.SECP256R1()), x509.Name(name("a"))
    builder = x509.CertificateBuilder(subject, subject, key.public_key(), 7, BEGIN, END)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    with refused(TrustError, "certificate.key", value="ECPublicKey"):
        Root.from_pem(builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))


@pytest.mark.parametrize("device_id", ["", "a b", "-a", "a/b", "é", "a" * 65])
def test_an_ill_formed_device_id_is_not_certified(authority: Authority, identity: IdentityKey, device_id: str) -> None:
    with refused(ConfigError, "device.id"):
        authority.issue(device_id, identity.public, not_before=BEGIN, not_after=END)


def test_a_certificate_that_ends_before_it_begins_is_not_issued(authority: Authority, identity: IdentityKey) -> None:
    with refused(ConfigError, "certificate.validity", value="a"):
        authority.issue("a", identity.public, not_before=END, not_after=BEGIN)


def test_the_authoritys_key_is_in_no_repr(authority: Authority) -> None:
    assert str(authority.key.raw) not in repr(authority)
    assert "IdentityKey()" in repr(authority)


@pytest.mark.parametrize("drawn", [bytes(20), b"\xff" * 20])
def test_serials_have_one_length_in_a_certificate_whatever_was_drawn(
    authority: Authority, identity: IdentityKey, drawn: bytes
) -> None:
    entropy: Any = SimpleNamespace(bytes=lambda n: drawn[:n])
    lengths = {
        len(authority.issue("a", identity.public, not_before=BEGIN, not_after=END, serial=each))
        for each in (new_serial(entropy), 2**158, 2**159 - 1)
    }
    assert len(lengths) == 1


# Requests: only the owner of a key can request its certificate.
KEY, OTHER = IdentityKey(bytes(range(32))), IdentityKey(bytes(32))


def der(pem: bytes) -> bytes:
    return x509.load_pem_x509_csr(pem).public_bytes(serialization.Encoding.DER)


def odd(key: Any, *names: str, extensions: Sequence[tuple[x509.ExtensionType, bool]] = ()) -> bytes:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name) for name in names])
    algorithm = None if isinstance(key, Ed25519PrivateKey) else hashes.SHA256()
    builder = x509.CertificateSigningRequestBuilder(subject)
    for value, critical in extensions:
        builder = builder.add_extension(value, critical)
    return builder.sign(key, algorithm).public_bytes(serialization.Encoding.PEM)


def test_a_request_gives_name_and_key_in_pem_and_der() -> None:
    pem = requests.request(KEY, "kitchen-1")
    assert requests.read_request(pem) == requests.read_request(der(pem)) == ("kitchen-1", KEY.public)


def test_a_request_for_a_key_that_the_asker_does_not_have_is_refused() -> None:
    raw = bytearray(der(requests.request(KEY, "kitchen-1")))
    at = raw.index(KEY.public.raw)
    raw[at : at + 32] = OTHER.public.raw
    with refused(TrustError, "request.signature"):
        requests.read_request(bytes(raw))


def test_any_flipped_bit_of_a_request_is_refused() -> None:
    asked = (der(requests.request(KEY, f"kitchen-{number}")) for number in itertools.count())
    for changed in bits_flipped(next(filter(ends_in_zeros, asked))):
        with pytest.raises(TrustError):
            requests.read_request(changed)


def test_a_request_that_is_too_large_is_refused() -> None:
    with refused(TrustError, "request"):
        requests.read_request(requests.request(KEY, "kitchen-1") + bytes(9000))


def test_a_request_for_another_kind_of_key_is_refused() -> None:
    with refused(TrustError, "request.key", value="ECPublicKey"):
        requests.read_request(odd(ec.generate_private_key(ec.SECP256R1()), "kitchen-1"))


def unknown_extension(number: int, *, critical: bool) -> tuple[x509.ExtensionType, bool]:
    return x509.UnrecognizedExtension(x509.ObjectIdentifier(f"1.2.3.{number}"), b"\x05\x00"), critical


def test_a_request_for_more_than_the_authority_certifies_is_refused() -> None:
    key = Ed25519PrivateKey.from_private_bytes(KEY.raw)
    authority, leaf = x509.BasicConstraints(ca=True, path_length=1), x509.BasicConstraints(ca=False, path_length=None)
    for critical in (True, False):
        with refused(TrustError, "request.basic-constraints"):
            requests.read_request(odd(key, "a", extensions=[(authority, critical)]))
        assert requests.read_request(odd(key, "a", extensions=[(leaf, critical)])) == ("a", KEY.public)
    with refused(TrustError, "request.extension", value="1.2.3.4"):
        requests.read_request(odd(key, "a", extensions=[unknown_extension(4, critical=True)]))
    assert requests.read_request(odd(key, "a", extensions=[unknown_extension(4, critical=False)]))[0] == "a"


def test_a_request_with_an_extension_twice_is_refused() -> None:
    key = Ed25519PrivateKey.from_private_bytes(KEY.raw)
    raw = der(odd(key, "a", extensions=[unknown_extension(4, critical=False), unknown_extension(5, critical=False)]))
    renamed = raw[:-64].replace(b"\x2a\x03\x05", b"\x2a\x03\x04")
    body = x509.load_der_x509_csr(renamed + raw[-64:]).tbs_certrequest_bytes
    with refused(TrustError, "request.extension"):
        requests.read_request(renamed + key.sign(body))


@pytest.mark.parametrize("names", [(), ("a", "b"), ("../kitchen",), ("a b",)])
def test_a_request_that_does_not_name_one_device_is_refused(names: tuple[str, ...]) -> None:
    with refused(TrustError, "request.common-name"):
        requests.read_request(odd(Ed25519PrivateKey.from_private_bytes(KEY.raw), *names))


@pytest.mark.parametrize(
    "name",
    [b"\x0c\x07\xff\xfetchen", b"\x16\x07\xffitchen", b"\x03\x07\x00itchen", b"\x02\x07kitchen"],
    ids=["text that is not UTF-8", "text that is not ASCII", "bits", "a number"],
)
def test_a_signed_request_whose_name_is_not_text_is_refused(name: bytes) -> None:
    unread = der(requests.request(KEY, "kitchen")).replace(b"\x0c\x07kitchen", name)
    body = x509.load_der_x509_csr(unread).tbs_certrequest_bytes
    signed = unread[:-64] + Ed25519PrivateKey.from_private_bytes(KEY.raw).sign(body)
    with refused(TrustError, "request"):
        requests.read_request(signed)


@pytest.mark.parametrize("name", ["", "-a", "a/b", "é", "a" * 65])
def test_a_name_that_no_device_can_have_is_not_requested(name: str) -> None:
    with refused(ConfigError, "device.id"):
        requests.request(KEY, name)


def test_an_encrypted_identity_is_read_with_its_passphrase_only() -> None:
    pem = KEY.to_pem(b"a long passphrase")
    assert b"ENCRYPTED" in pem
    assert IdentityKey.from_pem(pem, b"a long passphrase") == KEY
    for wrong, about in ((None, "key.pem"), (b"another passphrase", "key.passphrase")):
        with refused(TrustError, about):
            IdentityKey.from_pem(pem, wrong)
