"""What is not exactly what a pinned key signed is refused by the page, in one line; the adapter in use goes on."""

import json
from collections.abc import Callable
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
from tests.support.nodetab import NodeTab

pytestmark = pytest.mark.slow

BASE_FILES = ["manifest.json", MODEL, WEIGHTS, WEB_MODEL, TOKENIZER]
ADAPTER_FILES = ["anna.json", "anna.onnx_adapter"]
PHRASE = "turn on the lights"
START = """(async () => {
  globalThis.engine = await opened();
  await engine.use('global');
  globalThis.before = JSON.stringify((await engine.rank(%r, 4)).labels);
})()"""


class Device:
    """A tab with the adapter ``global`` in use, and the bundle it came from."""

    def __init__(self, tab: NodeTab, bundle: Path) -> None:
        self.tab, self.bundle = tab, bundle
        tab.open(bundle)
        tab.evaluate(START % PHRASE)

    def refuses(self, call: str, kind: str, about: str | None) -> str:
        """The message of the error with which ``call`` fails; the tab answers as before."""
        error: dict[str, str] = self.tab.error(call)
        assert error["name"] == kind, error
        assert about in (None, error["about"]), error
        assert "\n" not in error["message"]
        assert len(error["message"]) < 400
        assert self.tab.evaluate(f"engine.rank({PHRASE!r}, 4).then((r) => JSON.stringify(r.labels) === before)")
        return error["message"]

    def refuses_adapter(self, kind: str, about: str | None, name: str = "anna") -> str:
        return self.refuses(f"engine.use({name!r})", kind, about)

    def refuses_base(self, kind: str, about: str | None) -> str:
        return self.refuses("opened()", kind, about)


@pytest.fixture
def device(
    tab: NodeTab,
    bundle: Path,
    exported: ExportedBase,
    source: Callable[..., AdapterSource],
    household: IdentityKey,
) -> Device:
    """With a private adapter in its bundle, which it has not used yet."""
    add_adapter(bundle, exported.adapter_inputs, source("anna", seed=1, parent="a" * 64), key=household)
    return Device(tab, bundle)


def test_a_flipped_bit_in_any_file_of_the_base_is_refused(device: Device) -> None:
    damaged(device.bundle / "base", BASE_FILES, "manifest.json", device.refuses_base)


def test_a_flipped_bit_in_either_file_of_an_adapter_is_refused(device: Device) -> None:
    damaged(device.bundle / "adapters", ADAPTER_FILES, "anna.json", device.refuses_adapter)


def damaged(folder: Path, names: list[str], manifest: str, refused: Callable[[str, str | None], str]) -> None:
    """A file with another bit, of another length, and one that is missing."""
    for name in names:
        path, stated = folder / name, "envelope" if name == manifest else name
        sound = path.read_bytes()
        for where in (0, 0.5, 1):
            flip(path, where)
            assert f"{folder.name}/{name}" in refused("TrustError", None if name == manifest else name)
            path.write_bytes(sound)
        for changed in (sound[:-1], sound + b"\0", b""):
            path.write_bytes(changed)
            refused("TrustError", stated)
        path.unlink()
        refused("DataError", name)
        path.write_bytes(sound)


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


def test_a_rank_above_the_bases_limit_is_refused(tab: NodeTab, bundle: Path, vendor: IdentityKey) -> None:
    resign_base(bundle, vendor, max_rank=3)
    tab.open(bundle)
    assert (
        "rank 4, above the base's limit of 3" in tab.error("opened().then((engine) => engine.use('global'))")["message"]
    )


def test_an_older_version_or_another_content_is_refused_even_after_the_page_was_closed(
    page: Any,
    serve: Callable[[Path], str],
    bundle: Path,
    exported: ExportedBase,
    source: Callable[..., AdapterSource],
    vendor: IdentityKey,
) -> None:
    """Versions are noted for each set of pinned keys."""
    url = serve(bundle)

    def opened(adapter: AdapterSource) -> str:
        write_bundle(bundle, exported, [adapter], key=vendor)
        page.goto(url)
        return str(page.alert("adapter-error"))

    assert opened(source(version=5)) == ""
    assert "is version 4, but version 5 was accepted here before" in opened(source(version=4))
    for other in (source(seed=5, version=5), replace(source(version=5), temperature=2.0)):
        assert "has another content than the version 5 that was accepted here before" in opened(other)
    assert opened(source(version=5)) == ""
    (bundle.parent / "trust.pem").write_bytes(vendor.public.to_pem())
    assert opened(source(version=4)) == ""


def test_pinned_keys_that_are_none_open_nothing(tab: NodeTab, bundle: Path) -> None:
    for raw in (b"", b"hello", b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"):
        (bundle.parent / "trust.pem").write_bytes(raw)
        tab.open(bundle)
        assert "public key" in tab.error("opened()")["message"]
