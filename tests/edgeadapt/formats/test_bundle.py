"""What is wrong with a bundle besides the cases of tests/vectors/test_bundle.py is refused before anything is used."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregation.entropy import SystemEntropy
from aggregation.errors import DataError, EdgeAdaptError, TrustError
from aggregation.pki.identity import IdentityKey
from edgeadapt.formats import bundle as bundles
from edgeadapt.formats.bundle import (
    MODEL,
    TOKENIZER,
    WEB_MODEL,
    WEIGHTS,
    Bundle,
    VerifiedAdapter,
    adapter_names,
)
from edgeadapt.formats.graphinputs import to_inputs
from export.bundle.write import add_adapter, write_bundle
from export.onnx.exported import ExportedBase
from tests.support import models, refused
from tests.support.bundles import flip, resign_base
from tests.support.models import Source

tiny_base, model, source, bundle = models.tiny_base, models.model, models.source, models.bundle
exported = models.exported
vendor, household = models.vendor, models.household

BASE_FILES = [f"base/{name}" for name in ("manifest.json", MODEL, WEIGHTS, WEB_MODEL, TOKENIZER)]
FILES = [*BASE_FILES, "adapters/global.json", "adapters/global.onnx_adapter"]


@pytest.fixture
def trusted(bundle: Path, vendor: IdentityKey, household: IdentityKey) -> Bundle:
    """``bundle``, whose manifests may be signed by vendor and household."""
    return Bundle(bundle, (vendor.public, household.public))


def accept(bundle: Bundle, name: str = "global") -> VerifiedAdapter:
    """The base and the adapter, verified."""
    return bundle.adapter(name, bundle.base().manifest)


def test_a_sound_bundle_is_accepted_with_its_tensors(trusted: Bundle, exported: ExportedBase, source: Source) -> None:
    base, adapter = trusted.base(), accept(trusted)
    assert base.manifest == exported.manifest
    assert {name: base.read(name) for name in base.manifest.files} == {n: exported.read(n) for n in exported.digests}
    expected = to_inputs(source().tensors, exported.adapter_inputs.scaling)
    assert adapter.inputs.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(adapter.inputs[name], value, atol=np.abs(value).max() / 100)


@pytest.mark.parametrize("form", ["fp32", "fp16", "int8", "int4"])
def test_every_format_is_read(
    trusted: Bundle, exported: ExportedBase, source: Source, vendor: IdentityKey, form: Any
) -> None:
    write_bundle(trusted.folder, exported, [source()], key=vendor, form=form)
    adapter = accept(trusted)
    assert adapter.manifest.format == form
    for name, value in to_inputs(source().tensors, exported.adapter_inputs.scaling).items():
        np.testing.assert_allclose(adapter.inputs[name], value, atol=np.abs(value).max() / 5)


# --- files


@pytest.mark.parametrize("file", ["base/manifest.json", "adapters/global.json", "adapters/global.onnx_adapter"])
def test_a_file_above_its_limit_is_not_read_to_its_end(trusted: Bundle, file: str) -> None:
    with (trusted.folder / file).open("r+b") as raw:
        raw.truncate(2**40)  # sparse: more than any memory holds, and no byte on the disk
    with refused(TrustError, Path(file).name, value=2**40):
        accept(trusted)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_a_file_without_an_end_is_refused_and_not_waited_for(trusted: Bundle, file: str, kind: str) -> None:
    path = trusted.folder / file
    path.unlink()
    {"pipe": os.mkfifo, "device": lambda p: p.symlink_to("/dev/zero"), "folder": Path.mkdir}[kind](path)
    with refused(DataError, path.name):
        accept(trusted)


def test_files_of_file_managers_are_ignored(trusted: Bundle) -> None:
    (trusted.folder / "base" / ".DS_Store").write_bytes(b"x")
    (trusted.folder / "adapters" / "._global.json").write_bytes(b"x")
    assert accept(trusted).manifest.name == "global"
    assert adapter_names(trusted.folder) == ["global"]


@pytest.mark.parametrize("change", ["written", "replaced", "removed"])
def test_a_base_that_changes_between_check_and_use_is_refused(trusted: Bundle, change: str) -> None:
    base = trusted.base()
    base.check()
    data = trusted.folder / "base" / WEIGHTS
    stat, raw = data.stat(), data.read_bytes()
    if change != "written":
        data.unlink()
    if change != "removed":
        data.write_bytes(raw)
        os.utime(data, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # a forger sets the times of writing back
    with refused(TrustError, WEIGHTS):
        base.check()


def test_a_file_that_is_read_after_the_check_is_verified_again(trusted: Bundle) -> None:
    base = trusted.base()
    flip(trusted.folder / "base" / WEIGHTS, 0.5)
    with refused(TrustError, WEIGHTS):
        base.read(WEIGHTS)


def test_only_small_files_of_the_base_are_held_in_memory(trusted: Bundle) -> None:
    assert sorted(trusted.base().files) == [MODEL, TOKENIZER]


def test_a_limit_above_all_memory_costs_no_memory(bundle: Path) -> None:
    path = bundle.parent / "trust.pem"
    assert bundles.read_file(path, 2**62) == path.read_bytes()


# --- manifests


def test_an_adapter_signed_by_someone_else_is_refused(trusted: Bundle, source: Source, exported: ExportedBase) -> None:
    stranger = IdentityKey.generate(SystemEntropy())
    add_adapter(trusted.folder, exported.adapter_inputs, source(version=9), key=stranger)
    with refused(TrustError, "keyid", value=stranger.public.key_id):
        accept(trusted)


@pytest.mark.parametrize("file", ["base/manifest.json", "adapters/global.json"])
def test_a_damaged_manifest_is_named_by_its_file_with_the_remedy(trusted: Bundle, file: str) -> None:
    (trusted.folder / file).write_bytes(b"{}")
    with refused(TrustError, "envelope") as caught:
        accept(trusted)
    assert str(caught.value).startswith(f"{trusted.folder / file}: not a signed document")
    assert str(caught.value).endswith("copy it again from a trusted source")


def test_a_private_adapter_signed_by_the_household_is_accepted(
    trusted: Bundle, source: Source, exported: ExportedBase, household: IdentityKey
) -> None:
    add_adapter(trusted.folder, exported.adapter_inputs, source("anna", parent="a" * 64), key=household)
    assert accept(trusted, "anna").manifest.parent == "a" * 64


def test_a_base_manifest_that_lists_a_file_too_many_or_too_few_is_refused(
    trusted: Bundle, exported: ExportedBase, vendor: IdentityKey
) -> None:
    listed = exported.manifest.files
    cases: list[tuple[dict[str, str], type[EdgeAdaptError], str]] = [
        (listed | {"extra": "0" * 64}, DataError, "extra"),
        ({name: digest for name, digest in listed.items() if name != MODEL}, TrustError, MODEL),
        ({name: digest for name, digest in listed.items() if name != WEB_MODEL}, TrustError, WEB_MODEL),
        ({}, TrustError, MODEL),
        ({"../trust.pem": "0" * 64, MODEL: "0" * 64}, TrustError, "base-manifest.files.../trust.pem.[key]"),
    ]
    for files, kind, about in cases:
        resign_base(trusted.folder, vendor, files=files)
        with refused(kind, about):
            trusted.base()


def test_an_unknown_name_is_answered_with_the_known_ones(trusted: Bundle) -> None:
    with refused(DataError, "anna.json", value="anna") as caught:
        accept(trusted, "anna")
    assert "it has: global" in str(caught.value)


# --- what is signed and still wrong
