"""The three signed documents: round trips, and the refusal of any field that is missing, unknown or ill-formed."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import pytest

from aggregation.errors import ConfigError, DataError, TrustError
from aggregation.messages import MAX_COHORT
from aggregation.pki.identity import IdentityKey
from aggregation.steps import Step
from edgeadapt.formats import dsse, jsontext
from edgeadapt.formats.dsse import MAX_ENVELOPE
from edgeadapt.formats.manifest import (
    AdapterManifest,
    BaseManifest,
    Card,
    PrivacyBound,
    RoundRecord,
    ServerRule,
    VersionManifest,
    check_labels,
    check_name,
)
from edgeadapt.formats.peftconfig import PeftConfig
from tests.support import refused

PLAIN = PeftConfig("LORA", 8, 16, ("query", "value"))
VERSION = VersionManifest(
    version=3,
    sha256="a" * 64,
    size=1234,
    base_digest="b" * 64,
    layout_digest="c" * 64,
    parent="d" * 64,
    round=3,
    plan="e" * 64,
    rule=ServerRule("FedAdam", {"learning_rate": 0.01}),
    combination=None,
    survivors=("küche", "flur"),
    metrics={"loss": 0.25, "accuracy": 1.0},
    privacy=PrivacyBound(3.5, 1e-6),
    peft_config=PLAIN,
    labels=("HassTurnOn", "HassTurnOff"),
)
BASE = BaseManifest(
    base_digest="b" * 64,
    task="text-classification",
    profile="int8",
    files={"model.onnx": "a" * 64},
    slots={"lora_A": ("384", "rank")},
    max_rank=64,
    independent_rows=True,
    onnxruntime="1.23",
    opset=20,
    merged={"f" * 64: "LOKR"},
)
ADAPTER = AdapterManifest(
    name="global",
    sha256="a" * 64,
    size=99,
    format="int8",
    base_digest="b" * 64,
    layout_digest="c" * 64,
    version=3,
    source="d" * 64,
    peft_config=PeftConfig("LORA", 8, 16, ("query",), rank_pattern=((r"layer\.0.*", 4),)),
    parent=None,
    rank=8,
    labels=("HassTurnOn",),
    temperature=1.25,
    privacy=PrivacyBound(6.0, 1e-5),
    policy="e" * 64,
)
CARD = Card(owner="Zoë", purpose="Lights", data="Volunteers", license="MIT", languages=("de", "en"))
DOCUMENTS = [VERSION, BASE, ADAPTER]


def signed(document: Any, body: dict[str, Any], key: IdentityKey) -> bytes:
    return dsse.sign(jsontext.encode(body), document.payload_type(), key)


def altered(
    document: VersionManifest | BaseManifest | AdapterManifest, change: dict[str, Any], key: IdentityKey
) -> bytes:
    return signed(document, {**asdict(document), **change}, key)


@contextmanager
def refused_field(document: Any, name: str) -> Iterator[None]:
    """The block is refused about the field ``name``, or about something in it."""
    with pytest.raises(TrustError) as caught:
        yield
    assert f"{caught.value.about}.".startswith(f"{document.NAME}.{name}.")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.NAME)
def test_every_document_comes_back_equal(document: Any, key: IdentityKey) -> None:
    assert type(document).accept(document.sign(key), [key.public]) == document


def test_an_adapter_without_a_policy_has_the_manifest_and_the_content_from_before_there_were_policies(
    key: IdentityKey,
) -> None:
    plain = replace(ADAPTER, policy=None)
    assert b'"policy"' not in dsse.unverified(plain.sign(key), plain.payload_type())
    assert AdapterManifest.accept(plain.sign(key), [key.public]) == plain
    assert plain.content != ADAPTER.content


def test_a_card_is_signed_and_the_content_and_the_manifests_without_one_stay_as_they_were(key: IdentityKey) -> None:
    """The payload is the one that was signed before there were cards, bit for bit."""
    stated = replace(ADAPTER, card=CARD)
    assert AdapterManifest.accept(stated.sign(key), [key.public]) == stated
    assert stated.content == ADAPTER.content
    fields = {name: value for name, value in asdict(ADAPTER).items() if name != "card"}
    del fields["peft_config"]["layers_to_transform"]
    assert dsse.unverified(ADAPTER.sign(key), ADAPTER.payload_type()) == jsontext.encode(fields)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.NAME)
def test_no_document_passes_for_another_or_by_an_unknown_signer(
    document: Any, key: IdentityKey, stranger: IdentityKey
) -> None:
    for other in {VersionManifest, BaseManifest, AdapterManifest} - {type(document)}:
        with refused(TrustError, "payloadType", value=document.payload_type()):
            other.accept(document.sign(key), [key.public])
    with refused(TrustError, "keyid"):
        type(document).accept(document.sign(stranger), [key.public])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.NAME)
def test_an_unknown_field_a_missing_one_and_one_of_a_wrong_type_are_refused_even_when_signed(
    document: Any, key: IdentityKey
) -> None:
    with refused(TrustError, f"{document.NAME}.surplus"):
        type(document).accept(altered(document, {"surplus": 1}, key), [key.public])
    for name in asdict(document):
        less = {other: value for other, value in asdict(document).items() if other != name}
        raws = [altered(document, {name: [[1]]}, key)]
        if name not in ("policy", "card"):  # manifests from before there were such have none
            raws.append(signed(document, less, key))
        for raw in raws:
            with refused_field(document, name):
                type(document).accept(raw, [key.public])


@pytest.mark.parametrize(
    ("document", "name", "value"),
    [
        (VERSION, "version", -1),
        (VERSION, "version", True),
        (VERSION, "version", 3.0),
        (VERSION, "version", "3"),
        (VERSION, "round", 2**63),
        (VERSION, "sha256", "A" * 64),
        (VERSION, "sha256", "a" * 64 + "\n"),
        (VERSION, "parent", ""),
        (VERSION, "metrics", {"loss": "0.1"}),
        (VERSION, "peft_config", {**asdict(PLAIN), "peft_type": "LOKR"}),
        (VERSION, "peft_config", {**asdict(PLAIN), "bias": "some"}),
        (BASE, "files", {"../model.onnx": "a" * 64}),
        (ADAPTER, "temperature", 0.049),
        (ADAPTER, "temperature", 20.1),
    ],
    ids=str,
)
def test_an_ill_formed_value_is_refused_even_when_signed(
    document: Any, name: str, value: object, key: IdentityKey
) -> None:
    with refused_field(document, name):
        type(document).accept(altered(document, {name: value}, key), [key.public])


@pytest.mark.parametrize(
    "payload",
    [b"[]", b"null", b"{", b'{"name": 1, "name": 1}', b"\xff"],
    ids=["list", "null", "cut", "key twice", "not UTF-8"],
)
def test_a_signed_payload_that_is_no_object_is_refused(payload: bytes, key: IdentityKey) -> None:
    for document in DOCUMENTS:
        raw = dsse.sign(payload, document.payload_type(), key)
        with pytest.raises(TrustError) as caught:
            type(document).accept(raw, [key.public])
        assert caught.value.about.startswith(document.NAME)


def test_a_key_twice_is_refused_even_when_both_values_are_the_same(key: IdentityKey) -> None:
    body = jsontext.encode(asdict(VERSION)).replace(b'"round":3', b'"round":3,"round":3')
    with refused(TrustError, "version-manifest"):
        VersionManifest.accept(dsse.sign(body, VERSION.payload_type(), key), [key.public])


def test_an_unverified_manifest_is_the_one_in_the_envelope(key: IdentityKey, stranger: IdentityKey) -> None:
    assert AdapterManifest.unverified(ADAPTER.sign(stranger)) == ADAPTER
    with refused_field(ADAPTER, "rank"):
        AdapterManifest.unverified(altered(ADAPTER, {"rank": -1}, key))


def test_the_message_of_a_refused_document_is_one_line(key: IdentityKey) -> None:
    with pytest.raises(TrustError) as caught:
        VersionManifest.accept(altered(VERSION, {"version": -1, "surplus": 1}, key), [key.public])
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("version-manifest: field version")


def test_a_manifest_with_a_metric_that_is_not_finite_cannot_be_signed(key: IdentityKey) -> None:
    with refused(DataError, "version-manifest"):
        replace(VERSION, metrics={"loss": float("nan")}).sign(key)


@pytest.mark.parametrize("name", ["global", "household-07", "a.b_c", "A" * 64])
def test_plain_names_are_accepted(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "a\\b", ".hidden", "a\n", "A" * 65, "é", "-x"])
def test_a_name_that_could_leave_the_folder_or_hide_in_it_is_refused(name: str) -> None:
    with refused(ConfigError, "name"):
        check_name(name)


def test_labels_are_printable_names_that_occur_once() -> None:
    check_labels("global", ["HassTurnOn", "Küche an", "x" * 256])
    for labels in (["a", "b", "a"], [""], [" "], ["a\n"], ["x" * 257], ["\x1b[31m"]):
        with refused(DataError, "labels"):
            check_labels("global", labels)


# The record of a round


KEY = IdentityKey(bytes(range(32)))
LONGEST = tuple(f"{number:064}" for number in range(MAX_COHORT))  # of the names that a certificate can have


@pytest.fixture
def record() -> RoundRecord:
    """Every device of the largest cohort is among the survivors, and dropped out after its update arrived."""
    step = max((step.value for step in Step), key=len)
    return RoundRecord(
        round=1,
        previous=None,
        offer="0" * 64,
        plan="0" * 64,
        entries=2**40,
        root="0" * 64,
        survivors=LONGEST,
        groups=(),
        dropped=dict.fromkeys(LONGEST, step),
        blamed=(),
        reason=None,
        aborted=None,
        spoiled=None,
        sum="0" * 64,
        version=1,
        adapter="0" * 64,
        optimizer="0" * 64,
        bytes_up=2**40,
        bytes_down=2**40,
        seconds=1.5,
        epsilon=None,
        metrics={"accuracy": 0.5, "loss": 0.5},
    )


def test_the_largest_cohort_with_the_longest_names_fits_into_a_record(record: RoundRecord) -> None:
    raw = record.sign(KEY)
    assert RoundRecord.accept(raw, [KEY.public]) == record
    assert MAX_ENVELOPE / 4 < len(raw) < MAX_ENVELOPE / 1.5


def test_a_record_from_before_rounds_had_a_time_is_read(record: RoundRecord) -> None:
    fields = {name: value for name, value in asdict(record).items() if name != "ended"}
    raw = dsse.sign(jsontext.encode(fields), RoundRecord.payload_type(), KEY)
    assert RoundRecord.accept(raw, [KEY.public]) == record
