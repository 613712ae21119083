"""Whatever a file or message holds, its reader returns a value or one of our errors, in one line.

Keys, certificates, requests, lists and settings are changed at random. Where their signer may be the attacker, the
changed content is signed again, so that it gets past the signature.
"""

import base64
import random
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from aggregation.errors import EdgeAdaptError
from aggregation.pki import Authority, IdentityKey, PublicKey, Root, certificates, requests
from aggregation.pki.revocation import Reason, Revocation
from client.node.statedir import DeviceSettings
from coordinator.settings import FederationSettings
from edgeadapt.formats.settings import overridden
from tests.fuzz import fuzz_bases, fuzz_messages
from tests.support.fleet import CountedEntropy

TIMES = 1500
NOW = datetime(2026, 6, 1, tzinfo=UTC)
DAY = timedelta(days=1)
AUTHORITY = Authority.create("fleet", CountedEntropy(1), NOW - DAY, NOW + DAY)
KEY = IdentityKey(bytes(range(32)))
CERTIFICATE = AUTHORITY.issue("kitchen", KEY.public, not_before=NOW - DAY, not_after=NOW + DAY)
LIST = AUTHORITY.revocations(3, {7: Revocation(NOW, Reason.KEY_COMPROMISE), 9: Revocation(NOW)}, NOW, NOW + DAY)
DEVICE = b'base = "x"\nexamples = "a"\n[policy]\nminimum_cohort = 8\nadversaries = ["active"]\ncorrupt_fraction = 0.1\n'


def signer(key: IdentityKey) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(key.raw)


def request() -> bytes:
    """A request with two extensions, in DER."""
    builder = x509.CertificateSigningRequestBuilder(
        x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "kitchen")])
    )
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("a")]), critical=False)
    return builder.sign(signer(KEY), None).public_bytes(serialization.Encoding.DER)


def mutated(rng: random.Random, raw: bytes) -> bytes:
    """``raw`` with one to eight changes: a bit, a byte, some inserted, deleted or copied."""
    out = bytearray(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at = rng.randrange(len(out))
        match rng.randrange(5):
            case 0:
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                out[at:at] = rng.randbytes(rng.randrange(4))
            case 2:
                del out[at : at + rng.randrange(6)]
            case 3:
                out[at] = rng.randrange(256)
            case _:
                start = rng.randrange(len(out))
                out[at : at + 8] = out[start : start + 8]
        out = out or bytearray(1)
    return bytes(out)


def signed(body_of: Callable[[bytes], bytes], key: IdentityKey) -> Callable[[random.Random, bytes], bytes]:
    """As ``mutated``, with a signature of ``key`` on the changed content, where its extent can still be read."""

    def mutate(rng: random.Random, der: bytes) -> bytes:
        raw = mutated(rng, der[:-64])
        try:
            return raw + signer(key).sign(body_of(raw + der[-64:]))
        except (ValueError, x509.InvalidVersion):
            return raw + der[-64:]

    return mutate


def pem(der: bytes) -> bytes:
    return b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(der) + b"-----END CERTIFICATE-----\n"


def verify(der: bytes) -> None:
    AUTHORITY.root.verify(der, NOW)
    certificates.not_after(der)
    certificates.to_pem(der)


def pin(der: bytes) -> None:
    root = Root.from_pem(pem(der))
    assert root.key
    assert root.not_after
    assert root.fingerprint


def fresh(raw: bytes) -> None:
    AUTHORITY.root.revocations(raw).require_fresh(NOW)


def override(raw: bytes) -> None:
    DeviceSettings.parse(overridden({"base": "x"}, [raw.decode(errors="surrogateescape")]), "--set")


def certificate_body(der: bytes) -> bytes:
    return x509.load_der_x509_certificate(der).tbs_certificate_bytes


def request_body(der: bytes) -> bytes:
    return x509.load_der_x509_csr(der).tbs_certrequest_bytes


def list_body(der: bytes) -> bytes:
    return x509.load_der_x509_crl(der).tbs_certlist_bytes


READERS: dict[str, tuple[bytes, Callable[[random.Random, bytes], bytes], Callable[[bytes], Any]]] = {
    "public key": (KEY.public.to_pem(), mutated, PublicKey.from_pem),
    "raw public key": (KEY.public.raw, mutated, PublicKey),
    "private key": (KEY.to_pem(), mutated, IdentityKey.from_pem),
    "authority": (AUTHORITY.to_pem(), mutated, Authority.from_pem),
    "root": (AUTHORITY.der, signed(certificate_body, AUTHORITY.key), pin),
    "certificate": (CERTIFICATE, mutated, verify),
    "signed certificate": (CERTIFICATE, signed(certificate_body, AUTHORITY.key), verify),
    "certificate in pem": (pem(CERTIFICATE), mutated, certificates.to_der),
    "request": (requests.request(KEY, "kitchen"), mutated, requests.read_request),
    "signed request": (request(), signed(request_body, KEY), requests.read_request),
    "list": (LIST.to_pem(), mutated, fresh),
    "signed list": (LIST.der, signed(list_body, AUTHORITY.key), fresh),
    "override": (b"policy.minimum_cohort=8", mutated, override),
}


@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")
@pytest.mark.parametrize("name", READERS)
def test_what_is_read_is_a_value_or_one_of_our_errors(name: str) -> None:
    original, mutate, read = READERS[name]
    read(original)
    rng = random.Random(name)  # noqa: S311  # not a secret
    check(read, (mutate(rng, original) for _ in range(TIMES)))


@pytest.mark.parametrize("kind", [DeviceSettings, FederationSettings])
def test_a_file_of_settings_is_read_or_refused(tmp_path: Path, kind: Any) -> None:
    path, rng = tmp_path / "some.toml", random.Random(str(kind))  # noqa: S311  # not a secret
    original = DEVICE if kind is DeviceSettings else FederationSettings().to_toml().encode()

    def read(raw: bytes) -> None:
        path.write_bytes(raw)
        kind.read(path)

    check(read, (mutated(rng, original) for _ in range(TIMES // 5)))


def check(read: Callable[[bytes], Any], inputs: Iterable[bytes]) -> None:
    lines = [line for raw in inputs if (line := refusal(read, raw))]
    assert lines, "no change was refused"
    assert not [line for line in lines if "\n" in line]


def refusal(read: Callable[[bytes], Any], raw: bytes) -> str:
    """The line with which ``raw`` is refused; empty if it is read."""
    try:
        read(raw)
    except EdgeAdaptError as error:
        return str(error)
    return ""


# The fuzz target of bases and adapter files runs on sound files and on junk, and reports what it must.
CHANGES = 150


def test_the_seeds_are_read_and_what_is_made_of_them_is_read_or_refused(capsys: pytest.CaptureFixture[str]) -> None:
    known, rng = fuzz_bases.seeds(), random.Random(0)  # noqa: S311  # not a secret
    for data in known:
        fuzz_bases.READ[data[0]](data[1:])
    for data in [b"", *(fuzz_bases.some_input(rng, known) for _ in range(CHANGES))]:
        fuzz_bases.one_input(data)
    assert capsys.readouterr().out == ""


# The fuzz target of messages


def test_every_message_of_the_corpus_is_accepted(tmp_path: Path) -> None:
    fuzz_messages.seed(tmp_path / "corpus")
    files = sorted((tmp_path / "corpus").iterdir())
    assert len(files) > 98
    for file in files:
        data = file.read_bytes()
        fuzz_messages.read(data[0], data[1:])  # complete: nothing is refused
        fuzz_messages.one_input(data[:-1])


@given(data=st.sampled_from([*fuzz_messages.of_gateway()]), at=st.integers(0, 400), bits=st.integers(1, 255))
def test_damaged_messages_of_the_gateway_are_refused_quietly_or_are_others(data: bytes, at: int, bits: int) -> None:
    damaged = bytearray(data)
    damaged[at % len(data)] ^= bits
    fuzz_messages.one_input(bytes(damaged))


@given(data=st.binary(max_size=200))
def test_junk_is_refused_quietly(data: bytes) -> None:
    fuzz_messages.one_input(data)
