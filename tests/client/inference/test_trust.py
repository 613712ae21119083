"""Which keys a device trusts, and that it accepts no rollback; tests/vectors/test_bundle.py has the other rules."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError, DataError, EdgeAdaptError, TrustError
from aggregation.pki.identity import IdentityKey
from client.inference.generate import Generator
from client.inference.session import ClassificationSession
from client.inference.text import MAX_TEXT, SamplingParams
from client.inference.trust import SeenVersions, Trust
from edgeadapt.bases.base import Base
from edgeadapt.formats.bundle import VerifiedAdapter, adapter_path, manifest_path
from edgeadapt.formats.graphinputs import LORA_A, layout_of
from export.bundle.write import write_bundle
from export.onnx.exported import ExportedBase
from tests.support import refused
from tests.support.bundles import flip, resign, resign_file
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


# Whatever is wrong with an adapter or a text costs one line; the session that was running goes on as it was. The
# same list for a classifier's session and for a language model's generator.
TEXT = "turn on the light"
STRANGER = IdentityKey.generate(SystemEntropy())


@dataclass
class Running:
    """Something that answers with the adapter ``global``, and a bundle whose adapter ``bad`` is still to be spoilt."""

    bundle: Path
    key: IdentityKey
    load: Callable[[str], Any]
    ask: Callable[[str, str], Any]  # a text, an adapter

    def answer(self, text: str) -> Any:
        return self.ask(text, "global")

    @property
    def file(self) -> Path:
        return self.bundle / adapter_path("bad")

    @property
    def manifest(self) -> Path:
        return self.bundle / manifest_path("bad")

    def sign(self, key: IdentityKey | None = None, **changes: Any) -> None:
        """Write the manifest again, as someone with a pinned key, or ``key``, could."""
        resign(self.bundle, key or self.key, "bad", **changes)

    def store(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Write and sign a file with other tensors, as someone with a pinned key could."""
        trust = Trust.open(self.bundle)
        inputs = dict(trust.adapter("global", trust.bundle.base()).inputs)
        change(inputs)
        rank = max(value.shape[1] for name, value in inputs.items() if name.endswith(LORA_A))
        layout = layout_of(inputs).digest
        resign_file(self.bundle, self.key, inputs, "bad", format="fp32", layout_digest=layout, rank=rank)


@pytest.fixture(params=["session", "generator"])
def running(request: pytest.FixtureRequest, tmp_path: Path, vendor: IdentityKey) -> Running:
    made = "exported" if request.param == "session" else "lm_exported"
    source = request.getfixturevalue("source" if request.param == "session" else "lm_source")
    write_bundle(tmp_path / "bundle", request.getfixturevalue(made), [source(), source("bad", seed=9)], key=vendor)
    (tmp_path / "trust.pem").write_bytes(vendor.public.to_pem())
    where = tmp_path / "bundle"
    if request.param == "session":
        session = ClassificationSession.open(where)
        return Running(where, vendor, session.load, lambda text, name: session.rank([text], name, 4))
    generator = Generator.open(where, threads=1)
    allowed = SamplingParams(max_tokens=8)
    return Running(where, vendor, generator.load, lambda text, name: list(generator.complete(text, allowed, name)))


def _nan(inputs: dict[str, Any]) -> None:
    name = next(name for name in inputs if "lora_B" in name)
    inputs[name] = np.full_like(inputs[name], np.nan)


def _wide(inputs: dict[str, Any]) -> None:
    """Rank 65, above the limit of every base of the tests."""
    for name, value in list(inputs.items()):
        if "lora_A" in name:
            inputs[name] = np.zeros((value.shape[0], 65), np.float32)
        elif "lora_B" in name:
            inputs[name] = np.zeros((65, value.shape[1]), np.float32)


def _narrow(inputs: dict[str, Any]) -> None:
    name = next(name for name in inputs if "lora_A" in name)
    inputs[name] = inputs[name][:-1]


def _without(inputs: dict[str, Any]) -> None:
    del inputs[next(iter(inputs))]


def _narrowed(running: Running) -> str:
    return next(name for name in slots(running) if "lora_A" in name)


def _b(running: Running) -> str:
    return next(name for name in slots(running) if "lora_B" in name)


def _first(running: Running) -> str:
    return next(iter(slots(running)))


def slots(running: Running) -> list[str]:
    trust = Trust.open(running.bundle)
    return list(trust.adapter("global", trust.bundle.base()).inputs)


About = str | Callable[[Running], str]
SPOILT: dict[str, tuple[Callable[[Running], Any], type[EdgeAdaptError], About]] = {
    "another base": (lambda r: r.sign(base_digest="b" * 64), TrustError, "adapter-manifest.base_digest"),
    "another layout": (lambda r: r.sign(layout_digest="c" * 64), DataError, "adapter-manifest.layout_digest"),
    "another width": (lambda r: r.store(_narrow), DataError, _narrowed),
    "a tensor too few": (lambda r: r.store(_without), DataError, _first),
    "a rank above the limit": (lambda r: r.store(_wide), DataError, "adapter-manifest.rank"),
    "NaN": (lambda r: r.store(_nan), DataError, _b),
    "a flipped byte at the start": (lambda r: flip(r.file, 0), TrustError, "bad.onnx_adapter"),
    "a flipped byte in the middle": (lambda r: flip(r.file, 0.5), TrustError, "bad.onnx_adapter"),
    "a flipped byte at the end": (lambda r: flip(r.file, 1), TrustError, "bad.onnx_adapter"),
    "trailing bytes": (lambda r: r.file.write_bytes(r.file.read_bytes() + b"\0"), TrustError, "bad.onnx_adapter"),
    "a truncated file": (lambda r: r.file.write_bytes(r.file.read_bytes()[:-9]), TrustError, "bad.onnx_adapter"),
    "a file of no bytes": (lambda r: r.file.write_bytes(b""), TrustError, "bad.onnx_adapter"),
    "a missing file": (lambda r: r.file.unlink(), DataError, "bad.onnx_adapter"),
    "a missing manifest": (lambda r: r.manifest.unlink(), DataError, "bad.json"),
    "a manifest of no bytes": (lambda r: r.manifest.write_bytes(b""), TrustError, "envelope"),
    "an unknown signer": (lambda r: r.sign(STRANGER), TrustError, "keyid"),
    "labels that are not the task's": (lambda r: r.sign(labels=tuple("abcde")), DataError, "adapter-manifest.labels"),
    "another adapter's name": (lambda r: r.sign(name="other"), TrustError, "adapter-manifest.name"),
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_bad_adapter_is_refused_in_a_line_and_the_others_go_on(running: Running, what: str) -> None:
    spoil, kind, about = SPOILT[what]
    if not isinstance(about, str):
        about = about(running)
    before = running.answer(TEXT)
    spoil(running)
    for names in ("bad", "bad+global"):
        with refused(kind, about) as caught:
            running.ask(TEXT, names)
        assert len(str(caught.value)) < 400
        assert running.answer(TEXT) == before


def test_a_version_below_one_that_was_accepted_is_refused_and_the_others_go_on(running: Running) -> None:
    running.load("bad")
    before = running.answer(TEXT)
    running.sign(version=1)
    with refused(TrustError, "adapter-manifest.version", value=1):
        running.load("bad:0.5")
    assert running.answer(TEXT) == before


@pytest.mark.parametrize("text", ["", " \n\t", "a" * (MAX_TEXT + 1), "lock \udcff", "lock\0the door"])
def test_a_text_that_is_not_valid_is_refused_in_a_line_and_the_next_is_answered(running: Running, text: str) -> None:
    before = running.answer(TEXT)
    with pytest.raises(DataError) as caught:
        running.answer(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert running.answer(TEXT) == before


def _huge(inputs: dict[str, Any]) -> None:
    for name, value in list(inputs.items()):
        if "lora_" in name:
            inputs[name] = np.full_like(value, 1e30)


def test_an_adapter_whose_numbers_overflow_gives_no_answer_and_the_others_go_on(running: Running) -> None:
    before = running.answer(TEXT)
    running.store(_huge)
    with pytest.raises(DataError):
        running.ask(TEXT, "bad")
    assert running.answer(TEXT) == before


def test_a_sound_adapter_is_accepted_by_the_same_steps(running: Running) -> None:
    before = running.answer(TEXT)
    running.store(lambda inputs: None)
    assert running.load("bad").name == "bad"
    assert running.ask(TEXT, "bad") == before  # its tensors are now those of the shared one
