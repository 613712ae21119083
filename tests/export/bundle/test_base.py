"""The task of a base, as its configuration states it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from aggregation.errors import ConfigError
from edgeadapt.bases.base import Base
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.methods.classifier import build, tensors
from export.bundle.base import usual_task, wanted
from export.bundle.sources import Origin
from export.onnx.targets import Slots
from tests.support import refused


@pytest.mark.parametrize(
    ("architectures", "task"),
    [
        (["LlamaForCausalLM"], "text-generation"),
        (["GPT2LMHeadModel"], "text-generation"),
        (["BertModel"], "text-classification"),
        (["BertForMaskedLM"], "text-classification"),
        (None, "text-classification"),
    ],
)
def test_a_base_states_its_usual_task(tmp_path: Path, architectures: Any, task: str) -> None:
    assert usual_task(_stating(tmp_path, architectures)) == task


@pytest.mark.parametrize("architectures", [["BertForTokenClassification"], ["T5ForConditionalGeneration"]])
def test_a_task_that_devices_do_not_run_is_refused(tmp_path: Path, architectures: list[str]) -> None:
    with refused(ConfigError, "architectures", value=architectures[0]):
        usual_task(_stating(tmp_path, architectures))


def test_an_adapter_of_the_last_layer_alone_gets_a_base_that_trains_from_states(tiny_base: Base) -> None:
    config = PeftConfig.lora(2, 4, ("layer.1.output.dense",))
    made = tensors(build(tiny_base, 2, config))
    origin = Origin(config, ("a", "b"), 1, "c" * 64, None, None, "text-classification", made)
    assert wanted(tiny_base, origin).slots.first == 1
    assert wanted(tiny_base, origin, slots=Slots(("query",))).slots.first == 0


def _stating(folder: Path, architectures: Any) -> Base:
    save_file({f"layer.{number}": torch.zeros(1) for number in range(40)}, folder / "model.safetensors")
    config = LlamaConfig(num_hidden_layers=2).to_dict() | {"architectures": architectures}
    (folder / "config.json").write_text(json.dumps(config))
    return Base(folder, "0" * 64)
