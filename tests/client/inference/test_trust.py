"""Which keys a device trusts, and that it accepts no rollback; tests/vectors/test_bundle.py has the other rules."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from aggregation.errors import ConfigError, DataError, TrustError
from aggregation.pki.identity import IdentityKey
from client.inference.trust import SeenVersions, Trust
from edgeadapt.bases.base import Base
from edgeadapt.formats.bundle import VerifiedAdapter
from export.bundle.write import write_bundle
from export.onnx.exported import ExportedBase
from tests.support import refused
from tests.support.bundles import resign
from tests.support.models import Source


def accept(bundle: Path, name: str = "global", pinned: Path | None = None) -> VerifiedAdapter:
    trust = Trust.open(bundle, pinned)
    return trust.adapter(name, trust.bundle.base())


# --- pinned keys


def test_keys_inside_the_bundle_vouch_for_nothing(bundle: Path, vendor: IdentityKey) -> None:
    (bundle.parent / "trust.pem").unlink()
    (bundle / "trust.pem").write_bytes(vendor.public.to_pem())
    for pinned in (None, bundle / "trust.pem"):
        with refused(TrustError, "trust.pem"):
            accept(bundle, pinned=pinned)


def test_a_link_that_leads_to_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bundle").symlink_to("bundle")
    with pytest.raises((DataError, TrustError)):  # from Python 3.13 on, such a link is a path like others
        Trust.open(tmp_path / "bundle")


def test_a_link_into_the_bundle_vouches_for_nothing(bundle: Path, vendor: IdentityKey) -> None:
    (bundle / "keys").write_bytes(vendor.public.to_pem())
    (bundle.parent / "trust.pem").unlink()
    (bundle.parent / "trust.pem").symlink_to(bundle / "keys")
    with refused(TrustError, "trust.pem"):
        accept(bundle)


def test_keys_named_by_the_user_are_used_instead(bundle: Path, vendor: IdentityKey, tmp_path: Path) -> None:
    (bundle.parent / "trust.pem").unlink()
    with refused(TrustError, "trust.pem") as caught:
        accept(bundle)
    assert "--trust" in str(caught.value)
    (tmp_path / "mine.pem").write_bytes(vendor.public.to_pem())
    assert accept(bundle, pinned=tmp_path / "mine.pem").manifest.name == "global"


def test_a_bundle_of_another_signer_is_refused(bundle: Path, household: IdentityKey, tmp_path: Path) -> None:
    (tmp_path / "mine.pem").write_bytes(household.public.to_pem())
    with refused(TrustError, "keyid"):
        accept(bundle, pinned=tmp_path / "mine.pem")


# --- rollback


def test_the_same_version_with_another_content_is_refused_even_after_a_restart(
    bundle: Path, exported: ExportedBase, source: Source, vendor: IdentityKey
) -> None:
    accept(bundle)
    labels = ("Lock", "Light", "Music", "Timer")
    for other in (source(seed=5), replace(source(), labels=labels), replace(source(), temperature=1.5)):
        write_bundle(bundle, exported, [other], key=vendor)
        with refused(TrustError, "adapter-manifest.source"):
            accept(bundle)
    write_bundle(bundle, exported, [source(seed=5, version=4)], key=vendor)
    assert accept(bundle).manifest.version == 4


def test_the_same_content_in_another_number_format_is_accepted(
    bundle: Path, exported: ExportedBase, source: Source, vendor: IdentityKey
) -> None:
    before = accept(bundle).manifest
    write_bundle(bundle, exported, [source()], key=vendor, form="int4")
    after = accept(bundle).manifest
    assert (before.format, after.format, before.version) == ("int8", "int4", after.version)
    assert before.sha256 != after.sha256


def test_a_refused_adapter_does_not_raise_the_version_seen(bundle: Path, vendor: IdentityKey) -> None:
    resign(bundle, vendor, version=10, rank=99)
    with refused(DataError, "adapter-manifest.rank"):
        accept(bundle)
    resign(bundle, vendor, version=3, rank=4)
    assert accept(bundle).manifest.version == 3


@pytest.mark.parametrize("raw", [b"", b'{"a": {"global": 9}}', b" " * 2**22])
def test_a_damaged_note_of_versions_is_refused_and_kept(bundle: Path, raw: bytes) -> None:
    note = bundle.parent / "trust.seen.json"
    note.write_bytes(raw)
    with refused(TrustError, "trust.seen.json"):
        accept(bundle)
    assert note.read_bytes() == raw


@pytest.mark.parametrize("name", ["trust.seen.json", "trust.pem", "bundle/adapters/global.json"])
def test_a_pipe_in_place_of_a_file_is_named_with_its_own_remedy(bundle: Path, name: str) -> None:
    accept(bundle)
    path = bundle.parent / name
    path.unlink()
    os.mkfifo(path)
    with pytest.raises((DataError, TrustError)) as caught:
        accept(bundle)
    assert str(path) in str(caught.value)
    assert ("copy the bundle" in str(caught.value)) == name.startswith("bundle")
    assert "no " not in str(caught.value)  # it is there


def test_the_note_of_versions_names_base_adapter_and_version(bundle: Path, tiny_base: Base) -> None:
    manifest = accept(bundle).manifest
    assert json.loads((bundle.parent / "trust.seen.json").read_bytes()) == {
        tiny_base.digest: {"global": {"version": 3, "content": manifest.content}}
    }
    assert [path.name for path in bundle.parent.glob(".*")] == [".bundle.lock"]


def test_a_version_that_cannot_be_noted_is_not_accepted(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_args: object, **_kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "replace", denied)
    with refused(ConfigError, "trust.seen.json") as caught:
        accept(bundle)
    assert "Permission denied" in str(caught.value)
    assert "--trust" in str(caught.value)
    assert not list(bundle.parent.glob(".trust.seen*"))


def test_versions_that_are_noted_at_the_same_time_are_all_kept(bundle: Path) -> None:
    manifest, seen = accept(bundle).manifest, SeenVersions(bundle.parent / "many.seen.json")
    names = [f"adapter-{number}" for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: seen.accept(replace(manifest, name=name)), names))
    (noted,) = json.loads(seen.path.read_bytes()).values()
    assert {name: one["version"] for name, one in noted.items()} == dict.fromkeys(names, 3)


def test_numpy_is_there_before_onnxruntime_which_would_lose_a_ctrl_c_while_importing_it() -> None:
    code = "import sys, client.browser.server; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names = done.stdout.split()
    assert names.index("numpy") < names.index("onnxruntime.capi")
