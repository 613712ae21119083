"""What is not exactly what a pinned key signed is refused in the page, in one line, and what was in use goes on."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from adapters import dsse
from adapters.files import sha256
from adapters.manifest import AdapterManifest, BaseManifest
from adapters.ondevice import quantize, to_graph
from aggregation.entropy import SystemEntropy
from aggregation.pki.identity import IdentityKey
from export.bundle.write import AdapterSource, add_adapter, write_bundle
from export.onnx.exported import ExportedBase

pytestmark = pytest.mark.slow

BASE_FILES = ["card.json", "model.onnx", "model.onnx.data", "web.onnx", "tokenizer.json"]
PHRASE = "turn on the lights"
START = """(async () => {
  const { Client } = await import('/client.js');
  window.client = new Client();
  await client.open();
  await client.use('global');
  window.before = JSON.stringify((await client.rank(%r, 4)).labels);
})()"""
TRY = "%s.then(() => null, (error) => ({ name: error.name, message: error.message }))"


class Device:
    """A page with the adapter ``global`` in use, and the bundle it came from."""

    def __init__(self, page: Any, bundle: Path) -> None:
        self.page, self.bundle = page, bundle
        page.evaluate(START % PHRASE)

    def refuses(self, call: str, kind: str, message: str) -> None:
        """``call`` fails with such an error, and the page answers as before."""
        error = self.page.evaluate(TRY % call)
        assert error is not None, "it was accepted"
        assert error["name"] == kind, error
        assert message in error["message"]
        assert "\n" not in error["message"]
        assert len(error["message"]) < 400
        assert self.page.evaluate(f"client.rank({PHRASE!r}, 4).then((r) => JSON.stringify(r.labels) === before)")

    def refuses_adapter(self, kind: str, message: str, name: str = "anna") -> None:
        self.refuses(f"client.use({name!r})", kind, message)

    def refuses_base(self, kind: str, message: str) -> None:
        self.refuses("client.open()", kind, message)


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


def resign(bundle: Path, key: IdentityKey, **changes: Any) -> None:
    """Write the sidecar of ``anna`` anew, as someone who holds ``key`` would."""
    path = bundle / "adapters" / "anna.json"
    sidecar = AdapterManifest.accept(path.read_bytes(), [key.public])
    path.write_bytes(replace(sidecar, **changes).sign(key))


def resign_file(bundle: Path, key: IdentityKey, stored: dict[str, Any]) -> None:
    path = bundle / "adapters" / "anna.onnx_adapter"
    container = ort.AdapterFormat()
    container.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in stored.items()})
    container.export_adapter(str(path))
    resign(bundle, key, sha256=sha256(path.read_bytes()), size=path.stat().st_size)


def flip(path: Path, where: float) -> bytes:
    raw = bytearray(path.read_bytes())
    raw[int(where * (len(raw) - 1))] ^= 1
    return bytes(raw)


def test_a_flipped_byte_in_any_file_of_the_base_is_refused(device: Device) -> None:
    for name in BASE_FILES:
        path = device.bundle / "base" / name
        sound = path.read_bytes()
        for where in (0, 0.5, 1):
            path.write_bytes(flip(path, where))
            device.refuses_base("TrustError", f"base/{name}")
            path.write_bytes(sound)


def test_a_file_of_the_base_of_another_length_is_refused(device: Device) -> None:
    for name in BASE_FILES:
        path = device.bundle / "base" / name
        sound = path.read_bytes()
        for changed in (sound[:-1], sound + b"\0", b""):
            path.write_bytes(changed)
            device.refuses_base("TrustError", "")
        path.unlink()
        device.refuses_base("DataError", f"base/{name} is missing")
        path.write_bytes(sound)


def test_a_flipped_byte_in_either_file_of_an_adapter_is_refused(device: Device) -> None:
    for name in ("anna.json", "anna.onnx_adapter"):
        path = device.bundle / "adapters" / name
        sound = path.read_bytes()
        for where in (0, 0.3, 0.6, 1):
            path.write_bytes(flip(path, where))
            device.refuses_adapter("TrustError", name)
            path.write_bytes(sound)


def test_an_adapter_file_of_another_length_is_refused(device: Device) -> None:
    for name in ("anna.json", "anna.onnx_adapter"):
        path = device.bundle / "adapters" / name
        sound = path.read_bytes()
        for changed in (sound[:-1], sound + b"\0", b""):
            path.write_bytes(changed)
            device.refuses_adapter("TrustError", "")
        path.unlink()
        device.refuses_adapter("DataError", f"adapters/{name} is missing")
        path.write_bytes(sound)


def test_an_oversized_document_is_not_read_to_its_end(device: Device) -> None:
    (device.bundle / "adapters" / "anna.json").write_bytes(bytes(2**21))
    device.refuses_adapter("TrustError", "above its limit")


def test_signatures_of_strangers_are_refused(
    device: Device, exported: ExportedBase, source: Callable[..., AdapterSource]
) -> None:
    stranger = IdentityKey.generate(SystemEntropy())
    add_adapter(device.bundle, exported.adapter_inputs, source("anna", version=9), key=stranger)
    device.refuses_adapter("TrustError", "not a trusted key")
    (device.bundle / "base" / "card.json").write_bytes(exported.manifest.sign(stranger))
    device.refuses_base("TrustError", "not a trusted key")


def test_a_strangers_signature_under_a_pinned_name_is_refused(device: Device, household: IdentityKey) -> None:
    path = device.bundle / "adapters" / "anna.json"
    sidecar = AdapterManifest.accept(path.read_bytes(), [household.public])
    forged = json.loads(sidecar.sign(IdentityKey.generate(SystemEntropy())))
    forged["signatures"][0]["keyid"] = household.public.key_id
    path.write_bytes(json.dumps(forged).encode())
    device.refuses_adapter("TrustError", "the signature does not match")


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
        device.refuses_adapter("TrustError", "not a signed document")


def test_a_signed_manifest_with_a_field_twice_unknown_or_ill_formed_is_refused(
    device: Device, household: IdentityKey
) -> None:
    path = device.bundle / "adapters" / "anna.json"
    payload = dsse.verify(path.read_bytes(), AdapterManifest.payload_type(), [household.public])
    for changed, message in (
        (payload.replace(b'"rank":4', b'"rank":4,"rank":4'), "a key occurs twice"),
        (payload.replace(b'"rank":4', b'"rank":"4"'), "field rank"),
        (payload.replace(b'"rank":4', b'"rank":4,"surplus":1'), "field surplus is unknown"),
        (payload.replace(b'"rank":4,', b""), "field rank is missing"),
        (payload.replace(b'"peft_config":null', b'"peft_config":{"peft_type":"IA3"}'), "field peft_config"),
        (b"[]", "not an object"),
    ):
        assert changed != payload
        path.write_bytes(dsse.sign(changed, AdapterManifest.payload_type(), household))
        device.refuses_adapter("TrustError", message)


def test_one_kind_of_document_never_passes_for_another(device: Device) -> None:
    card = (device.bundle / "base" / "card.json").read_bytes()
    (device.bundle / "adapters" / "anna.json").write_bytes(card)
    device.refuses_adapter("TrustError", "a document of type")


def test_an_adapter_for_another_base_or_under_another_name_is_refused(device: Device, household: IdentityKey) -> None:
    for end in (".json", ".onnx_adapter"):
        raw = (device.bundle / "adapters" / f"anna{end}").read_bytes()
        (device.bundle / "adapters" / f"berta{end}").write_bytes(raw)
    device.refuses_adapter("TrustError", "was signed for the adapter 'anna'", "berta")
    resign(device.bundle, household, base_digest="b" * 64)
    device.refuses_adapter("TrustError", "another base")


def test_a_name_that_leaves_the_folder_is_refused(device: Device) -> None:
    for name in ("../global", "/etc/passwd", "a/b", "%2e%2e"):
        device.refuses_adapter("ConfigError", "adapter name", name)


def test_a_signed_adapter_with_nan_or_infinity_is_refused(
    device: Device, exported: ExportedBase, source: Callable[..., AdapterSource], household: IdentityKey
) -> None:
    for bad in (np.nan, np.inf):
        stored = quantize(to_graph(source().tensors, exported.adapter_inputs.scaling), "int8")
        stored["classifier.bias"][1] = bad
        resign_file(device.bundle, household, stored)
        device.refuses_adapter("DataError", "'classifier.bias' holds NaN or infinity")


def test_a_signed_adapter_of_other_tensors_is_refused(
    device: Device, exported: ExportedBase, source: Callable[..., AdapterSource], household: IdentityKey
) -> None:
    sound = quantize(to_graph(source().tensors, exported.adapter_inputs.scaling), "int8")
    scale = "classifier.weight#scale"
    for stored, message in (
        ({name: value for name, value in sound.items() if name != "classifier.bias"}, "'classifier.bias' is missing"),
        (sound | {"more": np.zeros(2, np.float32)}, "'more' is missing"),
        (sound | {"classifier.weight": np.zeros((4, 31), np.int8)}, "its slot takes"),
        ({name: value for name, value in sound.items() if name != scale}, "no sound scales"),
        (sound | {scale: -sound[scale]}, "no sound scales"),
        (sound | {scale: sound[scale].T.copy()}, "no sound scales"),
        (sound | {"left#scale": sound[scale]}, "belong to no tensor"),
        (sound | {"classifier.bias": np.zeros(4, np.float16)}, "float16 in an adapter of format int8"),
    ):
        resign_file(device.bundle, household, stored)
        device.refuses_adapter("DataError", message)


def test_a_signed_sidecar_that_misdescribes_its_file_is_refused(device: Device, household: IdentityKey) -> None:
    true = AdapterManifest.accept((device.bundle / "adapters" / "anna.json").read_bytes(), [household.public])
    for claim, message in (
        ({"layout_digest": "c" * 64}, "another layout"),
        ({"rank": 5}, "other labels or ranks"),
        ({"labels": ("a", "b")}, "other labels or ranks"),
        ({"format": "fp32"}, "int8 in an adapter of format fp32"),
        ({"labels": ("a", "b", "c", "b")}, "a label twice"),
        ({"labels": ("a", "b", "c", "\x1b[31m")}, "no printable name"),
    ):
        (device.bundle / "adapters" / "anna.json").write_bytes(replace(true, **claim).sign(household))  # type: ignore[arg-type]
        device.refuses_adapter("DataError", message)


def test_an_empty_adapter_file_is_refused_even_if_signed(device: Device, household: IdentityKey) -> None:
    (device.bundle / "adapters" / "anna.onnx_adapter").write_bytes(b"")
    resign(device.bundle, household, sha256=sha256(b""), size=0)
    device.refuses_adapter("DataError", "not a sound .onnx_adapter file")


def test_a_rank_above_the_bases_limit_is_refused(
    page: Any, serve: Callable[[Path], str], bundle: Path, exported: ExportedBase, vendor: IdentityKey
) -> None:
    card: BaseManifest = replace(exported.manifest, max_rank=3)
    (bundle / "base" / "card.json").write_bytes(card.sign(vendor))
    page.goto(serve(bundle))
    assert page.state() == "bad"
    assert "rank 4, above the base's limit of 3" in page.status()


def test_an_older_version_is_refused_even_after_the_page_was_closed(
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
    assert page.state() == "bad"
    assert "is version 4, but version 5 was accepted here before" in page.status()
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
