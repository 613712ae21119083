"""The exported graph gives torch's logits for any adapter, batch and length, and contains nothing of an adapter."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModel

from edgeadapt.bases.base import Base
from edgeadapt.bases.classifiergraph import open_session
from edgeadapt.formats.graphinputs import to_inputs
from edgeadapt.formats.layout import Floats, Tensors
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.methods.classifier import PhraseClassifier, build, load, tensors
from export.bundle import adapter
from export.onnx.classifier import export_classifier
from export.onnx.exported import ExportedBase, Profile
from export.parity.compare import OnnxRunner
from tests.support import models
from tests.support.models import adapter_inputs, slotted_of
from tests.support.traces import traced_anew

Ints = NDArray[np.int64]
VOCABULARY = 60


@pytest.fixture(scope="module")
def session(exported: ExportedBase) -> ort.InferenceSession:
    return open_session(exported.model, exported.folder, exported.manifest.slots)


def draw(model: PeftModel, rng: np.random.Generator) -> Tensors:
    return {name: rng.standard_normal(value.shape, dtype=np.float32) for name, value in tensors(model).items()}


def tokens(rng: np.random.Generator, batch: int, length: int) -> tuple[Ints, Ints]:
    """Random tokens with each row padded to another length."""
    mask = np.ones((batch, length), dtype=np.int64)
    for row in range(1, batch):
        mask[row, max(1, length - row) :] = 0
    return rng.integers(4, VOCABULARY, (batch, length)) * mask, mask


def onnx_logits(session: ort.InferenceSession, ids: Ints, mask: Ints, inputs: Tensors) -> Floats:
    logits: Floats = session.run(["logits"], {"input_ids": ids, "attention_mask": mask, **inputs})[0]
    return logits


def torch_logits(model: PeftModel, ids: Ints, mask: Ints) -> Floats:
    with torch.no_grad():
        logits: Floats = model(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).numpy()
    return logits


@given(
    rank=st.integers(1, 16),
    labels=st.integers(2, 9),
    batch=st.integers(1, 4),
    length=st.integers(1, 24),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=25, deadline=None)
def test_the_graph_gives_torchs_logits_for_any_rank_labels_batch_and_length(
    tiny_base: Base, session: ort.InferenceSession, rank: int, labels: int, batch: int, length: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    model = build(tiny_base, labels, PeftConfig.lora(rank=rank, alpha=3))
    values = draw(model, rng)
    load(model, values)
    ids, mask = tokens(rng, batch, length)
    found = onnx_logits(session, ids, mask, to_inputs(values, adapter_inputs(model).scaling))
    expected = torch_logits(model, ids, mask)
    np.testing.assert_allclose(found, expected, atol=3e-5 * max(1.0, float(np.abs(expected).max())))


def test_rank_0_gives_the_base_without_an_adapter(model: PeftModel, session: ort.InferenceSession) -> None:
    values = tensors(model)
    inputs = {
        name: value[:, :0] if "lora_A" in name else value[:0] if "lora_B" in name else value
        for name, value in to_inputs(values, adapter_inputs(model).scaling).items()
    }
    ids, mask = tokens(np.random.default_rng(0), 3, 8)
    inner = model.base_model.model
    with torch.no_grad(), model.disable_adapter():
        embedded = inner.embed(torch.from_numpy(ids), torch.from_numpy(mask)).numpy()
    prefix = "base_model.model.classifier."
    expected = embedded @ values[prefix + "weight"].T + values[prefix + "bias"]
    np.testing.assert_allclose(onnx_logits(session, ids, mask, inputs), expected, atol=1e-5)


def test_any_module_in_modules_to_save_is_an_input(make_base: Callable[..., Base], tmp_path: Path) -> None:
    base = make_base(tmp_path, tokenizer=models.wordpiece(), layers=1)
    inner = PhraseClassifier(AutoModel.from_pretrained(base.folder), 4)
    config = LoraConfig(r=2, target_modules=["key", "dense"], modules_to_save=["classifier", "LayerNorm"])
    model = get_peft_model(inner, config).eval()
    rng = np.random.default_rng(3)
    values = draw(model, rng)
    load(model, values)
    exported = export_classifier(slotted_of(model), base, Profile.FP32)
    assert exported.manifest.slots["encoder.embeddings.LayerNorm.weight"] == ("32",)
    ids, mask = tokens(rng, 2, 5)
    found = onnx_logits(
        open_session(exported.model, exported.folder, exported.manifest.slots),
        ids,
        mask,
        to_inputs(values, exported.adapter_inputs.scaling),
    )
    expected = torch_logits(model, ids, mask)
    np.testing.assert_allclose(found, expected, atol=1e-4 * float(np.abs(expected).max()))


def test_each_layer_has_its_own_symbolic_rank_and_the_head_a_symbolic_number_of_labels(exported: ExportedBase) -> None:
    query, value = (f"encoder.encoder.layer.0.attention.self.{name}" for name in ("query", "value"))
    assert exported.manifest.slots[query + ".lora_A.weight"] == ("32", "rank_0")
    assert exported.manifest.slots[query + ".lora_B.weight"] == ("rank_0", "32")
    assert exported.manifest.slots[value + ".lora_A.weight"] == ("32", "rank_1")
    assert exported.manifest.slots["classifier.weight"] == ("labels", "32")
    assert exported.manifest.slots["classifier.bias"] == ("labels",)


def test_the_same_base_exports_to_the_same_bytes_whatever_the_adapter(tiny_base: Base, exported: ExportedBase) -> None:
    with traced_anew():
        again = export_classifier(
            slotted_of(build(tiny_base, 4, PeftConfig.lora(rank=4, alpha=8))), tiny_base, Profile.FP32
        )
    assert again.manifest.files == exported.manifest.files


def test_quantization_keeps_every_slot_and_stores_all_large_weights_in_int8(
    exported: ExportedBase, exported_int8: ExportedBase
) -> None:
    assert exported_int8.manifest.slots == exported.manifest.slots
    model = onnx.load_from_string(exported_int8.model)
    floats = [tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT]
    large = [tensor.name for tensor in floats if np.prod(tensor.dims) > 64]
    assert [name for name in large if not name.endswith("scales")] == []


def test_the_tokenizer_truncates_at_the_models_positions_and_does_not_pad(exported: ExportedBase) -> None:
    tokenizer = OnnxRunner.open(exported.folder, exported.manifest).tokenizer
    assert len(tokenizer.encode("lock " * 100).ids) == 24
    assert len(tokenizer.encode("lock").ids) == 3


def test_an_fp32_file_works_with_onnx_runtimes_own_adapter_api(
    model: PeftModel, exported: ExportedBase, session: ort.InferenceSession, tmp_path: Path
) -> None:
    (tmp_path / "adapter").write_bytes(adapter.encode(tensors(model), exported.adapter_inputs, "fp32"))
    lora = ort.LoraAdapter()
    lora.Load(str(tmp_path / "adapter"))
    options = ort.RunOptions()
    options.add_active_adapter(lora)
    ids, mask = tokens(np.random.default_rng(4), 2, 7)
    found = session.run(["logits"], {"input_ids": ids, "attention_mask": mask}, options)[0]
    np.testing.assert_allclose(found, torch_logits(model, ids, mask), atol=1e-5)
