"""A tab trains a base with slots in its last layers as a native device does, and computes the states of a text once."""

import json
from dataclasses import replace
from typing import Any

import pytest

from edgeadapt.bases.base import Base
from edgeadapt.bases.markedwords import marked
from edgeadapt.formats.bundle import LOWER
from edgeadapt.methods import classifier
from edgeadapt.methods.peft.inputs import AdapterInputs
from export.bundle.write import AdapterSource
from export.features import with_lexical_features, with_marked_words
from export.onnx.classifier import export_classifier
from export.onnx.exported import ExportedBase, Profile
from export.onnx.slotted import with_mean_head
from export.onnx.targets import Slots
from tests.browser.conftest import CONFIG, HEAD
from tests.browser.test_learning import gradients_as_natively
from tests.browser.test_training import PLAIN, contributes_as_natively
from tests.support.models import LABELS, PHRASES, draw
from tests.support.nodetab import OPEN, NodeTab

pytestmark = pytest.mark.slow

TOP = replace(CONFIG, layers_to_transform=(1,))
COMPUTED = f"""(async (texts) => {{ {OPEN}
  const trainer = await GraphTrainer.open(engine, adapter);
  const {{ lower }} = trainer.session;
  const run = lower.run.bind(lower);
  let computed = 0;
  lower.run = (...given) => (computed++, run(...given));
  const values = await trainer.valuesOf(adapter.inputs);
  for (let step = 0; step < 2; step++) await trainer.gradients(values, examples(texts), async () => {{}});
  await trainer.close();
  return computed;
}})"""


@pytest.fixture(scope="module")
def lexical(tiny_base: Base, tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A base whose head reads token ids as well, to know which tokens there are and which are marked."""
    folder = tmp_path_factory.mktemp("lexical")
    return with_lexical_features(with_marked_words(tiny_base, folder / "marked"), 64, folder / "base")


@pytest.fixture(scope="module")
def trainable(lexical: Base) -> ExportedBase:
    slotted = with_mean_head(lexical, Slots(("query", "value"), first=-1))
    exported = export_classifier(slotted, lexical, Profile.FP32, training=True)
    assert LOWER in exported.manifest.files
    return exported


@pytest.fixture(scope="module")
def first(lexical: Base) -> AdapterSource:
    drawn = draw(classifier.build(lexical, len(LABELS), TOP), 0)
    values = {name: value * (HEAD if "classifier" in name else 1) for name, value in drawn.items()}
    inputs = AdapterInputs.of_tensors(TOP, values)
    return AdapterSource("global", values, LABELS, 3, "c" * 64, None, TOP, adapter_inputs=inputs)


def test_gradients_from_states_are_those_of_the_native_device(tab: NodeTab, phone: Any) -> None:
    tab.open(phone)
    words = [word for text in PHRASES for word in marked(text)]
    pairs = [f"{text} and {other}" for text in PHRASES for other in PHRASES]
    gradients_as_natively(tab, phone, [*PHRASES, *pairs, *words])
    texts = [(text, 0, 1.0) for text in (*PHRASES, PHRASES[0])]
    assert tab.evaluate(f"{COMPUTED}({json.dumps(texts)})") == len(PHRASES)


def test_a_tab_contributes_to_a_round_from_states_what_a_native_device_contributes(tab: NodeTab, phone: Any) -> None:
    tab.open(phone)
    contributes_as_natively(tab, phone, replace(PLAIN, peft_config=TOP, batch_size=16))
