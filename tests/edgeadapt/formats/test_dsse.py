"""DSSE envelopes: the published example, a second implementation, and every way to alter a document."""

import base64
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from hypothesis import given
from hypothesis import strategies as st
from securesystemslib import dsse as other
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import CryptoSigner, SSlibKey

from aggregation.entropy import SystemEntropy
from aggregation.errors import DataError, TrustError
from aggregation.pki.identity import IdentityKey
from edgeadapt.formats import dsse, jsontext
from tests.support import refused

TYPE = "application/vnd.edgeadapt.test+json"
PAYLOAD = jsontext.encode({"name": "Küche", "numbers": [1, 2.5, -0.0], "nested": {"b": None, "a": True}})
KEY = IdentityKey.generate(SystemEntropy())
RAW = dsse.sign(PAYLOAD, TYPE, KEY)
SIG = json.loads(RAW)["signatures"][0]["sig"]


def rewritten(change: dict[str, Any]) -> bytes:
    """The envelope with other values of some keys; None removes the key."""
    found = {**json.loads(RAW), **change}
    return json.dumps({key: value for key, value in found.items() if value is not None}).encode()


def resigned(**change: Any) -> bytes:
    """The envelope with another first signature."""
    return rewritten({"signatures": [{**json.loads(RAW)["signatures"][0], **change}]})


# --- the standard


def test_the_example_of_the_specification_holds() -> None:
    # protocol.md of DSSE 1.0.2, "Test Vectors": ECDSA over P-256, the signature being r and s one after the other
    x = 46950820868899156662930047687818585632848591499744589407958293238635476079160
    y = 5640078356564379163099075877009565129882514886557779369047442380624545832820
    signature = base64.b64decode(
        "A3JqsQGtVsJ2O2xqrI5IcnXip5GToJ3F+FnZ+O88SjtR6rDAajabZKciJTfUiHqJPcIAriEGAHTVeCUjW2JIZA=="
    )
    signed = dsse.pae("http://example.com/HelloWorld", b"hello world")
    assert signed == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    r, s = (int.from_bytes(signature[part], "big") for part in (slice(32), slice(32, None)))
    key = ec.EllipticCurvePublicNumbers(x, y, ec.SECP256R1()).public_key()
    key.verify(encode_dss_signature(r, s), signed, ec.ECDSA(hashes.SHA256()))


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), st.binary(max_size=200))
def test_the_signed_bytes_are_those_of_the_other_implementation(kind: str, payload: bytes) -> None:
    assert dsse.pae(kind, payload) == other.Envelope(payload, kind, {}).pae()


def their_key(key: IdentityKey) -> SSlibKey:
    return SSlibKey(key.public.key_id, "ed25519", "ed25519", {"public": key.public.raw.hex()})


def test_the_other_implementation_verifies_what_we_sign(stranger: IdentityKey) -> None:
    envelope = other.Envelope.from_dict(json.loads(RAW))
    assert (envelope.payload, envelope.payload_type) == (PAYLOAD, TYPE)
    assert list(envelope.verify([their_key(KEY)], 1)) == [KEY.public.key_id]
    with pytest.raises(VerificationError):
        envelope.verify([their_key(stranger)], 1)


def test_we_verify_what_the_other_implementation_signs() -> None:
    signer = CryptoSigner(Ed25519PrivateKey.from_private_bytes(KEY.raw), their_key(KEY))
    envelope = other.Envelope(PAYLOAD, TYPE, {})
    envelope.sign(signer)
    assert dsse.verify(json.dumps(envelope.to_dict()).encode(), TYPE, [KEY.public]) == PAYLOAD


# --- round trips


@given(st.binary(max_size=300))
def test_verify_gives_back_what_was_signed(payload: bytes) -> None:
    assert dsse.verify(dsse.sign(payload, TYPE, KEY), TYPE, [KEY.public]) == payload


def test_the_same_payload_has_the_same_envelope() -> None:
    assert dsse.sign(PAYLOAD, TYPE, KEY) == RAW


def test_the_signer_is_found_among_several_trusted_keys(stranger: IdentityKey) -> None:
    assert dsse.verify(RAW, TYPE, iter([stranger.public, KEY.public])) == PAYLOAD


def test_one_trusted_signature_among_several_is_enough(stranger: IdentityKey) -> None:
    signatures = json.loads(dsse.sign(PAYLOAD, TYPE, stranger))["signatures"] + json.loads(RAW)["signatures"]
    raw = rewritten({"signatures": signatures})
    assert dsse.verify(raw, TYPE, [KEY.public]) == dsse.verify(raw, TYPE, [stranger.public]) == PAYLOAD


# --- the key id


@pytest.mark.parametrize("keyid", ["0" * 16, "another name", KEY.public.key_id + "0"], ids=["zeros", "text", "longer"])
def test_a_signature_under_another_key_id_is_refused(keyid: str) -> None:
    with refused(TrustError, "keyid", value=keyid):
        dsse.verify(resigned(keyid=keyid), TYPE, [KEY.public])


def test_a_signature_under_the_id_of_another_trusted_key_is_refused(stranger: IdentityKey) -> None:
    with refused(TrustError, "signature"):
        dsse.verify(resigned(keyid=stranger.public.key_id), TYPE, [KEY.public, stranger.public])


@pytest.mark.parametrize("signature", [{"sig": SIG}, {"sig": SIG, "keyid": ""}], ids=["absent", "empty"])
def test_a_signature_without_a_key_id_holds(signature: dict[str, str]) -> None:
    assert dsse.verify(rewritten({"signatures": [signature]}), TYPE, [KEY.public]) == PAYLOAD


def test_a_stranger_who_claims_a_trusted_key_id_is_refused(stranger: IdentityKey) -> None:
    forged = json.loads(dsse.sign(PAYLOAD, TYPE, stranger))
    forged["signatures"][0]["keyid"] = KEY.public.key_id
    with refused(TrustError, "signature"):
        dsse.verify(json.dumps(forged).encode(), TYPE, [KEY.public])


def test_an_unknown_signer_is_refused_by_its_key_id(stranger: IdentityKey) -> None:
    for trusted in ([stranger.public], []):
        with refused(TrustError, "keyid", value=KEY.public.key_id):
            dsse.verify(RAW, TYPE, trusted)


# --- damage


def test_a_flipped_bit_anywhere_is_refused() -> None:
    for position in range(len(RAW)):
        for flip in (*(1 << bit for bit in range(8)), 0xFF):
            damaged = RAW[:position] + bytes([RAW[position] ^ flip]) + RAW[position + 1 :]
            with pytest.raises(TrustError):
                dsse.verify(damaged, TYPE, [KEY.public])


def test_any_truncation_is_refused() -> None:
    for length in range(len(RAW)):
        with refused(TrustError, "envelope"):
            dsse.verify(RAW[:length], TYPE, [KEY.public])


@given(
    st.binary(max_size=100) | st.recursive(st.text() | st.integers(), st.lists).map(lambda v: json.dumps(v).encode())
)
def test_any_other_bytes_end_in_a_trust_error(raw: bytes) -> None:
    with refused(TrustError, "envelope"):
        dsse.verify(raw, TYPE, [KEY.public])


def test_one_type_of_document_never_passes_for_another() -> None:
    with refused(TrustError, "payloadType", value=TYPE):
        dsse.verify(RAW, "application/vnd.edgeadapt.other+json", [KEY.public])
    with refused(TrustError, "signature"):
        dsse.verify(rewritten({"payloadType": "x"}), "x", [KEY.public])


@pytest.mark.parametrize(
    "raw",
    [
        rewritten({"signatures": None}),
        rewritten({"signatures": [["sig", SIG]]}),
        rewritten({"signatures": [[["sig", SIG]]]}),
        rewritten({"signatures": [{"sig": SIG}] * 9}),
        rewritten({"signatures": [{"sig": SIG}, {"sig": "*"}]}),
        resigned(extra=1),
        resigned(sig=1),
        resigned(keyid=["list"]),
        RAW + b"x",
        b'{"payload":' + b"[" * 200_000,
    ],
)
def test_another_envelope_is_refused(raw: bytes) -> None:
    """tests/vectors/test_bundle.py has more of them."""
    with refused(TrustError, "envelope"):
        dsse.verify(raw, TYPE, [KEY.public])


@pytest.mark.parametrize("field", ["payload", "sig"])
@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("=", ""),
        lambda text: text + "=",
        lambda text: text + "\n",
        lambda text: " " + text,
        lambda text: text[:4] + "\n" + text[4:],
        lambda text: base64.urlsafe_b64encode(base64.b64decode(text) + b"\xff\xff").decode(),
        lambda text: text[:-3] + chr(ord(text[-3]) + 1) + "==",
        lambda text: text[:-1] + "é",
        lambda _: None,
    ],
)
def test_base64_in_another_spelling_is_refused(field: str, change: Any) -> None:
    payload = b"x" * 64  # as long as a signature, so that both end in two padding characters
    raw = json.loads(dsse.sign(payload, TYPE, KEY))
    place = raw if field == "payload" else raw["signatures"][0]
    place[field] = change(place[field])
    with refused(TrustError, "envelope"):
        dsse.verify(json.dumps(raw).encode(), TYPE, [KEY.public])


def test_the_spelling_of_the_envelope_does_not_matter() -> None:
    assert dsse.verify(json.dumps(json.loads(RAW), indent=4).encode(), TYPE, [KEY.public]) == PAYLOAD


def test_an_oversized_envelope_is_neither_read_nor_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dsse, "MAX_ENVELOPE", len(RAW) - 1)
    with refused(TrustError, "envelope", value=len(RAW)):
        dsse.verify(RAW, TYPE, [KEY.public])
    with refused(DataError, TYPE, value=len(RAW)):
        dsse.sign(PAYLOAD, TYPE, KEY)


def test_the_payload_of_an_unverified_envelope_is_read_as_strictly(stranger: IdentityKey) -> None:
    assert dsse.unverified(dsse.sign(PAYLOAD, TYPE, stranger), TYPE) == PAYLOAD
    with refused(TrustError, "payloadType"):
        dsse.unverified(RAW, "x")
    with refused(TrustError, "envelope"):
        dsse.unverified(RAW[:-1], TYPE)
