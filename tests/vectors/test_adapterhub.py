"""Adapters of AdapterHub's own library, with the logits that it computed (``make_adapterhub.py``)."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from aggregation.errors import ConfigError, DataError
from edgeadapt.bases.base import Base, find_base
from edgeadapt.methods.peft.adapterhub import PICKLE, WEIGHTS
from edgeadapt.methods.peft.folder import CONFIG, read_peft
from export.bundle.base import model_of, wanted
from export.bundle.sources import from_peft
from export.bundle.write import device_inputs
from export.onnx.classifier import export_classifier
from export.onnx.exported import Profile
from export.onnx.slotted import with_own_head
from export.parity.compare import OnnxRunner, _trained, torch_logits
from tests.support import refused

FOLDER = Path(__file__).with_name("adapterhub")
EXPECTED = json.loads((FOLDER / "expected.json").read_text())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_base: Base) -> Base:
    folder = shutil.copytree(FOLDER / "base", tmp_path_factory.mktemp("adapterhub") / "base")
    shutil.copy(tiny_base.folder / "tokenizer.json", folder)
    return find_base(str(folder))


@pytest.mark.parametrize("name", EXPECTED["logits"])
def test_torch_and_graph_answer_as_adapterhub(base: Base, name: str) -> None:
    origin = from_peft(FOLDER / name, 1, ("a", "b", "c"))
    model = _trained(model_of(base, "text-classification", mean=False, saved=["classifier"], labels=3), origin)
    want = wanted(base, origin)
    exported = export_classifier(with_own_head(base, want.slots, want.brought), base, Profile.FP32, training=True)
    assert exported.gradients < 1e-4
    runner = OnnxRunner.open(exported.folder, exported.manifest)
    inputs = device_inputs(origin, exported.manifest, "fp32")
    for ids, logits in zip(EXPECTED["ids"], EXPECTED["logits"][name], strict=True):
        np.testing.assert_allclose(torch_logits(model, ids)[0], logits, atol=1e-5)
        np.testing.assert_allclose(runner.logits(ids, inputs)[0], logits, atol=1e-5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(FOLDER / "pfeiffer", tmp_path / "adapter")


def rewrite(folder: Path, **settings: Any) -> None:
    stated = json.loads((folder / CONFIG).read_text())
    stated["config"].update(settings)
    (folder / CONFIG).write_text(json.dumps(stated))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("non_linearity", "tanh"), ("non_linearity", None), ("non_linearity", ["relu"]), ("scaling", "learned")),
        *(("original_ln_after", False), ("residual_before_ln", "post_add"), ("ln_before", True), ("ln_after", True)),
        *(("is_parallel", True), ("phm_layer", True), ("use_gating", True), ("inv_adapter", "nice")),
        *(("cross_adapter", True), ("of_another_version", 1)),
    ],
)
def test_a_setting_without_a_slot_is_refused_by_name(folder: Path, name: str, value: object) -> None:
    rewrite(folder, **{name: value})
    with refused(ConfigError, name):
        read_peft(folder)


def test_layers_of_different_ranks_are_refused(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    first = "bert.encoder.layer.0.output.adapters.task.adapter"
    for name, shape in (("down.0.weight", (2, 16)), ("down.0.bias", (2,)), ("up.weight", (16, 2))):
        tensors[f"{first}_{name}"] = np.ones(shape, np.float32)
    save_file(tensors, folder / WEIGHTS)
    with refused(ConfigError, "reduction_factor"):
        read_peft(folder)


def test_hostile_and_damaged_folders_are_refused(folder: Path) -> None:
    name = "bert.encoder.layer.0.output.adapters.task.adapter_up.weight"
    tensors, whole = load_file(folder / WEIGHTS), (folder / WEIGHTS).read_bytes()
    bottleneck, inverse = "bert.encoder.layer.0.output.LayerNorm.bottleneck_relu", "bert.invertible_adapters.task.F.0"
    others: list[tuple[str, Any, str]] = [
        (name, np.ones((16, 3), np.float32), bottleneck),
        (name, np.ones(16, np.float32), bottleneck),
        (name, None, bottleneck),
        (name, np.full((16, 4), np.nan, np.float32), name),
        (inverse, np.ones((4, 4), np.float32), inverse),
    ]
    for other, value, about in others:
        changed = {key: array for key, array in (tensors | {other: value}).items() if array is not None}
        save_file(changed, folder / WEIGHTS)
        with refused(DataError, about):
            read_peft(folder)
    for damaged in (b"", whole[:-1], whole[:40]):
        (folder / WEIGHTS).write_bytes(damaged)
        with refused(DataError, WEIGHTS):
            read_peft(folder)
    (folder / WEIGHTS).write_bytes(whole)
    (folder / CONFIG).write_text('{"config": 3}')
    with refused(DataError, "config"):
        read_peft(folder)


def test_an_adapter_in_a_pickle_is_refused(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / PICKLE)
    with refused(ConfigError, PICKLE):
        read_peft(folder)
