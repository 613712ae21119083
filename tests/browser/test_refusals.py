"""What is not exactly what a pinned key signed is refused by the page, in one line; the adapter in use goes on."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregation.entropy import SystemEntropy
from aggregation.pki.identity import IdentityKey
from edgeadapt.formats import dsse
from edgeadapt.formats.bundle import BASE_MANIFEST, MODEL, TOKENIZER, WEB_MODEL, WEIGHTS, adapter_path, manifest_path
from edgeadapt.formats.files import sha256
from edgeadapt.formats.graphinputs import to_inputs
from edgeadapt.formats.manifest import AdapterManifest
from edgeadapt.formats.quantization import quantize
from export.bundle.write import AdapterSource, add_adapter, write_bundle
from export.onnx.exported import ExportedBase
from tests.support.bundles import flip, resign, resign_base, resign_file

pytestmark = pytest.mark.slow

BASE_FILES = ["manifest.json", MODEL, WEIGHTS, WEB_MODEL, TOKENIZER]
ADAPTER_FILES = ["anna.json", "anna.onnx_adapter"]
PHRASE = "turn on the lights"
START = """(async () => {
  const { Client } = await import('/client.js');
  window.client = new Client();
  await client.open();
  await client.use('global');
  window.before = JSON.stringify((await client.rank(%r, 4)).labels);
})()"""


class Device:
    """A page with the adapter ``global`` in use, and the bundle it came from."""

    def __init__(self, page: Any, bundle: Path) -> None:
        self.page, self.bundle = page, bundle
        page.evaluate(START % PHRASE)

    def refuses(self, call: str, kind: str, about: str | None) -> str:
        """The message of the error with which ``call`` fails; the page answers as before."""
        error: dict[str, str] = self.page.error(call)
        assert error["name"] == kind, error
        assert about in (None, error["about"]), error
        assert "\n" not in error["message"]
        assert len(error["message"]) < 400
        assert self.page.evaluate(f"client.rank({PHRASE!r}, 4).then((r) => JSON.stringify(r.labels) === before)")
        return error["message"]

    def refuses_adapter(self, kind: str, about: str | None, name: str = "anna") -> str:
        return self.refuses(f"client.use({name!r})", kind, about)

    def refuses_base(self, kind: str, about: str | None) -> str:
        return self.refuses("client.open()", kind, about)


@pytest.fixture
def anna(bundle: Path, exported: ExportedBase, source: Callable[..., AdapterSource], household: IdentityKey) -> Path:
    """The bundle with a private adapter, which no page has used yet."""
    add_adapter(bundle, exported.adapter_inputs, source("anna", seed=1, parent="a" * 64), key=household)
    return bundle


@pytest.fixture
def device(page: Any, serve: Callable[[Path], str], anna: Path) -> Iterator[Device]:
    page.goto(serve(anna))
    yield Device(page, anna)
    assert page.errors() == []


@pytest.mark.parametrize("name", BASE_FILES)
def test_a_flipped_bit_in_any_file_of_the_base_is_refused(device: Device, name: str) -> None:
    path = device.bundle / "base" / name
    sound = path.read_bytes()
    for where in (0, 0.5, 1):
        flip(path, where)
        message = device.refuses_base("TrustError", None if name == "manifest.json" else name)
        assert f"base/{name}" in message
        path.write_bytes(sound)


@pytest.mark.parametrize("name", BASE_FILES)
def test_a_file_of_the_base_of_another_length_is_refused(device: Device, name: str) -> None:
    path = device.bundle / "base" / name
    sound = path.read_bytes()
    for changed in (sound[:-1], sound + b"\0", b""):
        path.write_bytes(changed)
        device.refuses_base("TrustError", "envelope" if name == "manifest.json" else name)
    path.unlink()
    device.refuses_base("DataError", name)


@pytest.mark.parametrize("name", ADAPTER_FILES)
def test_a_flipped_bit_in_either_file_of_an_adapter_is_refused(device: Device, name: str) -> None:
    path = device.bundle / "adapters" / name
    sound = path.read_bytes()
    for where in (0, 0.3, 0.6, 1):
        flip(path, where)
        message = device.refuses_adapter("TrustError", None if name == "anna.json" else name)
        assert f"adapters/{name}" in message
        path.write_bytes(sound)


@pytest.mark.parametrize("name", ADAPTER_FILES)
def test_an_adapter_file_of_another_length_is_refused(device: Device, name: str) -> None:
    path = device.bundle / "adapters" / name
    sound = path.read_bytes()
    for changed in (sound[:-1], sound + b"\0", b""):
        path.write_bytes(changed)
        device.refuses_adapter("TrustError", "envelope" if name == "anna.json" else name)
    path.unlink()
    device.refuses_adapter("DataError", name)


def test_an_oversized_document_is_not_read_to_its_end(device: Device) -> None:
    (device.bundle / "adapters" / "anna.json").write_bytes(bytes(dsse.MAX_ENVELOPE + 1))
    assert "larger than its limit" in device.refuses_adapter("TrustError", "anna.json")


def test_signatures_of_strangers_are_refused(
    device: Device, exported: ExportedBase, source: Callable[..., AdapterSource]
) -> None:
    stranger = IdentityKey.generate(SystemEntropy())
    add_adapter(device.bundle, exported.adapter_inputs, source("anna", version=9), key=stranger)
    device.refuses_adapter("TrustError", "keyid")
    resign_base(device.bundle, stranger)
    device.refuses_base("TrustError", "keyid")


def test_a_strangers_signature_under_a_pinned_name_is_refused(device: Device, household: IdentityKey) -> None:
    path = device.bundle / manifest_path("anna")
    resign(device.bundle, IdentityKey.generate(SystemEntropy()), "anna")
    forged = json.loads(path.read_bytes())
    forged["signatures"][0]["keyid"] = household.public.key_id
    path.write_bytes(json.dumps(forged).encode())
    device.refuses_adapter("TrustError", "signature")


def test_an_envelope_that_is_not_dsse_is_refused(device: Device) -> None:
    path = device.bundle / "adapters" / "anna.json"
    sound = path.read_bytes()
    for raw in (
        json.dumps(json.loads(sound) | {"extra": 1}).encode(),
        sound.replace(b'"payload":', b'"payload":"","payload":'),
        sound.replace(b'"sig":"', b'"sig":" '),
        sound.decode().encode("utf-16"),
        b"\xef\xbb\xbf" + sound,
        b"[" * 10**6,
    ):
        path.write_bytes(raw)
        device.refuses_adapter("TrustError", "envelope")


def test_a_signed_manifest_with_a_field_twice_unknown_or_ill_formed_is_refused(
    device: Device, household: IdentityKey
) -> None:
    path = device.bundle / "adapters" / "anna.json"
    payload = dsse.verify(path.read_bytes(), AdapterManifest.payload_type(), [household.public])
    for changed, about in (
        (payload.replace(b'"rank":4', b'"rank":4,"rank":4'), "payload"),
        (payload.replace(b'"rank":4', b'"rank":"4"'), "adapter-manifest.rank"),
        (payload.replace(b'"rank":4', b'"rank":4,"surplus":1'), "adapter-manifest.surplus"),
        (payload.replace(b'"rank":4,', b""), "adapter-manifest.rank"),
        (payload.replace(b'"peft_config":null', b'"peft_config":{"peft_type":"IA3"}'), "adapter-manifest.peft_config"),
        (b"[]", "adapter-manifest"),
    ):
        assert changed != payload
        path.write_bytes(dsse.sign(changed, AdapterManifest.payload_type(), household))
        device.refuses_adapter("TrustError", about)


def test_one_kind_of_document_never_passes_for_another(device: Device) -> None:
    base = (device.bundle / BASE_MANIFEST).read_bytes()
    (device.bundle / manifest_path("anna")).write_bytes(base)
    device.refuses_adapter("TrustError", "payloadType")


def test_an_adapter_for_another_base_or_under_another_name_is_refused(device: Device, household: IdentityKey) -> None:
    for end in (".json", ".onnx_adapter"):
        raw = (device.bundle / "adapters" / f"anna{end}").read_bytes()
        (device.bundle / "adapters" / f"berta{end}").write_bytes(raw)
    device.refuses_adapter("TrustError", "adapter-manifest.name", "berta")
    resign(device.bundle, household, "anna", base_digest="b" * 64)
    device.refuses_adapter("TrustError", "adapter-manifest.base_digest")


def test_a_name_that_leaves_the_folder_is_refused(device: Device) -> None:
    for name in ("../global", "/etc/passwd", "a/b", "%2e%2e"):
        device.refuses_adapter("ConfigError", "name", name)


def test_a_signed_adapter_with_nan_or_infinity_is_refused(
    device: Device, exported: ExportedBase, source: Callable[..., AdapterSource], household: IdentityKey
) -> None:
    for bad in (np.nan, np.inf):
        stored = quantize(to_inputs(source().tensors, exported.adapter_inputs.scaling), "int8")
        stored["classifier.bias"][1] = bad
        resign_file(device.bundle, household, stored, "anna")
        device.refuses_adapter("DataError", "classifier.bias")


def test_a_signed_adapter_of_other_tensors_is_refused(
    device: Device, exported: ExportedBase, source: Callable[..., AdapterSource], household: IdentityKey
) -> None:
    sound = quantize(to_inputs(source().tensors, exported.adapter_inputs.scaling), "int8")
    scale = "classifier.weight#scale"
    for stored, about in (
        ({name: value for name, value in sound.items() if name != "classifier.bias"}, "classifier.bias"),
        (sound | {"more": np.zeros(2, np.float32)}, "more"),
        (sound | {"classifier.weight": np.zeros((4, 31), np.int8)}, "classifier.weight"),
        ({name: value for name, value in sound.items() if name != scale}, "classifier.weight"),
        (sound | {scale: -sound[scale]}, "classifier.weight"),
        (sound | {scale: sound[scale].T.copy()}, "classifier.weight"),
        (sound | {"left#scale": sound[scale]}, "left#scale"),
        (sound | {"classifier.bias": np.zeros(4, np.float16)}, "classifier.bias"),
    ):
        resign_file(device.bundle, household, stored, "anna")
        device.refuses_adapter("DataError", about)


def test_a_signed_manifest_that_misstates_its_file_is_refused(device: Device, household: IdentityKey) -> None:
    path = device.bundle / manifest_path("anna")
    sound = path.read_bytes()
    claims: tuple[tuple[dict[str, Any], str], ...] = (
        ({"layout_digest": "c" * 64}, "adapter-manifest.layout_digest"),
        ({"rank": 5}, "adapter-manifest.rank"),
        ({"labels": ("a", "b")}, "adapter-manifest.labels"),
        ({"labels": ("a", "b", "c", "b")}, "labels"),
        ({"labels": ("a", "b", "c", "\x1b[31m")}, "labels"),
    )
    for claim, about in claims:
        path.write_bytes(sound)
        resign(device.bundle, household, "anna", **claim)
        device.refuses_adapter("DataError", about)
    for temperature in (0.01, 20.5, True):
        path.write_bytes(sound)
        resign(device.bundle, household, "anna", temperature=temperature)
        device.refuses_adapter("TrustError", "adapter-manifest.temperature")
    path.write_bytes(sound)
    resign(device.bundle, household, "anna", format="fp32")
    assert "int8 in an adapter of format fp32" in device.refuses_adapter("DataError", None)


def test_an_empty_adapter_file_is_refused_even_if_signed(device: Device, household: IdentityKey) -> None:
    (device.bundle / adapter_path("anna")).write_bytes(b"")
    resign(device.bundle, household, "anna", sha256=sha256(b""), size=0)
    device.refuses_adapter("DataError", ".onnx_adapter")


def test_a_rank_above_the_bases_limit_is_refused(
    page: Any, serve: Callable[[Path], str], bundle: Path, vendor: IdentityKey
) -> None:
    resign_base(bundle, vendor, max_rank=3)
    page.goto(serve(bundle))
    assert "rank 4, above the base's limit of 3" in page.alert("adapter-error")


def test_an_older_version_or_another_content_is_refused_even_after_the_page_was_closed(
    page: Any,
    serve: Callable[[Path], str],
    bundle: Path,
    exported: ExportedBase,
    source: Callable[..., AdapterSource],
    vendor: IdentityKey,
) -> None:
    url = serve(bundle)
    write_bundle(bundle, exported, [source(version=5)], key=vendor)
    page.goto(url)
    assert page.state() == "good"
    write_bundle(bundle, exported, [source(version=4)], key=vendor)
    page.goto(url)
    assert "is version 4, but version 5 was accepted here before" in page.alert("adapter-error")
    for other in (source(seed=5, version=5), replace(source(version=5), temperature=2.0)):
        write_bundle(bundle, exported, [other], key=vendor)
        page.goto(url)
        assert "has another content than the version 5 that was accepted here before" in page.alert("adapter-error")
    write_bundle(bundle, exported, [source(version=5)], key=vendor)
    page.goto(url)
    assert page.state() == "good"


def test_versions_are_noted_for_each_set_of_pinned_keys(
    page: Any,
    serve: Callable[[Path], str],
    bundle: Path,
    exported: ExportedBase,
    source: Callable[..., AdapterSource],
    vendor: IdentityKey,
) -> None:
    url = serve(bundle)
    write_bundle(bundle, exported, [source(version=5)], key=vendor)
    page.goto(url)
    (bundle.parent / "trust.pem").write_bytes(vendor.public.to_pem())
    write_bundle(bundle, exported, [source(version=4)], key=vendor)
    page.goto(url)
    assert page.state() == "good"


@pytest.mark.parametrize(
    "raw",
    [b"", b"hello", b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"],
    ids=["empty", "text", "short"],
)
def test_pinned_keys_that_are_none_open_nothing(
    page: Any, serve: Callable[[Path], str], bundle: Path, raw: bytes
) -> None:
    url = serve(bundle)
    (bundle.parent / "trust.pem").write_bytes(raw)
    page.goto(url)
    assert page.state() == "bad"
    assert "public key" in page.status()
