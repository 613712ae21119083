"""Identities: a signature is valid for its body, its purpose and its key only."""

import base64
import hashlib
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError, TrustError
from aggregation.pki import Authority, identity
from aggregation.pki.identity import IdentityKey, PublicKey
from aggregation.pki.requests import read_request, request
from aggregation.pki.revocation import Revocation
from aggregation.pki.tls import TlsKey, hosts_of, read_tls_request, verify_tls
from tests.support import refused

P = 2**255 - 19
D = -121665 * pow(121666, -1, P) % P
ORDER = 2**252 + 27742317777372353535851937790883648493  # of the base point (RFC 8032, section 5.1)
LIBSODIUM = (  # its list of keys of small order, without the sign bit (ge25519_has_small_order)
    "0000000000000000000000000000000000000000000000000000000000000000",
    "0100000000000000000000000000000000000000000000000000000000000000",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
)
Point = tuple[int, int]


def add(a: Point, b: Point) -> Point:
    """RFC 8032, section 5.1.4, in affine coordinates."""
    (x1, y1), (x2, y2) = a, b
    t = D * x1 * x2 * y1 * y2
    x, y = (x1 * y2 + x2 * y1) * pow(1 + t, -1, P), (y1 * y2 + x1 * x2) * pow(1 - t, -1, P)
    return x % P, y % P


def times(n: int, a: Point) -> Point:
    total = (0, 1)
    while n:
        total = add(total, a) if n & 1 else total
        a, n = add(a, a), n >> 1
    return total


def point(y: int) -> Point | None:
    """A point with this y (RFC 8032, section 5.1.3)."""
    square = (y * y - 1) * pow(D * y * y + 1, -1, P) % P
    x = pow(square, (P + 3) // 8, P)
    for root in (x, x * pow(2, (P - 1) // 4, P) % P):
        if root * root % P == square:
            return root, y
    return None


def encoded(a: Point) -> bytes:
    """RFC 8032, section 5.1.2."""
    return (a[1] | (a[0] & 1) << 255).to_bytes(32, "little")


def encodings(a: Point) -> set[bytes]:
    """Every string that a lenient reader takes for the point: y or y + p, and any sign where x is 0."""
    x, y = a
    signs = {x & 1} if x else {0, 1}
    return {(v | sign << 255).to_bytes(32, "little") for v in (y, y + P) if v < 2**255 for sign in signs}


@pytest.fixture(scope="module")
def torsion() -> list[Point]:
    """The eight points whose order divides 8."""
    return next(
        found
        for y in range(2, 100)
        if (start := point(y)) and len({*(found := [times(n * ORDER, start) for n in range(8)])}) == 8
    )


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


@pytest.mark.parametrize("number", [b"\x6f", b"\x71"], ids=["X448", "Ed448"])
def test_a_key_that_claims_to_be_longer_than_it_is_is_refused(key: IdentityKey, number: bytes) -> None:
    for kind, pem in ((IdentityKey, key.to_pem()), (PublicKey, key.public.to_pem())):
        head, *body, foot, _ = pem.split(b"\n")
        der = base64.b64decode(b"".join(body)).replace(b"\x2b\x65\x70", b"\x2b\x65" + number)
        with refused(TrustError, "key.pem"):
            kind.from_pem(b"\n".join((head, base64.b64encode(der), foot, b"")))


@pytest.mark.parametrize("kind", [IdentityKey, PublicKey])
def test_a_key_of_another_length_cannot_be_made(kind: Any) -> None:
    with refused(TrustError, "key.length", value=31):
        kind(bytes(31))


def test_every_encoding_of_every_point_of_small_order_is_no_key(torsion: list[Point]) -> None:
    small = set().union(*map(encodings, torsion))
    signed = {
        bytes.fromhex(each)[:31] + bytes([bytes.fromhex(each)[31] | sign]) for each in LIBSODIUM for sign in (0, 128)
    }
    assert small == signed
    assert len(small) == 14
    for raw in small:
        with pytest.raises(TrustError) as error:
            PublicKey(raw)
        assert error.value.about in ("key.small-order", "key.encoding")


def test_without_the_check_a_point_of_small_order_signs_what_nobody_signed(
    torsion: list[Point], monkeypatch: pytest.MonkeyPatch
) -> None:
    """R = -h·A and S = 0 fit; the hash h depends on R, so that about one of eight guesses of R is right."""
    monkeypatch.setattr(identity, "_SMALL_ORDER", frozenset())
    for a in torsion:
        public = PublicKey(min(encodings(a)))  # the canonical one
        points = [min(encodings(b)) for b in torsion]
        bodies = [bytes([number]) for number in range(16)]
        assert any(_signed(public, body, r + bytes(32)) for r in points for body in bodies)


def _signed(public: PublicKey, body: bytes, signature: bytes) -> bool:
    try:
        public.verify("offer", body, signature)
    except TrustError:
        return False
    return True


def test_a_second_encoding_of_a_point_is_no_key() -> None:
    for y in range(P, 2**255):
        for sign in (0, 1):
            with refused(TrustError, "key.encoding"):
                PublicKey((y | sign << 255).to_bytes(32, "little"))


def test_a_point_next_to_a_refused_one_is_a_key(torsion: list[Point]) -> None:
    for y in {(each + by) % P for _, each in torsion for by in (1, -1)} - {each for _, each in torsion}:
        PublicKey(y.to_bytes(32, "little"))


def test_a_signature_with_a_second_form_of_its_number_does_not_verify(key: IdentityKey) -> None:
    """S + order satisfies the equation as well; RFC 8032, section 5.1.7 demands S < order."""
    signature = key.sign("offer", b"body")
    number = int.from_bytes(signature[32:], "little")
    for times_order in range(1, 9):
        second = (number + times_order * ORDER).to_bytes(32, "little")
        with refused(TrustError, "signature"):
            key.public.verify("offer", b"body", signature[:32] + second)


def test_a_signers_r_with_a_part_of_small_order_does_not_verify(torsion: list[Point]) -> None:
    """The equation holds only after multiplication by the cofactor; readers that multiply would see another result."""
    found = point(4 * pow(5, -1, P) % P)  # the base point is the one of the two whose x is even
    assert found is not None
    base = (found[0] if found[0] % 2 == 0 else P - found[0], found[1])
    secret, nonce = 7**80, 5**90
    public = PublicKey(encoded(times(secret, base)))
    for part in torsion:
        r = encoded(add(times(nonce, base), part))
        framed = b"edgeadapt/1\x00" + bytes([5]) + b"offer" + b"body"
        h = int.from_bytes(hashlib.sha512(r + public.raw + framed).digest(), "little")
        signature = r + ((nonce + h * secret) % ORDER).to_bytes(32, "little")
        assert _signed(public, b"body", signature) is (part == (0, 1))


def test_the_private_key_is_in_no_repr(key: IdentityKey) -> None:
    assert repr(key) == "IdentityKey()"


def test_a_signature_tag_must_not_be_empty(key: IdentityKey) -> None:
    with pytest.raises(ConfigError):
        key.sign("", b"body")


def test_the_systems_entropy_gives_new_bytes_every_time() -> None:
    source = SystemEntropy()
    assert len({source.bytes(32) for _ in range(100)}) == 100
    assert IdentityKey.generate(source) != IdentityKey.generate(source)


# TLS certificates of gateways: of P-256, for the server's side only, with the names of its hosts.
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
