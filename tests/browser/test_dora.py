"""A tab trains an adapter of DoRA as the native device does: by its magnitudes too, and with the same norms."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from aggregation.pki.identity import IdentityKey
from client.inference.library import Library
from client.inference.session import ClassificationSession
from client.learning import Correction, Learner
from client.learning.learner import LANGUAGE_RATE
from client.training import graphengine
from client.training.examples import Example
from edgeadapt.bases.base import Base
from edgeadapt.formats import storage
from edgeadapt.formats.bundle import BASE, TRAINING
from edgeadapt.formats.graphinputs import OFFSET, OUTPUT_SCALE
from edgeadapt.formats.layout import Tensors
from edgeadapt.formats.manifest import Task as BundleTask
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.methods import causal, classifier
from edgeadapt.methods.parts import Part, part_of
from edgeadapt.methods.peft.inputs import AdapterInputs
from export.bundle.base import resolved
from export.bundle.sources import Origin
from export.bundle.write import AdapterSource, write_bundle
from export.causal import export_causal
from export.onnx.classifier import export_classifier
from export.onnx.exported import ExportedBase, Profile
from export.onnx.slotted import with_mean_head
from export.onnx.targets import SlotKind, Slots
from tests.browser.test_language_learning import TUNED as TUNED_LANGUAGE
from tests.browser.test_language_learning import contributes_as_natively as texts_contribute_as_natively
from tests.browser.test_language_learning import given as corrections
from tests.browser.test_learning import GRADIENTS, TAUGHT, by_input, native, other, probed_at_values, refused, same
from tests.browser.test_training import EXAMPLES, PLAIN, contributes_as_natively, contributes_moments_as_natively
from tests.support.bundles import resign_base
from tests.support.models import LABELS, PHRASES, draw, with_biases
from tests.support.nodetab import OPEN, NodeTab

pytestmark = pytest.mark.slow

DORA = replace(PeftConfig.lora(rank=4, alpha=8), use_dora=True)
LANGUAGE = replace(DORA, target_modules=("q_proj", "v_proj"), layers_to_transform=(1,))
KINDS = frozenset({SlotKind.LOW_RANK, SlotKind.SCALE, SlotKind.OFFSET})
PARTS = (Part.A, Part.B, Part.VECTORS, Part.HEAD)
ROUND_TRIP = f"""(async () => {{ {OPEN}
  const trainer = await GraphTrainer.open(engine, adapter);
  const values = await trainer.valuesOf(adapter.inputs);
  return [all(values), all(await trainer.valuesOf(await trainer.inputsOf(values)))];
}})()"""
OUTPUTS = f"""(async () => {{ {OPEN}
  const {{ LanguageGraphTrainer }} = await load("learning/languagegraph");
  const trainer = await LanguageGraphTrainer.open(engine, adapter);
  const summed = trainer.summed.bind(trainer);
  let kept;
  trainer.summed = async (...given) => (kept = await summed(...given));
  await trainer.gradients(await trainer.valuesOf(adapter.inputs), trainer.probes(), async () => {{}});
  return Object.keys(kept.outputs[0]).sort();
}})()"""  # what is kept of each run of the graph
WITHOUT_SLOT = f"""(async (slot) => {{ {OPEN}
  delete engine.base.slots[slot];
  await GraphTrainer.open(engine, adapter);
}})"""
WITHOUT_NORM = f"""(async () => {{ {OPEN}
  const trainer = await GraphTrainer.open(engine, adapter);
  const values = await trainer.valuesOf(adapter.inputs);
  for (const [name, each] of values) if (name.includes("lora_A")) each.fill(NaN);
  await trainer.inputsOf(values);
}})()"""


def source(base: Base, config: PeftConfig, task: BundleTask, drawn: Tensors, labels: tuple[str, ...]) -> AdapterSource:
    """A global adapter with magnitudes around 1."""
    values = {
        name: value + np.float32(part_of(name) is Part.VECTORS)
        if "classifier" not in name
        else value * np.float32(2e-3)
        for name, value in drawn.items()
    }
    origin = Origin(config, labels, 3, "c" * 64, base.digest, None, task, values)
    tensors = resolved(origin, base).tensors
    inputs = AdapterInputs.of_tensors(config, tensors)
    return AdapterSource("global", tensors, labels, 3, "c" * 64, None, config, adapter_inputs=inputs)


@pytest.fixture(scope="module")
def biased(tiny_base: Base, tmp_path_factory: pytest.TempPathFactory) -> Base:
    return with_biases(tiny_base, tmp_path_factory.mktemp("biased"))


@pytest.fixture(scope="module")
def trainable(biased: Base) -> ExportedBase:
    slotted = with_mean_head(biased, Slots(("query", "value"), KINDS))
    return export_classifier(slotted, biased, Profile.NATIVE_INT8, training=True)


@pytest.fixture(scope="module")
def first(biased: Base) -> AdapterSource:
    drawn = draw(classifier.build(biased, len(LABELS), DORA), 0)
    return source(biased, DORA, "text-classification", drawn, LABELS)


@pytest.fixture(scope="module")
def talking(lm_base: Base) -> tuple[ExportedBase, AdapterSource]:
    """With more slots than the adapter has, all in the last layer, so that it trains from states."""
    slots = Slots((*LANGUAGE.target_modules, "o_proj"), KINDS, first=-1)
    exported = export_causal(lm_base, slots, Profile.FP32, training=True)
    rng = np.random.default_rng(1)
    tensors = causal.tensors(causal.build(lm_base, LANGUAGE))
    drawn = {name: (0.1 * rng.standard_normal(value.shape)).astype(np.float32) for name, value in tensors.items()}
    return exported, source(lm_base, LANGUAGE, "text-generation", drawn, ())


def test_gradients_and_values_are_those_of_the_native_device(tab: NodeTab, phone: Path) -> None:
    """Of magnitudes too, over layers with biases; values that are put into slots are read from them again."""
    trainer, start = native(phone)
    shares = [1 / (2 + number) for number in range(len(EXAMPLES))]
    loss, gradients = trainer.engine.gradients(start, trainer.weighted(EXAMPLES, shares))
    by_magnitude = [value for name, value in gradients.items() if part_of(name) is Part.VECTORS]
    assert len(by_magnitude) == 4
    assert min(float(np.abs(value).max()) for value in by_magnitude) > 1e-5
    tab.open(phone)
    given = [(one.text, one.label, share) for one, share in zip(EXAMPLES, shares, strict=True)]
    found = tab.evaluate(f"{GRADIENTS}({json.dumps(given)})")
    assert found["loss"] == pytest.approx(loss, abs=1e-5)
    largest = max(float(np.abs(value).max()) for value in gradients.values())
    same(found["gradients"], by_input(trainer, gradients), 1e-5 * largest)
    for values in tab.evaluate(ROUND_TRIP):
        same(values, by_input(trainer, start), 1e-5)


def test_a_probe_is_of_the_values_that_a_lesson_begins_with(tab: NodeTab, phone: Path) -> None:
    tab.open(phone)
    probed_at_values(tab)


def test_a_lesson_gives_the_adapter_and_the_answers_of_the_native_device(tab: NodeTab, phone: Path) -> None:
    label = other(phone)
    tab.open(phone)
    given = json.dumps([(PHRASES[0], label, "global")])
    answers = [tab.evaluate(f"{TAUGHT}({given if text == PHRASES[0] else []}, {text!r})") for text in PHRASES]
    with Learner.open(phone) as learner:
        before = learner.adapter.inputs
        learner.teach([Correction(PHRASES[0], label)])
    with Learner.open(phone) as learner:
        scales = {name: value for name, value in learner.adapter.inputs.items() if name.endswith(OUTPUT_SCALE)}
    assert all(np.abs(value - before[name]).max() > 1e-4 for name, value in scales.items())
    session = ClassificationSession.open(phone)
    for text, labels in zip(PHRASES, answers, strict=True):
        expected = session.rank([text], "personal", len(LABELS))[0]
        shown = [(one["label"], one["probability"]) for one in labels]
        assert shown == [(one.label, pytest.approx(one.probability, abs=0.03)) for one in expected]


def test_a_tab_contributes_to_a_round_what_a_native_device_contributes_or_nothing(tab: NodeTab, phone: Path) -> None:
    tab.open(phone)
    task = replace(PLAIN, peft_config=DORA, batch_size=16, trained=PARTS, shared=PARTS)
    contributes_as_natively(tab, phone, task)


def test_a_tab_contributes_the_moments_of_a_native_device_to_an_analytic_head(
    tab: NodeTab, biased: Base, first: AdapterSource, vendor: IdentityKey, tmp_path: Path
) -> None:
    """In float: rounded weights of the two runtimes give embeddings that differ by more than float32."""
    slotted = with_mean_head(biased, Slots(("query", "value"), KINDS))
    exported = export_classifier(slotted, biased, Profile.FP32, training=True)
    write_bundle(tmp_path / "bundle", exported, [first], key=vendor, form="fp32")
    (tmp_path / "trust.pem").write_bytes(vendor.public.to_pem())
    tab.open(tmp_path / "bundle")
    contributes_moments_as_natively(tab, tmp_path / "bundle")


def test_a_language_model_is_corrected_and_trained_as_natively(
    tab: NodeTab, talking: tuple[ExportedBase, AdapterSource], vendor: IdentityKey, tmp_path: Path
) -> None:
    exported, adapter = talking
    write_bundle(tmp_path / "bundle", exported, [adapter], key=vendor, form="fp32")
    (tmp_path / "trust.pem").write_bytes(vendor.public.to_pem())
    library = Library.open(tmp_path / "bundle", None)
    trainer = graphengine.language(library.base, LANGUAGE)
    start = trainer.engine.tensors_of(library.trust.adapter("global", library.base).inputs)
    taught = [Example("yes", prompt="is it?")]

    steps = list[int]()
    expected = trainer.teach(start, taught, [], LANGUAGE_RATE, lambda: steps.append(1))
    tab.open(tmp_path / "bundle")
    found = tab.evaluate(f"{TUNED_LANGUAGE}({corrections(('is it?', 'yes'), earlier=[])})")
    assert found["steps"] == len(steps)
    assert len(steps) > 1
    magnitudes = [name for name in start if part_of(name) is Part.VECTORS]
    assert all(np.abs(expected[name] - start[name]).max() > 1e-3 for name in magnitudes)
    same(found["values"], by_input(trainer, expected), 1e-4)
    assert tab.evaluate(OUTPUTS) == ["hits", "log_likelihood"]
    texts_contribute_as_natively(tab, trainer, start, (Part.A, Part.B, Part.VECTORS))


def test_a_base_that_was_not_made_for_dora_and_weights_without_a_norm_get_one_line(
    tab: NodeTab, phone: Path, trainable: ExportedBase, vendor: IdentityKey
) -> None:
    tab.open(phone)
    for ending in (OUTPUT_SCALE, OFFSET):
        slot = next(name for name in sorted(trainable.manifest.slots) if name.endswith(ending))
        failed = tab.error(f"{WITHOUT_SLOT}({json.dumps(slot)})")
        assert (failed["name"], failed["about"]) == ("ConfigError", slot)
        assert "export it with --slots low-rank,scale,offset" in failed["message"]
    failed = tab.error(WITHOUT_NORM)
    assert (failed["name"], failed["about"]) == ("DataError", "encoder.encoder.layer.0.attention.self.query")
    graph = phone / BASE / TRAINING
    model = onnx.load_from_string(graph.read_bytes())
    model.graph.output.remove(next(each for each in model.graph.output if each.name.endswith(".weight_norm")))
    graph.write_bytes(model.SerializeToString())
    resign_base(phone, vendor, files=trainable.manifest.files | {TRAINING: storage.file_sha256(graph)})
    tab.open(phone)
    assert "has no norm of" in refused(tab, label=other(phone))
    assert tab.evaluate("engine.adapterNames()") == ["global"]
