"""Requests: only the owner of a key can request its certificate."""

from collections.abc import Sequence
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import NameOID

from aggregation.errors import ConfigError, TrustError
from aggregation.pki import requests
from aggregation.pki.identity import IdentityKey
from tests.support import refused

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


def test_any_flipped_bit_is_refused() -> None:
    raw = der(requests.request(KEY, "kitchen-1"))
    for place in range(8 * len(raw)):
        flipped = bytearray(raw)
        flipped[place // 8] ^= 1 << place % 8
        with pytest.raises(TrustError):
            requests.read_request(bytes(flipped))


def test_a_request_that_is_too_large_is_refused() -> None:
    with refused(TrustError, "request"):
        requests.read_request(requests.request(KEY, "kitchen-1") + bytes(9000))


def test_a_request_for_another_kind_of_key_is_refused() -> None:
    with refused(TrustError, "request.key", value="ECPublicKey"):
        requests.read_request(odd(ec.generate_private_key(ec.SECP256R1()), "kitchen-1"))


def unknown(number: int, *, critical: bool) -> tuple[x509.ExtensionType, bool]:
    return x509.UnrecognizedExtension(x509.ObjectIdentifier(f"1.2.3.{number}"), b"\x05\x00"), critical


def test_a_request_for_more_than_the_authority_certifies_is_refused() -> None:
    key = Ed25519PrivateKey.from_private_bytes(KEY.raw)
    authority, leaf = x509.BasicConstraints(ca=True, path_length=1), x509.BasicConstraints(ca=False, path_length=None)
    for critical in (True, False):
        with refused(TrustError, "request.basic-constraints"):
            requests.read_request(odd(key, "a", extensions=[(authority, critical)]))
        assert requests.read_request(odd(key, "a", extensions=[(leaf, critical)])) == ("a", KEY.public)
    with refused(TrustError, "request.extension", value="1.2.3.4"):
        requests.read_request(odd(key, "a", extensions=[unknown(4, critical=True)]))
    assert requests.read_request(odd(key, "a", extensions=[unknown(4, critical=False)]))[0] == "a"


def test_a_request_with_an_extension_twice_is_refused() -> None:
    key = Ed25519PrivateKey.from_private_bytes(KEY.raw)
    raw = der(odd(key, "a", extensions=[unknown(4, critical=False), unknown(5, critical=False)]))
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
