"""The page reads pictures as the native device does: pixels, answers and lessons, from a file or the camera."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregation.entropy import SystemEntropy
from aggregation.pki.identity import IdentityKey
from client.inference.session import ClassificationSession
from client.learning import Correction, Learner
from client.training.torchengine import classifier, model_of
from edgeadapt.bases.base import Base
from edgeadapt.bases.pictures import PictureReader, picture
from edgeadapt.formats.bundle import PHRASES
from edgeadapt.formats.phrases import encode_phrases
from edgeadapt.methods.classifier import seed_adapter
from edgeadapt.methods.trainable import configuration
from export.bundle.write import AdapterSource, write_bundle
from export.onnx.classifier import export_classifier
from export.onnx.exported import Profile
from export.onnx.slotted import with_mean_head
from export.onnx.targets import Slots
from tests.browser.conftest import IN_BROWSER, Serve
from tests.browser.test_page import shown
from tests.support.pictures import LABELS, SIDE, file_of, make_base, stripe_pictures

READ = """(async ([settings, pictures]) => {
  const { readerOf } = await load('text');
  const reader = readerOf(new TextEncoder().encode(settings));
  const found = [];
  for (const picture of pictures) {
    try {
      await reader.prepare([picture]);
      found.push([...reader.phrase(picture)]);
    } catch (error) {
      found.push(`${error.name} ${error.about}: ${error.message}`);
    }
  }
  return found;
})"""
RNG = np.random.default_rng(3)
SHAPES = ((SIDE, SIDE, 3), (5, 9, 3), (40, 23), (64, 64, 3), (1, 1, 3), (20, 200, 3))


def bundle_of(folder: Path, base: Base, public: list[tuple[str, int]]) -> Path:
    """Make a bundle with a training graph and an adapter ``global`` of two labels."""
    import torch

    config = configuration(base, rank=2, layers=1)
    trainer = classifier(base, len(LABELS), config)
    values = seed_adapter(model_of(trainer), trainer.tokenizer, public, 2, torch.Generator().manual_seed(0))
    slots = Slots(config.target_modules, first=min(config.layers_to_transform))
    made = export_classifier(with_mean_head(base, slots), base, Profile.FP32, training=True)
    key = IdentityKey.generate(SystemEntropy())
    source = AdapterSource("global", values, LABELS, 1, "c" * 64, None, config)
    known = made.with_file(PHRASES, encode_phrases([(LABELS[label], text) for text, label in public]))
    write_bundle(folder / "bundle", known, [source], key=key, form="fp32")
    (folder / "trust.pem").write_bytes(key.public.to_pem())
    return folder / "bundle"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stripes")
    return bundle_of(folder, make_base(folder / "model", "vit"), stripe_pictures(12, 7))


def texts(values: list[bytes]) -> list[str]:
    return [picture(value) for value in values]


@pytest.mark.parametrize("reader", [PictureReader(SIDE, SIDE, 3), PictureReader(20, 12, 3), PictureReader(24, 24, 1)])
def test_pixels_are_those_of_pillow(page: Any, serve: Serve, bundle: Path, reader: PictureReader) -> None:
    asked = texts([file_of(RNG.integers(0, 256, shape)) for shape in SHAPES])
    asked += [f"{asked[0]}#{number}" for number in (1, 2, 16)]
    page.goto(serve(bundle))
    page.evaluate(IN_BROWSER)
    found = page.evaluate(f"{READ}({json.dumps([reader.to_str(), asked])})")
    for ids, text in zip(found, asked, strict=True):
        assert ids == reader.encode(text).ids.tolist()


def test_a_jpeg_has_nearly_the_pixels_of_pillow(page: Any, serve: Serve, bundle: Path) -> None:
    smooth = np.add.outer(np.arange(90), np.arange(120))[..., None] + np.array([0, 20, 40])
    asked, reader = picture(file_of(smooth)), PictureReader(SIDE, SIDE, 3)
    assert "jpeg" in asked[:20]
    page.goto(serve(bundle))
    page.evaluate(IN_BROWSER)
    (found,) = page.evaluate(f"{READ}({json.dumps([reader.to_str(), [asked]])})")
    assert np.abs(np.array(found) - reader.encode(asked).ids).max() <= 2


def test_what_is_no_picture_is_refused_as_natively(page: Any, serve: Serve, bundle: Path) -> None:
    odd = ["turn on the light", "data:image/png;base64,AAAA", "data:image/png;base64,?", "data:image/gif;base64,R0lGOD"]
    odd += ["data:image/png;base64," + "A" * 2**18, "data:text/html;base64,AAAA"]
    page.goto(serve(bundle))
    page.evaluate(IN_BROWSER)
    found = page.evaluate(f"{READ}({json.dumps([PictureReader(8, 8, 3).to_str(), odd])})")
    assert all(one.startswith("DataError picture: ") for one in found)
    assert "above the limit" in found[4]


def answers(bundle: Path, text: str, adapter: str = "global") -> list[tuple[str, Any]]:
    session = ClassificationSession.open(bundle)
    return [(one.label, pytest.approx(one.probability, abs=1e-4)) for one in session.rank([text], adapter, 5)[0]]


def assert_taught_alike(page: Any, bundle: Path, text: str) -> None:
    """The page answers and learns as the native device does, and shows no content of a file."""
    before = answers(bundle, text)
    assert shown(page) == before
    wrong = before[-1][0]
    page.evaluate(f"document.getElementById('teach-label').value = {wrong!r}")
    page.evaluate("document.getElementById('teach-form').requestSubmit()")
    page.until("/learned/.test(document.getElementById('teach-result').textContent)")
    assert "1 of 1 learned" in page.evaluate("document.getElementById('teach-result').textContent")
    assert "base64" not in page.evaluate("document.body.innerText")
    with Learner.open(bundle) as learner:
        learner.teach([Correction(text, wrong)])
    page.until(f"document.querySelector('#answers th').textContent === {wrong!r}")
    assert [label for label, _ in shown(page)] == [label for label, _ in answers(bundle, text, "personal")]
    assert page.errors() == []


def test_a_chosen_file_is_answered_as_natively_and_teaches_the_same(
    page: Any, serve: Serve, bundle: Path, tmp_path: Path
) -> None:
    shutil.copytree(bundle.parent, tmp_path / "own")
    own, file = tmp_path / "own" / "bundle", tmp_path / "a.png"
    file.write_bytes(file_of(np.full((SIDE, SIDE, 3), (250, 20, 20))))
    page.goto(serve(own))
    assert page.state() == "good"
    assert page.evaluate("document.getElementById('said').hidden")
    page.pick("#picture-file", file)
    page.until("document.getElementById('answer-caption').textContent.startsWith('A picture with global')")
    assert_taught_alike(page, own, picture(file.read_bytes()))


def test_the_camera_is_asked_what_it_sees(page: Any, serve: Serve, bundle: Path) -> None:
    page.goto(serve(bundle))
    page.evaluate("document.getElementById('camera').click()")
    page.until("!document.getElementById('shoot').disabled")
    page.until("document.getElementById('viewfinder').videoWidth > 0")
    page.evaluate("document.getElementById('shoot').click()")
    page.until("document.getElementById('answer-caption').textContent.startsWith('A picture with global')")
    text = page.evaluate("document.getElementById('phrase').value")
    assert text.startswith("data:image/jpeg;base64,")
    assert [label for label, _ in shown(page)] == [label for label, _ in answers(bundle, text)]
    page.evaluate("document.getElementById('camera').click()")
    assert page.evaluate("document.getElementById('viewfinder').srcObject === null")


def test_a_camera_that_is_refused_is_one_line(page: Any, serve: Serve, bundle: Path) -> None:
    page.goto(serve(bundle))
    page.evaluate("navigator.mediaDevices.getUserMedia = async () => { throw new Error('NotAllowedError') }")
    page.evaluate("document.getElementById('camera').click()")
    page.until("document.getElementById('phrase-error').textContent !== ''")
    assert "allow it for this page, or choose a file" in page.alert("phrase-error")


def test_a_file_that_is_no_picture_is_one_line(page: Any, serve: Serve, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no picture")
    page.goto(serve(bundle))
    page.pick("#picture-file", tmp_path / "a.png")
    page.until("document.getElementById('phrase-error').textContent !== ''")
    assert "choose a PNG, JPEG or WebP" in page.alert("phrase-error")
