"""The tiny bases, their exports and bundles, and a runner of exported language models."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

from edgeadapt.bases.slotshapes import without_shapes
from edgeadapt.formats.layout import Floats, Tensors
from export.onnx.exported import ExportedBase
from tests.support import models
from tests.support.headers import check_headers

tiny_base, model, source, bundle = models.tiny_base, models.model, models.source, models.bundle
exported, exported_int8 = models.exported, models.exported_int8
vendor, household = models.vendor, models.household
make_lm, llama, lm_base, drawn = models.make_lm, models.llama, models.lm_base, models.drawn


class Runner:
    """An exported base in ONNX Runtime, asked with and without its KV cache."""

    def __init__(self, exported: ExportedBase) -> None:
        check_headers(exported)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(exported.folder))
        self.exported = exported  # its files go with it
        self.session = ort.InferenceSession(without_shapes(exported.model, exported.manifest.slots), options)
        self.pasts = [value for value in self.session.get_inputs() if value.name.startswith("past_key_values.")]
        self.outputs = [value.name for value in self.session.get_outputs()]

    def logits(self, ids: Any, inputs: Tensors, first: int | None = None) -> Floats:
        """The logits of all tokens: the ``first`` at once, then one by one through the cache."""
        rows, length = ids.shape
        cache = {v.name: np.zeros((rows, v.shape[1], 0, v.shape[3]), np.float32) for v in self.pasts}
        found, at = [], 0
        for end in [first or length, *range((first or length) + 1, length + 1)]:
            feeds = {"input_ids": ids[:, at:end], "attention_mask": np.ones((rows, end), np.int64)}
            if any(value.name == "position_ids" for value in self.session.get_inputs()):
                feeds["position_ids"] = np.arange(at, end)[None].repeat(rows, 0)
            answers = dict(zip(self.outputs, self.session.run(None, feeds | cache | inputs), strict=True))
            cache = {name: answers[name.replace("past_key_values", "present")] for name in cache}
            found.append(answers["logits"])
            at = end
        result: Floats = np.concatenate(found, axis=1)
        return result


@pytest.fixture(scope="session")
def runner() -> Callable[[ExportedBase], Runner]:
    return Runner


@pytest.fixture(scope="session")
def torch_logits() -> Callable[..., Floats]:
    def run(model: torch.nn.Module, ids: Any) -> Floats:
        with torch.no_grad():
            answer: Floats = model(input_ids=torch.from_numpy(ids)).logits.numpy()
        return answer

    return run


@pytest.fixture(scope="session")
def every_layer() -> tuple[str, ...]:
    return models.LAYERS
