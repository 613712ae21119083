"""Biases of the base that are trained in place, as peft's ``bias="all"`` has them."""

from typing import Any

import numpy as np
import pytest
import torch

from adapters.classifier import seeded
from adapters.parts import is_bias
from adapters.peftconfig import PeftConfig
from client.training import torchengine

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = ("turn on the light", "play music", "set a timer")


def test_without_an_adapter_the_base_has_its_own_biases(tiny_base: Any) -> None:
    trained = torchengine.classifier(tiny_base, 3, PeftConfig("LORA", 2, 4, ("query",), bias="all"))
    before = trained.embed(TEXTS)
    start = seeded(trained.model, np.eye(3, 32, dtype=np.float32), torch.Generator().manual_seed(3))
    assert not any("classifier" in name for name in start if is_bias(name))
    moved = {name: value + 1 if is_bias(name) else value for name, value in start.items()}
    assert np.abs(trained.embed(TEXTS, moved) - before).max() > 1e-3
    assert np.array_equal(trained.embed(TEXTS), before)
