"""Parity of a classifier with torch: what it measures, and what the gate lets through."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import PeftModel

from aggregation.errors import ConfigError, DataError
from edgeadapt.bases.base import Base
from edgeadapt.formats.layout import Tensors
from edgeadapt.formats.manifest import PrivacyBound, Task
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.methods import causal
from edgeadapt.methods.classifier import tensors
from export.bundle import adapter
from export.causal import export_causal
from export.onnx.exported import ExportedBase, Profile
from export.parity.compare import LIMITS, Limits, OnnxRunner, Parity, ParityError, compare, gate, limits_of
from tests.support import refused
from tests.support.models import adapter_inputs

PHRASES = ("turn on the kitchen lights", "lock the door", "play music", "set a timer", "is the door open", "unlock")


def test_an_int8_export_gives_nearly_torchs_answers(model: PeftModel, exported_int8: ExportedBase) -> None:
    inputs = adapter.decode(adapter.encode(tensors(model), exported_int8.adapter_inputs, "int8"), "int8")
    found = compare(model, OnnxRunner.open(exported_int8.folder, exported_int8.manifest), inputs, PHRASES)
    assert found.agreement == 1
    assert 1e-5 < found.max_abs_diff < 0.2


def test_an_fp32_export_gives_torchs_answers_and_an_adapter_with_the_wrong_scaling_shows_in_the_difference(
    model: PeftModel, exported: ExportedBase
) -> None:
    right, runner = adapter.encode(tensors(model), exported.adapter_inputs, "fp32"), OnnxRunner
    found = compare(model, runner.open(exported.folder, exported.manifest), adapter.decode(right, "fp32"), PHRASES)
    assert (found.agreement, found.count) == (1, len(PHRASES))
    assert found.max_abs_diff < 1e-5
    doubled = replace(
        exported.adapter_inputs,
        loras=tuple(replace(slot, scaling=8 * slot.scaling) for slot in exported.adapter_inputs.loras),
    )
    inputs = adapter.decode(adapter.encode(tensors(model), doubled, "fp32"), "fp32")
    assert compare(model, OnnxRunner.open(exported.folder, exported.manifest), inputs, PHRASES).max_abs_diff > 0.05


AT_LIMIT = Parity(0.98, 0.1, 200, loss=math.log(10), torch_loss=math.log(8))
LIMIT = Limits(0.98, 0.1, 1.2501)


@pytest.mark.parametrize(
    ("changes", "broken"),
    [
        ({"agreement": 0.975}, ("agreement",)),
        ({"max_abs_diff": 0.11}, ("largest difference",)),
        ({"loss": math.log(11)}, ("perplexity",)),
        ({"agreement": 0.1, "max_abs_diff": 0.9}, ("agreement", "largest difference")),
    ],
)
def test_the_gate_passes_at_its_limits_and_names_every_measure_beyond(
    changes: dict[str, float], broken: tuple[str, ...]
) -> None:
    gate(AT_LIMIT, LIMIT)
    with refused(ParityError, "parity") as caught:
        gate(replace(AT_LIMIT, **changes), LIMIT)
    measures = ("agreement", "largest difference", "perplexity")
    assert tuple(name for name in measures if name in str(caught.value)) == broken


def test_the_gates_line_names_the_noise_of_an_adapter_with_differential_privacy() -> None:
    with pytest.raises(ParityError, match=r"privacy \(epsilon 6\.07 for delta 1e-06\).*profile fp32"):
        gate(replace(AT_LIMIT, agreement=0.975), LIMIT, privacy=PrivacyBound(6.071, 1e-6))
    gate(AT_LIMIT, LIMIT, privacy=PrivacyBound(6.071, 1e-6))


@pytest.mark.parametrize("found", [Parity(math.nan, 0, 1), Parity(1, 0, 1, math.nan, 2.0)])
def test_a_measure_that_is_nan_does_not_pass(found: Parity) -> None:
    with pytest.raises(ParityError):
        gate(found, Limits(0.5))


@pytest.mark.parametrize("task", LIMITS)
def test_every_profile_has_limits_that_can_fail(task: Task) -> None:
    assert set(LIMITS[task]) == set(Profile)
    strict = LIMITS[task][Profile.FP32]
    for profile in Profile:
        found = limits_of(profile.value, task)
        assert 0.5 < found.agreement <= strict.agreement
        assert min(found.max_abs_diff, found.perplexity_ratio - 1) < 1
    with refused(ConfigError, "profile", value="int3"):
        limits_of("int3", task)


@pytest.mark.parametrize("minimum", [-0.1, 1.1, float("nan")])
def test_a_minimum_agreement_outside_0_to_1_is_refused(minimum: float) -> None:
    with refused(ConfigError, "agreement"):
        Limits(minimum)


def test_a_comparison_without_texts_is_refused(model: PeftModel, exported: ExportedBase) -> None:
    with refused(DataError, "texts"):
        compare(model, OnnxRunner.open(exported.folder, exported.manifest), {}, [])


def test_logits_that_are_not_finite_are_refused(model: PeftModel, exported: ExportedBase) -> None:
    inputs = adapter.decode(adapter.encode(tensors(model), exported.adapter_inputs, "fp32"), "fp32")
    broken = inputs | {"classifier.bias": np.full_like(inputs["classifier.bias"], np.nan)}
    with refused(DataError, "logits"):
        compare(model, OnnxRunner.open(exported.folder, exported.manifest), broken, PHRASES)


# A language model


TEXTS = ("the owl and the cat", "went to sea", "x", "in a beautiful pea green boat")
TARGETS = ("q_proj", "v_proj")
Draw = Callable[[PeftModel, int], Tensors]


@pytest.fixture(scope="module")
def trained(llama: Base, drawn: Draw) -> PeftModel:
    model = causal.build(llama, PeftConfig.lora(4, 8, TARGETS))
    drawn(model, 3)
    return model


@pytest.fixture(scope="module")
def runner(llama: Base) -> OnnxRunner:
    exported = export_causal(llama, TARGETS, Profile.FP32)
    return OnnxRunner.open(exported.folder, exported.manifest)


def inputs_of(model: PeftModel) -> Tensors:
    return adapter.decode(adapter.encode(causal.tensors(model), adapter_inputs(model), "fp32"), "fp32")


def test_each_next_token_is_an_answer_and_the_losses_are_pefts_own(trained: PeftModel, runner: OnnxRunner) -> None:
    found = compare(trained, runner, inputs_of(trained), TEXTS)
    ids = [encoding.ids for encoding in runner.tokenizer.encode_batch(list(TEXTS))]
    assert found.count == sum(len(row) - 1 for row in ids)
    losses = []
    for row in (torch.tensor([row]) for row in ids if len(row) > 1):
        with torch.no_grad():  # the mean over a row, weighted by its number of answers
            losses += (row.shape[1] - 1) * [float(trained(input_ids=row, labels=row).loss)]
    assert found.torch_loss == pytest.approx(np.mean(losses), abs=1e-5)
    assert found.loss == pytest.approx(found.torch_loss, abs=1e-5)
    assert found.agreement == 1
    assert found.perplexity_ratio == pytest.approx(1, abs=1e-5)
    assert found.max_abs_diff < 1e-4


def test_a_missing_adapter_shows_in_agreement_and_perplexity(trained: PeftModel, runner: OnnxRunner) -> None:
    found = compare(trained, runner, {}, TEXTS)
    assert found.loss is not None
    assert found.torch_loss is not None
    assert found.agreement < 0.9
    assert abs(math.log(found.perplexity_ratio)) > 0.01
    assert f"ratio {found.perplexity_ratio:.4f}" in str(found)


def test_texts_without_a_second_token_are_refused(trained: PeftModel, runner: OnnxRunner) -> None:
    with refused(DataError, "texts"):
        compare(trained, runner, {}, ["x", "y"])
