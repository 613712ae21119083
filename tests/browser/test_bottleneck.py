"""A tab trains bottleneck adapters as the native device does, in a base with slots that they leave empty."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgeadapt.bases.base import Base
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.methods import classifier
from edgeadapt.methods.parts import Part, part_of
from edgeadapt.methods.peft.inputs import AdapterInputs
from export.bundle.write import AdapterSource
from export.onnx.classifier import export_classifier
from export.onnx.exported import ExportedBase, Profile
from export.onnx.slotted import with_mean_head
from export.onnx.targets import SlotKind, Slots
from tests.browser.test_dora import ROUND_TRIP
from tests.browser.test_learning import GRADIENTS, by_input, native, same
from tests.browser.test_training import EXAMPLES, PLAIN, contributes_as_natively
from tests.support.models import LABELS, draw
from tests.support.nodetab import NodeTab

pytestmark = pytest.mark.slow

CONFIG = PeftConfig("BOTTLENECK", 4, 0, ("output.dense",))
PARTS = (Part.VECTORS, Part.HEAD)


@pytest.fixture(scope="module")
def trainable(tiny_base: Base) -> ExportedBase:
    kinds = frozenset({SlotKind.LOW_RANK, SlotKind.BOTTLENECK, SlotKind.BOTTLENECK_GELU})  # two that are not filled
    slotted = with_mean_head(tiny_base, Slots(("output.dense",), kinds))
    return export_classifier(slotted, tiny_base, Profile.NATIVE_INT8, training=True)


@pytest.fixture(scope="module")
def first(tiny_base: Base) -> AdapterSource:
    drawn = draw(classifier.build(tiny_base, len(LABELS), CONFIG), 0)
    tensors = {
        name: value * np.float32(0.25 if part_of(name) is Part.VECTORS else 2e-3) for name, value in drawn.items()
    }
    inputs = AdapterInputs.of_tensors(CONFIG, tensors)
    return AdapterSource("global", tensors, LABELS, 3, "c" * 64, None, CONFIG, adapter_inputs=inputs)


def test_gradients_and_values_are_those_of_the_native_device(tab: NodeTab, phone: Path) -> None:
    trainer, start = native(phone)
    shares = [1 / (2 + number) for number in range(len(EXAMPLES))]
    loss, gradients = trainer.engine.gradients(start, trainer.weighted(EXAMPLES, shares))
    of_bottlenecks = [value for name, value in gradients.items() if part_of(name) is Part.VECTORS]
    assert len(of_bottlenecks) == 4 * 2 * 2  # parts, layers, and blocks of each
    assert min(float(np.abs(value).max()) for value in of_bottlenecks) > 1e-5
    tab.open(phone)
    given = [(one.text, one.label, share) for one, share in zip(EXAMPLES, shares, strict=True)]
    found = tab.evaluate(f"{GRADIENTS}({json.dumps(given)})")
    assert found["loss"] == pytest.approx(loss, abs=1e-5)
    largest = max(float(np.abs(value).max()) for value in gradients.values())
    same(found["gradients"], by_input(trainer, gradients), 1e-5 * largest)
    for values in tab.evaluate(ROUND_TRIP):
        same(values, by_input(trainer, start), 1e-5)


def test_a_tab_contributes_to_a_round_what_a_native_device_contributes_or_nothing(tab: NodeTab, phone: Path) -> None:
    tab.open(phone)
    task = replace(PLAIN, peft_config=CONFIG, batch_size=16, trained=PARTS, shared=PARTS)
    contributes_as_natively(tab, phone, task)
