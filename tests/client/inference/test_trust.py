"""Each way in which a bundle can be wrong is refused before it answers anything."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from adapters.base import Base
from adapters.files import sha256
from adapters.manifest import AdapterManifest, BaseManifest
from adapters.ondevice import quantize, to_graph
from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError, DataError, EdgeAdaptError, TrustError
from aggregation.pki.identity import IdentityKey
from client.inference import intact
from client.inference.seen import SeenVersions
from client.inference.trust import Trust, VerifiedAdapter, adapter_names
from export.bundle.write import AdapterSource, add_adapter, write_bundle
from export.onnx.exported import ExportedBase

Source = Callable[..., AdapterSource]
FILES = [f"base/{name}" for name in ("card.json", "model.onnx", "model.onnx.data", "web.onnx", "tokenizer.json")]
ADAPTER_FILES = ["adapters/global.json", "adapters/global.onnx_adapter"]


def accept(bundle: Path, name: str = "global", trust: Path | None = None) -> VerifiedAdapter:
    pinned = Trust.open(bundle, trust)
    return pinned.adapter(bundle, pinned.base(bundle), name)


def refused(bundle: Path, kind: type[EdgeAdaptError], match: str | None = None) -> None:
    with pytest.raises(kind, match=match) as caught:
        accept(bundle)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def resign(bundle: Path, key: IdentityKey, **changes: Any) -> None:
    """Write the sidecar anew, as someone who holds ``key`` would."""
    path = bundle / "adapters" / "global.json"
    sidecar = AdapterManifest.accept(path.read_bytes(), [key.public])
    path.write_bytes(replace(sidecar, **changes).sign(key))


def resign_file(bundle: Path, key: IdentityKey, stored: dict[str, Any]) -> None:
    path = bundle / "adapters" / "global.onnx_adapter"
    container = ort.AdapterFormat()
    container.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in stored.items()})
    container.export_adapter(str(path))
    resign(bundle, key, sha256=sha256(path.read_bytes()), size=path.stat().st_size)


def test_a_sound_bundle_is_accepted_with_its_tensors(bundle: Path, exported: ExportedBase, source: Source) -> None:
    verified = accept(bundle)
    expected = to_graph(source().tensors, exported.adapter_inputs.scaling)
    assert verified.inputs.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(verified.inputs[name], value, atol=np.abs(value).max() / 100)


@pytest.mark.parametrize("file", FILES + ADAPTER_FILES)
@pytest.mark.parametrize("where", [0, 0.5, 1])
def test_a_flipped_byte_is_refused(bundle: Path, file: str, where: float) -> None:
    raw = bytearray((bundle / file).read_bytes())
    raw[int(where * (len(raw) - 1))] ^= 1
    (bundle / file).write_bytes(raw)
    refused(bundle, TrustError)


@pytest.mark.parametrize("file", FILES + ADAPTER_FILES)
@pytest.mark.parametrize("change", ["truncated", "trailing", "zero-length", "oversized"])
def test_a_file_of_another_length_is_refused(bundle: Path, file: str, change: str) -> None:
    raw = (bundle / file).read_bytes()
    changed = {"truncated": raw[:-1], "trailing": raw + b"\0", "zero-length": b"", "oversized": raw + bytes(2**21)}
    (bundle / file).write_bytes(changed[change])
    refused(bundle, TrustError)


@pytest.mark.parametrize("file", ["base/card.json", *ADAPTER_FILES])
def test_a_file_above_its_limit_is_not_read_to_its_end(bundle: Path, file: str) -> None:
    with (bundle / file).open("r+b") as raw:
        raw.truncate(2**40)  # sparse: more than any memory holds, and no byte on the disk
    refused(bundle, TrustError, "above its limit")


@pytest.mark.parametrize("file", FILES + ADAPTER_FILES)
def test_a_missing_file_is_named(bundle: Path, file: str) -> None:
    (bundle / file).unlink()
    refused(bundle, DataError, "global" if file.endswith("global.json") else Path(file).name)


def test_a_base_signed_by_someone_else_is_refused(bundle: Path, exported: ExportedBase) -> None:
    stranger = IdentityKey.generate(SystemEntropy())
    (bundle / "base" / "card.json").write_bytes(exported.manifest.sign(stranger))
    refused(bundle, TrustError, "not a trusted key")


@pytest.mark.parametrize("file", ["base/card.json", "adapters/global.json"])
def test_a_damaged_document_is_named_by_its_file(bundle: Path, file: str) -> None:
    (bundle / file).write_bytes(b"{}")
    refused(bundle, TrustError, f"{re.escape(str(bundle / file))}: .*; fetch it again")


def test_an_adapter_signed_by_someone_else_is_refused(bundle: Path, source: Source, exported: ExportedBase) -> None:
    add_adapter(bundle, exported.adapter_inputs, source(version=9), key=IdentityKey.generate(SystemEntropy()))
    refused(bundle, TrustError, "not a trusted key")


def test_a_private_adapter_signed_by_the_pinned_household_is_accepted(
    bundle: Path, source: Source, exported: ExportedBase, household: IdentityKey
) -> None:
    add_adapter(bundle, exported.adapter_inputs, source("anna", parent="a" * 64), key=household)
    assert accept(bundle, "anna").sidecar.parent == "a" * 64


def test_keys_inside_the_bundle_vouch_for_nothing(bundle: Path, vendor: IdentityKey) -> None:
    (bundle.parent / "trust.pem").unlink()
    (bundle / "trust.pem").write_bytes(vendor.public.to_pem())
    refused(bundle, TrustError, "no pinned keys at .*--trust")
    with pytest.raises(TrustError, match="cannot vouch for itself"):
        accept(bundle, trust=bundle / "trust.pem")


def test_a_link_into_the_bundle_vouches_for_nothing(bundle: Path, vendor: IdentityKey) -> None:
    (bundle / "keys").write_bytes(vendor.public.to_pem())
    (bundle.parent / "trust.pem").unlink()
    (bundle.parent / "trust.pem").symlink_to(bundle / "keys")
    with pytest.raises(TrustError, match="cannot vouch for itself"):
        accept(bundle)


def test_keys_named_by_the_user_are_used_instead(bundle: Path, vendor: IdentityKey, tmp_path: Path) -> None:
    (bundle.parent / "trust.pem").unlink()
    (tmp_path / "mine.pem").write_bytes(vendor.public.to_pem())
    assert accept(bundle, trust=tmp_path / "mine.pem").sidecar.name == "global"


@pytest.mark.parametrize("raw", [b"", b"\n", b"hello", b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"])
def test_a_file_without_sound_keys_is_refused(bundle: Path, raw: bytes) -> None:
    (bundle.parent / "trust.pem").write_bytes(raw)
    refused(bundle, TrustError, "PEM")


def test_trailing_bytes_after_the_keys_are_refused(bundle: Path, vendor: IdentityKey) -> None:
    (bundle.parent / "trust.pem").write_bytes(vendor.public.to_pem() + b"more")
    refused(bundle, TrustError, "not a list of public keys")


def test_a_private_key_in_the_trust_file_is_refused(bundle: Path, vendor: IdentityKey) -> None:
    (bundle.parent / "trust.pem").write_bytes(vendor.to_pem())
    refused(bundle, TrustError, "PEM")


def test_an_adapter_for_another_base_is_refused(bundle: Path, vendor: IdentityKey) -> None:
    resign(bundle, vendor, base_digest="b" * 64)
    refused(bundle, TrustError, "another base")


def test_an_adapter_under_another_name_is_refused(bundle: Path) -> None:
    for end in (".json", ".onnx_adapter"):
        (bundle / "adapters" / f"global{end}").rename(bundle / "adapters" / f"anna{end}")
    with pytest.raises(TrustError, match="was signed for the adapter 'global'"):
        accept(bundle, "anna")


def test_a_card_in_a_sidecars_place_is_refused(bundle: Path) -> None:
    (bundle / "adapters" / "global.json").write_bytes((bundle / "base" / "card.json").read_bytes())
    refused(bundle, TrustError, "a document of type")


def test_a_card_that_lists_a_file_too_many_or_too_few_is_refused(
    bundle: Path, exported: ExportedBase, vendor: IdentityKey
) -> None:
    listed = exported.manifest.files
    for files, kind, message in (
        (listed | {"extra": "0" * 64}, DataError, "extra is missing"),
        ({name: digest for name, digest in listed.items() if name != "model.onnx"}, TrustError, "lists no model.onnx"),
        ({name: digest for name, digest in listed.items() if name != "web.onnx"}, TrustError, "web.onnx is not listed"),
        ({}, TrustError, "lists no model.onnx"),
    ):
        card: BaseManifest = replace(exported.manifest, files=files)
        (bundle / "base" / "card.json").write_bytes(card.sign(vendor))
        refused(bundle, kind, message)


@pytest.mark.parametrize("name", ["chat_template.jinja", "model.onnx.data.bak"])
def test_a_file_that_nobody_signed_beside_the_base_is_refused(bundle: Path, name: str) -> None:
    (bundle / "base" / name).write_bytes(b"x")
    refused(bundle, TrustError, f"{name} is not listed")


def test_what_a_file_manager_leaves_behind_is_no_reason_to_refuse(bundle: Path) -> None:
    (bundle / "base" / ".DS_Store").write_bytes(b"x")
    assert accept(bundle).sidecar.name == "global"


@pytest.mark.parametrize("change", ["written", "replaced", "removed"])
def test_a_base_that_changes_between_check_and_use_is_refused(bundle: Path, change: str) -> None:
    base = Trust.open(bundle).base(bundle)
    base.check()
    data = bundle / "base" / "model.onnx.data"
    stat, raw = data.stat(), data.read_bytes()
    if change != "written":
        data.unlink()
    if change != "removed":
        data.write_bytes(raw)
        os.utime(data, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # a forger sets the times of writing back
    with pytest.raises(TrustError, match=r"model\.onnx\.data changed while"):
        base.check()


def test_only_small_files_of_the_base_are_held_in_memory(bundle: Path) -> None:
    assert sorted(Trust.open(bundle).base(bundle).files) == ["model.onnx", "tokenizer.json"]


def test_a_card_that_lists_a_file_outside_is_refused(bundle: Path, exported: ExportedBase, vendor: IdentityKey) -> None:
    card = replace(exported.manifest, files={"../trust.pem": "0" * 64, "model.onnx": "0" * 64})
    (bundle / "base" / "card.json").write_bytes(card.sign(vendor))
    refused(bundle, TrustError, "trust.pem")


@pytest.mark.parametrize("name", ["../global", "/etc/passwd", "", "a/b"])
def test_a_name_that_leaves_the_folder_is_refused(bundle: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="adapter name"):
        accept(bundle, name)


def test_an_unknown_name_is_answered_with_the_known_ones(bundle: Path) -> None:
    with pytest.raises(DataError, match="'anna'; it has: global"):
        accept(bundle, "anna")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_signed_adapter_with_nan_is_refused(
    bundle: Path, exported: ExportedBase, source: Source, vendor: IdentityKey, bad: float
) -> None:
    stored = quantize(to_graph(source().tensors, exported.adapter_inputs.scaling), "int8")
    stored["classifier.bias"][1] = bad
    resign_file(bundle, vendor, stored)
    refused(bundle, DataError, r"'classifier\.bias' holds NaN or infinity")


def test_a_signed_adapter_without_one_tensor_is_refused(
    bundle: Path, exported: ExportedBase, source: Source, vendor: IdentityKey
) -> None:
    stored = quantize(to_graph(source().tensors, exported.adapter_inputs.scaling), "int8")
    del stored["classifier.bias"]
    resign_file(bundle, vendor, stored)
    refused(bundle, DataError, r"'classifier\.bias' is missing")


def test_a_signed_adapter_of_another_width_is_refused(
    bundle: Path, exported: ExportedBase, source: Source, vendor: IdentityKey
) -> None:
    stored = quantize(to_graph(source().tensors, exported.adapter_inputs.scaling), "int8")
    stored["classifier.weight"] = np.zeros((4, 31), np.int8)
    resign_file(bundle, vendor, stored)
    refused(bundle, DataError, "its slot takes")


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        ({"layout_digest": "c" * 64}, "another layout"),
        ({"rank": 5}, "other labels or ranks"),
        ({"labels": ("a", "b")}, "other labels or ranks"),
        ({"format": "fp32"}, "int8 in an adapter of format fp32"),
        ({"labels": ("a", "b", "c", "b")}, "a label twice"),
        ({"labels": ("a", "b", "c", " ")}, "no printable name"),
        ({"labels": ("a", "b", "c", "\x1b[31m")}, "no printable name"),
        ({"labels": ("a", "b", "c", "d" * 257)}, "no printable name"),
    ],
)
def test_a_signed_sidecar_that_misdescribes_its_file_is_refused(
    bundle: Path, vendor: IdentityKey, claim: dict[str, Any], message: str
) -> None:
    resign(bundle, vendor, **claim)
    refused(bundle, DataError, message)


def test_a_rank_above_the_bases_limit_is_refused(bundle: Path, exported: ExportedBase, vendor: IdentityKey) -> None:
    (bundle / "base" / "card.json").write_bytes(replace(exported.manifest, max_rank=3).sign(vendor))
    refused(bundle, DataError, "rank 4, above the base's limit of 3")


@pytest.mark.parametrize("form", ["fp32", "fp16", "int8", "int4"])
def test_every_format_is_read(
    bundle: Path, exported: ExportedBase, source: Source, vendor: IdentityKey, form: Any
) -> None:
    write_bundle(bundle, exported, [source()], key=vendor, form=form)
    verified = accept(bundle)
    assert verified.sidecar.format == form
    for name, value in to_graph(source().tensors, exported.adapter_inputs.scaling).items():
        np.testing.assert_allclose(verified.inputs[name], value, atol=np.abs(value).max() / 5)


def test_a_signed_file_that_is_no_adapter_is_refused(bundle: Path, vendor: IdentityKey) -> None:
    (bundle / "adapters" / "global.onnx_adapter").write_bytes(b"")
    resign(bundle, vendor, sha256=sha256(b""), size=0)
    refused(bundle, DataError, "not a sound")


def update(bundle: Path, exported: ExportedBase, source: AdapterSource, key: IdentityKey) -> None:
    write_bundle(bundle, exported, [source], key=key)


def test_rollback_to_an_older_version_is_refused_even_after_a_restart(
    bundle: Path, exported: ExportedBase, source: Source, vendor: IdentityKey
) -> None:
    accept(bundle)
    update(bundle, exported, source(version=5), vendor)
    accept(bundle)
    update(bundle, exported, source(version=4), vendor)
    refused(bundle, TrustError, "is version 4, but version 5 was accepted")


def test_the_same_and_a_newer_version_are_accepted(
    bundle: Path, exported: ExportedBase, source: Source, vendor: IdentityKey
) -> None:
    for version in (3, 3, 4):
        update(bundle, exported, source(version=version), vendor)
        assert accept(bundle).sidecar.version == version


def test_a_refused_adapter_does_not_raise_the_version_seen(bundle: Path, vendor: IdentityKey) -> None:
    resign(bundle, vendor, version=10, rank=99)
    refused(bundle, DataError)
    resign(bundle, vendor, version=3, rank=4)
    assert accept(bundle).sidecar.version == 3


def test_versions_are_counted_for_each_name_and_base(
    bundle: Path, exported: ExportedBase, source: Source, vendor: IdentityKey, household: IdentityKey
) -> None:
    update(bundle, exported, source(version=9), vendor)
    accept(bundle)
    add_adapter(bundle, exported.adapter_inputs, source("anna", version=2), key=household)
    assert accept(bundle, "anna").sidecar.version == 2
    update(bundle, replace(exported, base_digest="d" * 64), source(version=1), vendor)
    assert accept(bundle).sidecar.version == 1


@pytest.mark.parametrize("raw", [b"", b"[]", b"{", b'{"a": 1}', b'{"a": {"global": "9"}}', b'{"a": {"global": true}}'])
def test_a_damaged_note_of_versions_is_refused_and_kept(bundle: Path, raw: bytes) -> None:
    note = bundle.parent / "trust.seen.json"
    note.write_bytes(raw)
    refused(bundle, TrustError, r"trust\.seen\.json is damaged")
    assert note.read_bytes() == raw


def test_the_note_of_versions_names_base_adapter_and_version(bundle: Path, tiny_base: Base) -> None:
    accept(bundle)
    assert json.loads((bundle.parent / "trust.seen.json").read_bytes()) == {tiny_base.digest: {"global": 3}}
    assert [path.name for path in bundle.parent.glob(".*")] == [".bundle.lock"]


def test_a_version_that_cannot_be_noted_is_not_accepted(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_args: object, **_kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "replace", denied)
    refused(bundle, ConfigError, "Permission denied.*--trust")
    assert not list(bundle.parent.glob(".trust.seen*"))


def test_versions_that_are_noted_at_the_same_time_are_all_kept(bundle: Path) -> None:
    sidecar, seen = accept(bundle).sidecar, SeenVersions(bundle.parent / "many.seen.json")
    names = [f"adapter-{number}" for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: seen.note(replace(sidecar, name=name)), names))
    (noted,) = json.loads(seen.path.read_bytes()).values()
    assert noted == dict.fromkeys(names, 3)


def test_a_folder_in_a_files_place_is_refused(bundle: Path) -> None:
    file = bundle / "adapters" / "global.onnx_adapter"
    file.unlink()
    file.mkdir()
    refused(bundle, DataError, r"global\.onnx_adapter is no regular file")


@pytest.mark.parametrize("file", [*FILES, *ADAPTER_FILES])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_file_without_an_end_is_refused_and_not_waited_for(bundle: Path, file: str, kind: str) -> None:
    path = bundle / file
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    refused(bundle, DataError, "is no regular file|has no sidecar")


def test_what_a_file_manager_leaves_behind_is_no_adapter(bundle: Path) -> None:
    (bundle / "adapters" / "._global.json").write_bytes(b"x")
    assert adapter_names(bundle) == ["global"]


def test_a_limit_above_all_memory_costs_no_memory(bundle: Path) -> None:
    assert intact.read(bundle.parent / "trust.pem", 2**62) == (bundle.parent / "trust.pem").read_bytes()


def test_numpy_is_there_before_onnxruntime_which_would_lose_a_ctrl_c_while_importing_it() -> None:
    code = "import sys, client.browser.server; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names = done.stdout.split()
    assert names.index("numpy") < names.index("onnxruntime.capi")


def test_a_repr_shows_no_weights(bundle: Path) -> None:
    assert len(repr(accept(bundle))) < 1000
    assert asdict(accept(bundle).sidecar)["name"] == "global"
