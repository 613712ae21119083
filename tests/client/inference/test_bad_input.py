"""Whatever is wrong with an adapter or a text costs one line; the session that was running goes on as it was.

The same list for a classifier's session and for a language model's generator.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from adapters.files import sha256
from adapters.manifest import AdapterManifest
from adapters.ondevice import LORA_A, layout_of
from aggregation.entropy import SystemEntropy
from aggregation.errors import DataError, EdgeAdaptError, TrustError
from aggregation.pki.identity import IdentityKey
from client.inference.generate import Generator
from client.inference.session import ClassificationSession
from client.inference.text import MAX_TEXT, SamplingParams
from client.inference.trust import Trust
from export.bundle.write import write_bundle

TEXT = "turn on the light"
STRANGER = IdentityKey.generate(SystemEntropy())


@dataclass
class Running:
    """Something that answers with the adapter ``global``, and a bundle whose adapter ``bad`` is still to be spoilt."""

    bundle: Path
    key: IdentityKey
    use: Callable[[str], Any]
    answer: Callable[[str], Any]
    in_use: Callable[[], Any]

    @property
    def file(self) -> Path:
        return self.bundle / "adapters" / "bad.onnx_adapter"

    @property
    def sidecar(self) -> Path:
        return self.bundle / "adapters" / "bad.json"

    def flip(self, at: float) -> None:
        raw = bytearray(self.file.read_bytes())
        raw[int(at * (len(raw) - 1))] ^= 1
        self.file.write_bytes(raw)

    def sign(self, key: IdentityKey | None = None, **changes: Any) -> None:
        """Write the sidecar anew, as someone with a pinned key, or ``key``, would."""
        stated = AdapterManifest.accept(self.sidecar.read_bytes(), [self.key.public])
        self.sidecar.write_bytes(replace(stated, **changes).sign(key or self.key))

    def store(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Write and sign a file with other tensors, as someone with a pinned key could."""
        trust = Trust.open(self.bundle)
        inputs = dict(trust.adapter(self.bundle, trust.base(self.bundle), "global").inputs)
        change(inputs)
        container = ort.AdapterFormat()
        values = {name: np.ascontiguousarray(inputs[name]) for name in sorted(inputs)}
        container.set_parameters({n: ort.OrtValue.ortvalue_from_numpy(value) for n, value in values.items()})
        container.export_adapter(str(self.file))
        ranks = [value.shape[1] for name, value in values.items() if name.endswith(LORA_A)]
        layout, rank = layout_of(values).digest, max(ranks)
        size = self.file.stat().st_size
        self.sign(format="fp32", sha256=sha256(self.file.read_bytes()), size=size, layout_digest=layout, rank=rank)


@pytest.fixture(params=["session", "generator"])
def running(request: pytest.FixtureRequest, tmp_path: Path, vendor: IdentityKey) -> Running:
    made = "exported" if request.param == "session" else "lm_exported"
    source = request.getfixturevalue("source" if request.param == "session" else "lm_source")
    write_bundle(tmp_path / "bundle", request.getfixturevalue(made), [source(), source("bad", seed=9)], key=vendor)
    (tmp_path / "trust.pem").write_bytes(vendor.public.to_pem())
    where = tmp_path / "bundle"
    if request.param == "session":
        session = ClassificationSession.open(where)
        session.use("global")
        return Running(where, vendor, session.use, lambda t: session.rank([t], 4), lambda: session.adapter)
    generator = Generator.open(where, threads=1)
    generator.use("global")
    allowed = SamplingParams(max_tokens=8)
    return Running(
        where, vendor, generator.use, lambda t: list(generator.complete(t, allowed)), lambda: generator.adapter
    )


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


SPOILT: dict[str, tuple[Callable[[Running], Any], type[EdgeAdaptError], str]] = {
    "another base": (lambda r: r.sign(base_digest="b" * 64), TrustError, "another base"),
    "another layout": (lambda r: r.sign(layout_digest="c" * 64), DataError, "another layout"),
    "another width": (lambda r: r.store(_narrow), DataError, "its slot takes"),
    "a tensor too few": (lambda r: r.store(_without), DataError, "is missing from the adapter"),
    "a rank above the limit": (lambda r: r.store(_wide), DataError, "above the base's limit"),
    "NaN": (lambda r: r.store(_nan), DataError, "NaN or infinity"),
    "a flipped byte at the start": (lambda r: r.flip(0), TrustError, "not the file that was signed"),
    "a flipped byte in the middle": (lambda r: r.flip(0.5), TrustError, "not the file that was signed"),
    "a flipped byte at the end": (lambda r: r.flip(1), TrustError, "not the file that was signed"),
    "trailing bytes": (lambda r: r.file.write_bytes(r.file.read_bytes() + b"\0"), TrustError, "limit of"),
    "a truncated file": (lambda r: r.file.write_bytes(r.file.read_bytes()[:-9]), TrustError, "not the file that"),
    "a file of no bytes": (lambda r: r.file.write_bytes(b""), TrustError, "not the file that was signed"),
    "a missing file": (lambda r: r.file.unlink(), DataError, "is missing"),
    "a missing sidecar": (lambda r: r.sidecar.unlink(), DataError, "no sidecar"),
    "a sidecar of no bytes": (lambda r: r.sidecar.write_bytes(b""), TrustError, "not a signed document"),
    "an unknown signer": (lambda r: r.sign(STRANGER), TrustError, "not a trusted key"),
    "labels that are not the task's": (lambda r: r.sign(labels=("a", "b", "c", "d", "e")), DataError, "labels"),
    "another adapter's name": (lambda r: r.sign(name="other"), TrustError, "signed for the adapter 'other'"),
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_bad_adapter_is_refused_in_a_line_and_the_one_in_use_goes_on(running: Running, what: str) -> None:
    spoil, kind, message = SPOILT[what]
    before, adapter = running.answer(TEXT), running.in_use()
    spoil(running)
    for names in ("bad", "bad+global"):
        with pytest.raises(kind, match=message) as caught:
            running.use(names)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400
        assert running.in_use() is adapter
        assert running.answer(TEXT) == before


def test_a_version_below_one_that_was_accepted_is_refused_and_the_one_in_use_goes_on(running: Running) -> None:
    running.use("bad")
    running.use("global")
    before = running.answer(TEXT)
    running.sign(version=1)
    with pytest.raises(TrustError, match="version 3 was accepted here before"):
        running.use("bad:0.5")
    assert running.answer(TEXT) == before


@pytest.mark.parametrize("text", ["", " \n\t", "a" * (MAX_TEXT + 1), "lock \udcff", "lock\0the door"])
def test_a_text_that_is_none_is_refused_in_a_line_and_the_next_is_answered(running: Running, text: str) -> None:
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


def test_an_adapter_whose_numbers_overflow_gives_no_answer_and_the_one_before_comes_back(running: Running) -> None:
    before = running.answer(TEXT)
    running.store(_huge)
    running.use("bad")
    with pytest.raises(DataError, match="not finite"):
        running.answer(TEXT)
    running.use("global")
    assert running.answer(TEXT) == before


def test_a_sound_adapter_is_accepted_by_the_same_road(running: Running) -> None:
    before = running.answer(TEXT)
    running.store(lambda inputs: None)
    assert running.use("bad").name == "bad"
    assert running.answer(TEXT) == before  # its tensors are now those of the shared one
