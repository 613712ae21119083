"""Parity of a language model with torch: its answers are its next tokens, measured by agreement and perplexity."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from peft import PeftModel

from aggregation.errors import DataError
from edgeadapt.bases.base import Base
from edgeadapt.formats.layout import Tensors
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.methods import causal
from export.bundle import adapter
from export.causal import export_causal
from export.onnx.exported import Profile
from export.onnx.peftmodel import find_adapter_inputs
from export.parity.compare import OnnxRunner, compare
from tests.support import refused

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
    return adapter.decode(adapter.encode(causal.tensors(model), find_adapter_inputs(model), "fp32"), "fp32")


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
