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
from export.bundle.base import usual_task
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


def _stating(folder: Path, architectures: Any) -> Base:
    save_file({f"layer.{number}": torch.zeros(1) for number in range(40)}, folder / "model.safetensors")
    config = LlamaConfig(num_hidden_layers=2).to_dict() | {"architectures": architectures}
    (folder / "config.json").write_text(json.dumps(config))
    return Base(folder, "0" * 64)
