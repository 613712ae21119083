"""``edgeadapt.load`` gives a model that answers, learns, takes back, and says in one line what is wrong."""

import json
import pkgutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

import edgeadapt
from aggregation.entropy import SystemEntropy
from aggregation.pki.identity import IdentityKey
from client.inference.session import ClassificationSession
from client.training.examples import Example, Split, write_examples
from edgeadapt.formats.bundle import adapter_names
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.releases.repository import ChannelRepository
from export.bundle.write import AdapterSource, write_bundle
from export.onnx.exported import ExportedBase
from tests.support import refused
from tests.support.models import LABELS, draw

PHRASE = "turn on the kitchen lights"


@pytest.fixture
def phone(tmp_path: Path, model: Any, trainable: ExportedBase, vendor: IdentityKey) -> Path:
    """A bundle that can learn, with a global adapter and the keys that it is trusted by."""
    values = {name: value * (0.02 if "classifier" in name else 1) for name, value in draw(model, 0).items()}
    adapter = AdapterSource("global", values, LABELS, 3, "c" * 64, None, PeftConfig.lora(rank=4, alpha=8))
    write_bundle(tmp_path / "bundle", trainable, [adapter], key=vendor)
    (tmp_path / "trust.pem").write_bytes(vendor.public.to_pem())
    return tmp_path / "bundle"


def test_the_names_are_listed_and_loaded_one_by_one() -> None:
    program = "import edgeadapt, json, sys; print(json.dumps([dir(edgeadapt), sorted(sys.modules)]))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    names, modules = json.loads(done.stdout)
    assert names == edgeadapt.__all__
    assert not {"numpy", "onnxruntime", "torch", "flwr", "click"} & set(modules)
    assert all(getattr(edgeadapt, name) for name in names)
    assert not hasattr(edgeadapt, "lode")
    modules = {module.name for module in pkgutil.iter_modules(edgeadapt.__path__)}
    assert not modules & set(names)  # the import of a module would replace the name


def test_what_the_bare_install_lacks_is_named_with_the_extra() -> None:
    program = "import sys; sys.modules['torch'] = None; import edgeadapt; edgeadapt.simulate"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert "edgeadapt.simulate needs torch" in last
    assert "edgeadapt[simulations]" in last


def test_a_classifier_answers_a_text_or_several(phone: Path) -> None:
    model = edgeadapt.load(str(phone))
    assert isinstance(model, edgeadapt.Classifier)
    best = ClassificationSession.open(phone).rank([PHRASE], "global", 3)[0]
    assert model.top(PHRASE, 3) == [(one.label, one.probability, "global", 0.0) for one in best]
    assert model(PHRASE) == model([PHRASE, "play music"])[0] == model.top(PHRASE, 1)[0]
    assert (model.labels, model.adapter, model.adapters, model.version) == (LABELS, "global", ["global"], 3)
    assert repr(model) == f"<Classifier {str(phone)!r}, adapter global>"


def test_a_lesson_is_answered_at_once_more_than_once_and_taken_back(phone: Path) -> None:
    model = edgeadapt.load(phone)
    assert isinstance(model, edgeadapt.Classifier)
    before = model(PHRASE)
    other = next(label for label in LABELS if label != before.label)
    for label in (other, before.label, other):
        assert label is not None
        model.teach(PHRASE, label)
        assert (model(PHRASE).label, model.adapter) == (label, "personal")
    for _ in range(3):
        model.undo()
    assert model(PHRASE) == before
    assert adapter_names(phone) == ["global"]


def test_a_model_of_one_adapter_answers_with_what_it_learned(phone: Path) -> None:
    model = edgeadapt.load(phone, adapter="global")
    assert isinstance(model, edgeadapt.Classifier)
    label = next(label for label in LABELS if label != model(PHRASE).label)
    model.teach(PHRASE, label)
    assert (model(PHRASE).label, model.adapter) == (label, "personal")
    assert model.using("global")(PHRASE).label != label
    model.undo()
    assert model.adapter == "global"


def test_a_devices_examples_make_a_private_adapter_that_answers_and_is_taken_back(phone: Path, tmp_path: Path) -> None:
    model = edgeadapt.load(phone)
    assert isinstance(model, edgeadapt.Classifier)
    before, texts = model(PHRASE), ("play music", "set a timer", "lock the door", PHRASE)
    taught = [Example(text, 1, split) for text in texts for split in (Split.TRAIN, Split.VALIDATION)]
    write_examples(tmp_path / "examples.jsonl", taught)
    outcome = model.personalize(str(tmp_path / "examples.jsonl"), epochs=8, learning_rate=0.01)
    assert (outcome.made, outcome.trained, outcome.held_out, model.adapter) == (True, 4, 4, "personal")
    assert [model(text).label for text in texts] == [LABELS[1]] * 4
    model.undo()
    assert model(PHRASE) == before


def test_a_model_answers_with_the_release_that_it_updated_to_also_on_another_base(
    tmp_path: Path, phone: Path, exported: ExportedBase, source: Any, vendor: IdentityKey
) -> None:
    repository = ChannelRepository.create(tmp_path / "releases", SystemEntropy(), datetime.now(UTC))
    write_bundle(tmp_path / "made", exported, [source("global", seed=4, version=4)], key=vendor)
    repository.publish("canary", tmp_path / "made", [vendor.public])
    (tmp_path / "root.json").write_bytes(repository.root())
    model = edgeadapt.load(phone)
    assert isinstance(model, edgeadapt.Classifier)
    before = model(PHRASE)
    assert model.update(str(repository.folder / "public"), "canary", tmp_path / "root.json").changed
    assert model(PHRASE) == edgeadapt.load(phone)(PHRASE) != before
    assert not model.update().changed


def test_what_is_no_text_or_unknown_is_said(phone: Path) -> None:
    model = edgeadapt.load(phone)
    assert isinstance(model, edgeadapt.Classifier)
    assert str(model("🎉")) == "unknown text"
    with refused(edgeadapt.DataError, "text"):
        model(" ")
    with refused(edgeadapt.DataError, "text"):
        model([7])  # type: ignore[list-item]
    with refused(edgeadapt.DataError, "corrections"):
        model.teach_all("lights")  # type: ignore[arg-type]
    with refused(edgeadapt.DataError, "nothing.json"):
        edgeadapt.load(phone, adapter="nothing")
    with refused(edgeadapt.ConfigError, "repository"):
        model.update("https://updates.example")
    with refused(edgeadapt.DataError, "bundle"):
        edgeadapt.load(phone / "missing")
    with refused(edgeadapt.TrustError, "trust.pem") as caught:
        edgeadapt.load(phone, trust=phone.parent / "keys.pem")
    assert "or name it with trust=" in str(caught.value)


def test_one_string_where_texts_are_expected_is_refused(bundle: Path) -> None:
    with refused(edgeadapt.DataError, "texts"):
        ClassificationSession.open(str(bundle)).classify("lights", "global")


def test_a_language_model_continues_chats_and_answers_with_another_adapter(lm_bundle: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    model = edgeadapt.load(lm_bundle)
    assert isinstance(model, edgeadapt.LanguageModel)
    text = model("abab", max_tokens=8)
    assert text == "".join(model.stream("abab", max_tokens=8)) == model.using(model.adapter)("abab", max_tokens=8)
