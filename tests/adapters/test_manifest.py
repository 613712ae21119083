"""The three signed documents: round trips, and the refusal of any field that is missing, unknown or ill-formed."""

from dataclasses import FrozenInstanceError, asdict, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters import signed
from adapters.manifest import AdapterManifest, BaseManifest, PeftConfig, VersionManifest
from aggregation.entropy import SystemEntropy
from aggregation.errors import DataError, TrustError
from aggregation.pki.identity import IdentityKey

MANIFEST = VersionManifest(
    version=3,
    sha256="a" * 64,
    size=1234,
    base_digest="b" * 64,
    layout_digest="c" * 64,
    parent="d" * 64,
    round=3,
    survivors=("küche", "flur"),
    metrics={"loss": 0.25, "accuracy": 1.0},
    method=PeftConfig("lora", 8, 16, ("query", "value")),
    labels=("HassTurnOn", "HassTurnOff"),
)
CARD = BaseManifest("b" * 64, "text-classification", "int8", {"model.onnx": "a" * 64}, {"lora_A": ("384", "rank")}, 64)
SIDECAR = AdapterManifest(
    name="global",
    sha256="a" * 64,
    size=99,
    format="int8",
    base_digest="b" * 64,
    layout_digest="c" * 64,
    version=3,
    source="d" * 64,
    method=PeftConfig("lora", 8, 16, ("query",), rank_pattern=((r"layer\.0.*", 4),)),
    parent=None,
    rank=8,
    labels=("HassTurnOn",),
)
DOCUMENTS = [MANIFEST, CARD, SIDECAR]
KEY = IdentityKey.generate(SystemEntropy())
sha256 = st.text("0123456789abcdef", min_size=64, max_size=64)
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
manifests = st.builds(
    VersionManifest,
    version=st.integers(0, 2**63 - 1),
    sha256=sha256,
    size=st.integers(0, 2**63 - 1),
    base_digest=sha256,
    layout_digest=sha256,
    parent=st.none() | sha256,
    round=st.integers(0, 10**6),
    survivors=st.lists(text, max_size=3).map(tuple),
    metrics=st.dictionaries(text, st.floats(allow_nan=False, allow_infinity=False), max_size=3),
    method=st.builds(PeftConfig, st.just("lora"), st.integers(1, 64), st.integers(1, 64), st.just(("query",))),
    labels=st.lists(text, max_size=3).map(tuple),
)


def altered(
    document: VersionManifest | BaseManifest | AdapterManifest, change: dict[str, Any], key: IdentityKey
) -> bytes:
    return signed.sign(document.KIND, {**asdict(document), **change}, key)


@given(manifests)
def test_a_manifest_comes_back_equal_from_its_signed_form(manifest: VersionManifest) -> None:
    assert VersionManifest.accept(manifest.sign(KEY), [KEY.public]) == manifest


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.KIND)
def test_every_document_comes_back_equal(document: Any, key: IdentityKey) -> None:
    assert type(document).accept(document.sign(key), [key.public]) == document


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.KIND)
def test_no_document_passes_for_another(document: Any, key: IdentityKey) -> None:
    others: list[Any] = [
        kind for kind in (VersionManifest, BaseManifest, AdapterManifest) if kind is not type(document)
    ]
    assert len(others) == 2
    for other in others:
        with pytest.raises(TrustError, match="of this kind"):
            other.accept(document.sign(key), [key.public])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.KIND)
def test_an_unknown_signer_is_refused(document: Any, key: IdentityKey, stranger: IdentityKey) -> None:
    with pytest.raises(TrustError, match="does not trust"):
        type(document).accept(document.sign(stranger), [key.public])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.KIND)
def test_an_unknown_field_is_refused_even_when_signed(document: Any, key: IdentityKey) -> None:
    with pytest.raises(TrustError, match="field surplus"):
        type(document).accept(altered(document, {"surplus": 1}, key), [key.public])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.KIND)
def test_a_missing_field_is_refused_even_when_signed(document: Any, key: IdentityKey) -> None:
    for name in asdict(document):
        body = asdict(document)
        del body[name]
        with pytest.raises(TrustError, match=f"field {name}"):
            type(document).accept(signed.sign(document.KIND, body, key), [key.public])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.KIND)
def test_a_field_of_a_wrong_type_is_refused_even_when_signed(document: Any, key: IdentityKey) -> None:
    for name in asdict(document):
        with pytest.raises(TrustError, match=f"field {name}"):
            type(document).accept(altered(document, {name: [[1]]}, key), [key.public])


@pytest.mark.parametrize(
    ("document", "name", "value"),
    [
        (MANIFEST, "version", -1),
        (MANIFEST, "version", True),
        (MANIFEST, "version", 3.0),
        (MANIFEST, "version", "3"),
        (MANIFEST, "round", 2**63),
        (MANIFEST, "sha256", "A" * 64),
        (MANIFEST, "sha256", "a" * 64 + "\n"),
        (MANIFEST, "parent", ""),
        (MANIFEST, "metrics", {"loss": "0.1"}),
        (MANIFEST, "method", {"kind": "full", "rank": 8, "alpha": 16, "targets": []}),
        (MANIFEST, "method", {"kind": "lora", "rank": 8, "alpha": 16, "targets": [], "bias": "all"}),
        (CARD, "files", {"../model.onnx": "a" * 64}),
        (CARD, "files", {"/etc/passwd": "a" * 64}),
        (CARD, "files", {"..": "a" * 64}),
        (CARD, "files", {"": "a" * 64}),
        (SIDECAR, "format", "int2"),
    ],
    ids=str,
)
def test_an_ill_formed_value_is_refused_even_when_signed(
    document: Any, name: str, value: object, key: IdentityKey
) -> None:
    with pytest.raises(TrustError, match=f"field {name}"):
        type(document).accept(altered(document, {name: value}, key), [key.public])


def test_the_message_of_a_refused_document_is_one_line(key: IdentityKey) -> None:
    with pytest.raises(TrustError) as caught:
        VersionManifest.accept(altered(MANIFEST, {"version": -1, "surplus": 1}, key), [key.public])
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("edgeadapt/manifest/1: field version")


def test_a_manifest_with_a_metric_that_is_not_finite_cannot_be_signed(key: IdentityKey) -> None:
    with pytest.raises(DataError, match="cannot be signed"):
        replace(MANIFEST, metrics={"loss": float("nan")}).sign(key)


def test_documents_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        MANIFEST.version = 4  # type: ignore[misc]
