"""A base with slots in its last layers: whatever adapters answer a text, the layers below them read it once."""

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from aggregation.errors import DataError, TrustError
from aggregation.pki.identity import IdentityKey
from client.cli import device
from client.inference.session import ClassificationSession
from edgeadapt.bases.base import Base
from edgeadapt.bases.states import LowerLayers
from edgeadapt.formats.bundle import BASE_MANIFEST, LOWER, TRUST, UPPER
from edgeadapt.formats.files import sha256
from edgeadapt.formats.layout import Floats
from edgeadapt.formats.manifest import BaseManifest
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.methods import classifier
from edgeadapt.methods.peft.inputs import AdapterInputs
from export.bundle.write import AdapterSource, write_bundle
from export.onnx.classifier import export_classifier
from export.onnx.exported import ExportedBase, Profile
from export.onnx.slotted import with_mean_head
from export.onnx.targets import Slots
from tests.support import refused
from tests.support.bundles import flip, resign_base
from tests.support.models import LABELS, PHRASES, draw

NAMES = ("global", "anna", "ben")
CONFIG = replace(PeftConfig.lora(4, 8), layers_to_transform=(1,))
ROWS = [(text, name) for text in PHRASES for name in (*NAMES, "anna:0.5+ben")]


@pytest.fixture(scope="module", params=[Profile.FP32, Profile.NATIVE_INT8])
def cut(request: pytest.FixtureRequest, tiny_base: Base) -> ExportedBase:
    slotted = with_mean_head(tiny_base, Slots(("query", "value"), first=-1))
    return export_classifier(slotted, tiny_base, request.param)


@pytest.fixture
def write(cut: ExportedBase, tiny_base: Base, vendor: IdentityKey, tmp_path: Path) -> Callable[[Sequence[str]], Path]:
    """Writes a bundle with three adapters, whose base lacks some files."""
    model = classifier.build(tiny_base, len(LABELS), CONFIG)
    values = {name: draw(model, seed) for seed, name in enumerate(NAMES)}
    sources = [
        AdapterSource(
            name, own, LABELS, 1, "c" * 64, None, CONFIG, adapter_inputs=AdapterInputs.of_tensors(CONFIG, own)
        )
        for name, own in values.items()
    ]

    def make(without: Sequence[str] = ()) -> Path:
        folder = tmp_path / f"without-{len(without)}"
        files = {name: sha for name, sha in cut.manifest.files.items() if name not in without}
        base = replace(cut, manifest=replace(cut.manifest, files=files))
        write_bundle(folder / "bundle", base, sources, key=vendor)
        (folder / TRUST).write_bytes(vendor.public.to_pem())
        return folder / "bundle"

    return make


@pytest.fixture
def read_texts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of the texts that the lower layers read."""
    lengths: list[int] = []
    computed = LowerLayers.computed

    def counted(self: LowerLayers, texts: Sequence[Sequence[int]]) -> list[Floats]:
        lengths.extend(map(len, texts))
        return computed(self, texts)

    monkeypatch.setattr(LowerLayers, "computed", counted)
    return lengths


def test_answers_are_those_of_the_whole_graph_and_each_text_is_read_once(
    write: Callable[..., Path], read_texts: list[int]
) -> None:
    whole, session = (ClassificationSession.open(bundle) for bundle in (write((UPPER,)), write()))
    expected = [whole.rank([text], name, 4)[0] for text, name in ROWS]
    assert read_texts == []
    assert [session.rank([text], name, 4)[0] for text, name in ROWS] == expected
    assert len(read_texts) == len(PHRASES)
    together = session.rank_mixed(ROWS, 4)
    for ranking, alone in zip(together, expected, strict=True):
        assert [one.probability for one in ranking] == pytest.approx([one.probability for one in alone], abs=1e-6)
    assert len(read_texts) == len(PHRASES)
    assert ClassificationSession.open(session.library.bundle).rank_mixed(ROWS, 4) == together
    assert len(read_texts) == 2 * len(PHRASES)  # of a new session, in one batch


def test_the_command_reads_a_text_once_for_all_adapters(write: Callable[..., Path], read_texts: list[int]) -> None:
    bundle = write()
    named = [word for name in NAMES for word in ("--adapter", name)]
    command = ["infer", "--bundle", str(bundle), *named, "--json", *PHRASES, " "]
    result = CliRunner().invoke(device, command, catch_exceptions=False)
    assert len(read_texts) == len(PHRASES)
    session = ClassificationSession.open(bundle)
    for found in json.loads(result.stdout)["adapters"]:
        answers = session.classify(PHRASES, found["adapter"])
        assert [one["intents"][0]["intent"] for one in found["answers"][:-1]] == [one.label for one in answers]
        assert found["answers"][-1]["intents"] == []
    assert [found["adapter"] for found in json.loads(result.stdout)["adapters"]] == list(NAMES)


def test_threads_that_ask_for_the_same_and_other_texts_get_their_own_answers(write: Callable[..., Path]) -> None:
    session = ClassificationSession.open(write())
    expected = [session.rank([text], name, 4) for text, name in ROWS]
    shared = ClassificationSession.open(session.library.bundle)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda row: shared.rank([row[0]], row[1], 4), ROWS * 3))
    assert answers == expected * 3


@pytest.mark.parametrize("name", [LOWER, UPPER])
def test_a_part_that_was_changed_is_refused(write: Callable[..., Path], name: str) -> None:
    bundle = write()
    flip(bundle / "base" / name, 0.5)
    with refused(TrustError, name):
        ClassificationSession.open(bundle)


def test_an_upper_part_without_the_lower_one_is_refused(write: Callable[..., Path]) -> None:
    with refused(TrustError, LOWER):
        ClassificationSession.open(write((LOWER,)))


@pytest.mark.parametrize("content", [b"", b"\x00" * 64, b"\x3a\x05upper"], ids=["empty", "zeros", "truncated"])
def test_a_signed_part_that_is_no_graph_is_refused(
    write: Callable[..., Path], vendor: IdentityKey, content: bytes
) -> None:
    bundle = write()
    (bundle / "base" / UPPER).write_bytes(content)
    files = BaseManifest.unverified((bundle / BASE_MANIFEST).read_bytes()).files
    resign_base(bundle, vendor, files=files | {UPPER: sha256(content)})
    with refused(DataError, "model.onnx"):
        ClassificationSession.open(bundle)
