"""Signed documents: one byte string for one value, and every way to alter it found."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters import signed
from aggregation.entropy import SystemEntropy
from aggregation.errors import DataError, TrustError
from aggregation.pki.identity import IdentityKey

KIND = "edgeadapt/test/1"
BODY: dict[str, Any] = {"name": "Küche", "numbers": [1, 2.5, -0.0], "nested": {"b": None, "a": True}}
KEY = IdentityKey.generate(SystemEntropy())
RAW = signed.sign(KIND, BODY, KEY)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=8,
)


def rewritten(change: dict[str, Any]) -> bytes:
    return signed.canonical({**json.loads(RAW), **change})


@given(st.dictionaries(st.text(), json_values, max_size=4))
def test_accept_gives_back_what_was_signed(body: dict[str, Any]) -> None:
    assert signed.accept(signed.sign(KIND, body, KEY), KIND, [KEY.public]) == body


def test_the_same_value_has_the_same_bytes() -> None:
    assert signed.sign(KIND, dict(reversed(BODY.items())), KEY) == RAW


def test_the_signer_is_found_among_several_trusted_keys(stranger: IdentityKey) -> None:
    assert signed.accept(RAW, KIND, iter([stranger.public, KEY.public])) == BODY


@pytest.mark.parametrize("flip", [0x01, 0x20, 0x80])
def test_any_flipped_byte_is_found(flip: int) -> None:
    # 0x20 turns a hex digit's case: the same signature in another spelling must not pass either.
    for position in range(len(RAW)):
        damaged = RAW[:position] + bytes([RAW[position] ^ flip]) + RAW[position + 1 :]
        with pytest.raises(TrustError):
            signed.accept(damaged, KIND, [KEY.public])


def test_any_truncation_is_found() -> None:
    for length in range(len(RAW)):
        with pytest.raises(TrustError, match="damaged"):
            signed.accept(RAW[:length], KIND, [KEY.public])


@given(st.binary(max_size=100) | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_other_bytes_end_in_a_trust_error(raw: bytes) -> None:
    with pytest.raises(TrustError):
        signed.accept(raw, KIND, [KEY.public])


def test_an_unknown_signer_is_refused(stranger: IdentityKey) -> None:
    with pytest.raises(TrustError, match="does not trust"):
        signed.accept(RAW, KIND, [stranger.public])
    with pytest.raises(TrustError, match="does not trust"):
        signed.accept(RAW, KIND, [])


def test_a_stranger_who_claims_a_trusted_name_is_refused(stranger: IdentityKey) -> None:
    forged = json.loads(signed.sign(KIND, BODY, stranger))
    forged["signer"] = KEY.public.key_id
    with pytest.raises(TrustError, match="does not match"):
        signed.accept(signed.canonical(forged), KIND, [KEY.public])


def test_one_kind_of_document_never_passes_for_another() -> None:
    with pytest.raises(TrustError, match="of this kind"):
        signed.accept(RAW, "edgeadapt/other/1", [KEY.public])
    with pytest.raises(TrustError, match="does not match"):
        signed.accept(rewritten({"kind": "edgeadapt/other/1"}), "edgeadapt/other/1", [KEY.public])


@pytest.mark.parametrize(
    "raw",
    [
        RAW + b"\n",
        b" " + RAW,
        RAW.replace(b'":', b'": ', 1),
        json.dumps(json.loads(RAW), separators=(",", ":")).encode().replace(b"\\u00fc", "ü".encode()),
        json.dumps(dict(reversed(json.loads(RAW).items())), separators=(",", ":")).encode(),
        RAW.replace(b'"kind"', b'"kind":"x","kind"', 1),
        RAW.replace(b"2.5", b"2.50"),
        RAW.decode().encode("utf-16"),
    ],
    ids=["newline", "space", "inner space", "raw unicode", "order", "key twice", "number", "utf-16"],
)
def test_another_spelling_of_the_same_document_is_refused(raw: bytes) -> None:
    with pytest.raises(TrustError):
        signed.accept(raw, KIND, [KEY.public])


@pytest.mark.parametrize(
    "change",
    [
        {"signature": json.loads(RAW)["signature"].upper()},
        {"signature": " " + json.loads(RAW)["signature"]},
        {"signature": ""},
        {"signature": None},
        {"signer": ["list"]},
        {"body": []},
        {"extra": 1},
    ],
    ids=repr,
)
def test_a_changed_envelope_is_refused(change: dict[str, Any]) -> None:
    assert rewritten({}) == RAW
    with pytest.raises(TrustError):
        signed.accept(rewritten(change), KIND, [KEY.public])


@pytest.mark.parametrize("field", ["body", "kind", "signature", "signer"])
def test_a_missing_field_is_refused(field: str) -> None:
    document = json.loads(RAW)
    del document[field]
    with pytest.raises(TrustError, match="damaged"):
        signed.accept(signed.canonical(document), KIND, [KEY.public])


def test_a_document_nested_too_deeply_to_parse_is_refused() -> None:
    with pytest.raises(TrustError, match="damaged"):
        signed.accept(b'{"body":' + b"[" * 200_000, KIND, [KEY.public])


def test_an_oversized_document_is_neither_read_nor_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signed, "MAX_DOCUMENT", len(RAW) - 1)
    with pytest.raises(TrustError, match="above the limit"):
        signed.accept(RAW, KIND, [KEY.public])
    with pytest.raises(DataError, match="above the limit"):
        signed.sign(KIND, BODY, KEY)


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), b"bytes", {1, 2}], ids=repr)
def test_what_json_has_no_form_for_is_not_signed(value: object) -> None:
    with pytest.raises(DataError, match="cannot be signed"):
        signed.sign(KIND, {"value": value}, KEY)
