"""Identities: a signature is valid for its body, its purpose and its key only."""

from typing import Any

import pytest

from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError, TrustError
from aggregation.pki.identity import IdentityKey, PublicKey
from tests.support import refused


@pytest.fixture
def key() -> IdentityKey:
    return IdentityKey(bytes(range(32)))


def test_a_signature_verifies_for_its_body_and_purpose(key: IdentityKey) -> None:
    key.public.verify("offer", b"body", key.sign("offer", b"body"))


@pytest.mark.parametrize(
    ("tag", "body"), [("offer", b"bodY"), ("advert", b"body"), ("offe", b"rbody"), ("offerb", b"ody"), ("offer", b"")]
)
def test_a_signature_does_not_verify_for_another_body_or_purpose(key: IdentityKey, tag: str, body: bytes) -> None:
    with refused(TrustError, "signature"):
        key.public.verify(tag, body, key.sign("offer", b"body"))


def test_a_signature_does_not_verify_under_another_key(key: IdentityKey) -> None:
    other = IdentityKey(bytes(32)).public
    with refused(TrustError, "signature", value="offer"):
        other.verify("offer", b"body", key.sign("offer", b"body"))


@pytest.mark.parametrize("signature", [b"", bytes(64), bytes(63), bytes(65)])
def test_bytes_that_are_not_a_signature_do_not_verify(key: IdentityKey, signature: bytes) -> None:
    with pytest.raises(TrustError):
        key.public.verify("offer", b"body", signature)


def test_keys_round_trip_through_pem(key: IdentityKey) -> None:
    assert IdentityKey.from_pem(key.to_pem()) == key
    assert PublicKey.from_pem(key.public.to_pem()) == key.public


@pytest.mark.parametrize("kind", [IdentityKey, PublicKey])
@pytest.mark.parametrize("pem", [b"", b"junk", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"])
def test_bytes_that_are_not_a_key_are_refused(kind: Any, pem: bytes) -> None:
    with pytest.raises(TrustError):
        kind.from_pem(pem)


def test_keys_of_other_kinds_are_refused() -> None:
    from cryptography.hazmat.primitives import serialization as ser
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    other = X25519PrivateKey.generate()
    private = other.private_bytes(ser.Encoding.PEM, ser.PrivateFormat.PKCS8, ser.NoEncryption())
    public = other.public_key().public_bytes(ser.Encoding.PEM, ser.PublicFormat.SubjectPublicKeyInfo)
    with refused(TrustError, "key.type", value="X25519PrivateKey"):
        IdentityKey.from_pem(private)
    with refused(TrustError, "key.type", value="X25519PublicKey"):
        PublicKey.from_pem(public)


@pytest.mark.parametrize("kind", [IdentityKey, PublicKey])
def test_a_key_of_another_length_cannot_be_made(kind: Any) -> None:
    with refused(TrustError, "key.length", value=31):
        kind(bytes(31))


def test_the_private_key_is_in_no_repr(key: IdentityKey) -> None:
    assert repr(key) == "IdentityKey()"


def test_a_signature_tag_must_not_be_empty(key: IdentityKey) -> None:
    with pytest.raises(ConfigError):
        key.sign("", b"body")


def test_the_systems_entropy_gives_new_bytes_every_time() -> None:
    source = SystemEntropy()
    assert len({source.bytes(32) for _ in range(100)}) == 100
    assert IdentityKey.generate(source) != IdentityKey.generate(source)
