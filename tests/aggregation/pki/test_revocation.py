"""Revocation lists: a revoked device is refused, and nobody who forwards lists can reinstate it."""

import datetime as dt
import itertools
from collections.abc import Callable
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aggregation.errors import ConfigError, TrustError
from aggregation.pki import Authority, Root
from aggregation.pki.identity import IdentityKey
from aggregation.pki.revocation import Reason, Revocation, RevocationList
from tests.support import bits_flipped, refused

BEGIN = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
END = dt.datetime(2027, 1, 1, tzinfo=dt.UTC)
DAY = dt.timedelta(days=1)
Build = Callable[[x509.CertificateRevocationListBuilder], x509.CertificateRevocationListBuilder]


@pytest.fixture
def authority(entropy: Any) -> Authority:
    return Authority.create("fleet", entropy, BEGIN, END)


@pytest.fixture
def certificate(authority: Authority, entropy: Any) -> bytes:
    public = IdentityKey.generate(entropy).public
    return authority.issue("kitchen-1", public, not_before=BEGIN, not_after=END, serial=77)


def listed(authority: Authority, number: int = 1, *serials: int, begin: dt.datetime = BEGIN) -> RevocationList:
    return authority.revocations(number, {serial: Revocation(begin) for serial in serials}, begin, begin + 30 * DAY)


def odd(authority: Authority, build: Build, *, number: bool = True, ends: bool = True) -> bytes:
    """A list that the authority signs although ``revocations`` would refuse it."""
    issuer = x509.load_der_x509_certificate(authority.der).subject
    builder = x509.CertificateRevocationListBuilder(issuer, BEGIN, END if ends else BEGIN)
    if number:
        builder = builder.add_extension(x509.CRLNumber(5), critical=False)
    signed = build(builder).sign(Ed25519PrivateKey.from_private_bytes(authority.key.raw), None)
    return signed.public_bytes(serialization.Encoding.DER)


def entry(serial: int, *extensions: tuple[x509.ExtensionType, bool]) -> x509.RevokedCertificate:
    builder = x509.RevokedCertificateBuilder(serial, BEGIN)
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical)
    return builder.build()


def test_a_revoked_certificate_is_refused_and_another_is_not(authority: Authority, certificate: bytes) -> None:
    assert authority.root.with_revocations(listed(authority, 1, 78).der).verify(certificate)[0] == "kitchen-1"
    with refused(TrustError, "certificate.revoked", value="kitchen-1"):
        authority.root.with_revocations(listed(authority, 1, 76, 77).der).verify(certificate)


def test_a_list_comes_back_from_der_and_pem(authority: Authority) -> None:
    revoked = {7: Revocation(BEGIN, Reason.KEY_COMPROMISE), 2**159 - 1: Revocation(BEGIN + DAY)}
    made = authority.revocations(3, revoked, BEGIN, END)
    for raw in (made.der, made.to_pem(), b"\n" + made.to_pem()):
        found = authority.root.revocations(raw)
        assert (found.number, found.this_update, found.next_update) == (3, BEGIN, END)
        assert found.revoked == revoked
        assert found == made


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_comes_back(authority: Authority, reason: Reason) -> None:
    made = authority.revocations(1, {7: Revocation(BEGIN, reason)}, BEGIN, END)
    assert authority.root.revocations(made.der).revoked[7].reason is reason


def test_a_list_of_another_authority_of_the_same_name_is_refused(authority: Authority, entropy: Any) -> None:
    other = Authority.create("fleet", entropy, BEGIN, END)
    with refused(TrustError, "revocations.signature"):
        authority.root.revocations(listed(other).der)


def test_a_list_in_the_name_of_another_authority_is_refused(authority: Authority) -> None:
    renamed = Authority(authority.key, Authority.create("other", _Fixed(authority.key.raw), BEGIN, END).der)
    assert renamed.key == authority.key
    with refused(TrustError, "revocations.signature"):
        authority.root.revocations(listed(renamed).der)


class _Fixed:
    def __init__(self, raw: bytes) -> None:
        self._raw = raw

    def bytes(self, n: int) -> bytes:
        return self._raw[:n]


def test_any_flipped_bit_is_refused(authority: Authority) -> None:
    ders = (listed(authority, number, 77).der for number in itertools.count())
    # Of a signature that ends in zeros some bits could be called unused, which would make another list of this number.
    der = next(der for der in ders if der[-1] & 7 == 0)
    for changed in bits_flipped(der):
        with pytest.raises(TrustError):
            authority.root.revocations(changed)


def test_a_list_that_is_too_large_is_refused_unread(authority: Authority) -> None:
    with refused(TrustError, "revocations.size", value=4194304):
        authority.root.revocations(bytes(2**22))


@pytest.mark.parametrize(
    "build",
    [
        lambda builder: builder.add_extension(x509.DeltaCRLIndicator(1), critical=True),
        lambda builder: builder.add_extension(x509.DeltaCRLIndicator(1), critical=False),
        lambda builder: builder.add_extension(
            x509.IssuingDistributionPoint(None, None, True, False, None, False, False), critical=True
        ),
    ],
)
def test_a_list_of_some_certificates_only_is_refused(authority: Authority, build: Build) -> None:
    with refused(TrustError, "revocations.extension"):
        authority.root.revocations(odd(authority, build))


@pytest.mark.parametrize("critical", [True, False])
def test_a_list_with_an_extension_that_is_not_understood_is_refused(authority: Authority, critical: bool) -> None:
    odd_one = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00")
    with refused(TrustError, "revocations.extension", value="1.2.3.4"):
        authority.root.revocations(odd(authority, lambda builder: builder.add_extension(odd_one, critical)))
    with refused(TrustError, "revocations.issuer"):
        authority.root.revocations(
            odd(authority, lambda builder: builder.add_revoked_certificate(entry(7, (odd_one, critical))))
        )


def test_a_list_with_an_extension_twice_is_refused(authority: Authority) -> None:
    key = x509.load_der_x509_certificate(authority.der).public_key()
    known = x509.AuthorityKeyIdentifier.from_issuer_public_key(key)  # type: ignore[arg-type]
    der = odd(authority, lambda builder: builder.add_extension(known, critical=False))
    assert authority.root.revocations(der).number == 5
    renamed = der[:-64].replace(b"\x55\x1d\x23", b"\x55\x1d\x14")  # to the OID of the list's number
    body = x509.load_der_x509_crl(renamed + der[-64:]).tbs_certlist_bytes
    with refused(TrustError, "revocations.entries"):
        authority.root.revocations(renamed + Ed25519PrivateKey.from_private_bytes(authority.key.raw).sign(body))


def test_an_entry_of_another_authoritys_certificate_is_refused(authority: Authority) -> None:
    issuer = x509.CertificateIssuer([x509.DNSName("elsewhere")])
    with refused(TrustError, "revocations.issuer"):
        authority.root.revocations(
            odd(authority, lambda builder: builder.add_revoked_certificate(entry(7, (issuer, True))))
        )


def test_an_entry_that_withdraws_a_revocation_is_refused(authority: Authority) -> None:
    back = x509.CRLReason(x509.ReasonFlags.remove_from_crl)
    with refused(TrustError, "revocations.entries"):
        authority.root.revocations(
            odd(authority, lambda builder: builder.add_revoked_certificate(entry(7, (back, False))))
        )


def test_a_list_without_a_number_is_refused(authority: Authority) -> None:
    with refused(TrustError, "revocations.entries"):
        authority.root.revocations(odd(authority, lambda builder: builder, number=False))


def test_an_authority_with_another_kind_of_key_signs_no_list(authority: Authority) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.load_der_x509_certificate(authority.der).subject
    builder = x509.CertificateBuilder(subject, subject, key.public_key(), 7, BEGIN, END)
    issuer = builder.sign(Ed25519PrivateKey.from_private_bytes(authority.key.raw), None)
    with refused(TrustError, "authority.key"):
        RevocationList.read(listed(authority).der, issuer)


def test_an_older_list_is_refused_and_so_is_another_of_the_same_number(authority: Authority) -> None:
    first, second = listed(authority, 1), listed(authority, 2, 77)
    root = authority.root.with_revocations(first.der).with_revocations(second.der)
    assert root.with_revocations(second.der) == root
    with refused(TrustError, "revocations.number", value=1):
        root.with_revocations(first.der)
    with refused(TrustError, "revocations.number", value=2):
        root.with_revocations(listed(authority, 2).der)


def test_a_list_is_valid_until_its_own_end(authority: Authority) -> None:
    made = listed(authority)
    made.require_fresh(BEGIN + 30 * DAY)
    with refused(TrustError, "revocations.next-update"):
        made.require_fresh(BEGIN + 30 * DAY + dt.timedelta(seconds=1))


def test_a_list_is_valid_no_longer_than_the_reader_allows(authority: Authority) -> None:
    made = listed(authority)
    made.require_fresh(BEGIN + 7 * DAY, 7 * DAY)
    with refused(TrustError, "revocations.age"):
        made.require_fresh(BEGIN + 7 * DAY + dt.timedelta(seconds=1), 7 * DAY)


def test_a_list_dated_in_the_future_is_not_fresh(authority: Authority) -> None:
    made = listed(authority)
    for oldest in (None, 7 * DAY):
        made.require_fresh(BEGIN - DAY, oldest)  # the reader's clock may be behind
        with refused(TrustError, "revocations.this-update"):
            made.require_fresh(BEGIN - DAY - dt.timedelta(seconds=1), oldest)


def test_a_list_that_ends_before_it_begins_is_not_signed(authority: Authority) -> None:
    with refused(ConfigError, "revocations.next-update"):
        authority.revocations(1, {}, END, BEGIN)


def test_the_pem_of_the_authority_has_no_revocations(authority: Authority) -> None:
    root = authority.root.with_revocations(listed(authority, 1, 77).der)
    assert Root.from_pem(root.to_pem()) == authority.root


def test_a_list_of_thousands_is_within_the_limit(authority: Authority) -> None:
    made = authority.revocations(1, {2**158 + serial: Revocation(BEGIN) for serial in range(20_000)}, BEGIN, END)
    assert len(authority.root.revocations(made.der).revoked) == 20_000
