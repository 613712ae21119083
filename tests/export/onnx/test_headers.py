"""Two headers over one file of weights: the same outputs, shared memory, and defaults in the native one only."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument
from peft import PeftModel

from edgeadapt.bases.base import Base
from edgeadapt.bases.slotshapes import without_shapes
from edgeadapt.formats.files import sha256
from export.onnx import headers
from export.onnx.classifier import export_classifier
from export.onnx.exported import ExportedBase, Profile
from export.onnx.tensorstore import OnDisk
from tests.support.headers import check_headers
from tests.support.models import slotted_of

ABOUT = {"task": "text-classification"}
SLOTS = {"A": ("64", "rank_0"), "B": ("rank_0", "32")}


def graph() -> onnx.ModelProto:
    """``x @ W + x @ A @ B`` with a weight that is moved to the data file and a bias that stays in the header."""
    rng = np.random.default_rng(0)
    weights = {"W": (64, 32), "bias": (32,)}
    shapes = {"x": ("rows", "length", 64), "A": (64, "rank_0"), "B": ("rank_0", 32)}
    nodes = [
        helper.make_node("MatMul", ["x", "W"], ["base"]),
        helper.make_node("MatMul", ["x", "A"], ["low"]),
        helper.make_node("MatMul", ["low", "B"], ["update"]),
        helper.make_node("Add", ["base", "bias"], ["biased"]),
        helper.make_node("Add", ["biased", "update"], ["y"]),
    ]
    values = [numpy_helper.from_array(rng.standard_normal(s).astype(np.float32), name) for name, s in weights.items()]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ("rows", "length", 32))]
    return helper.make_model(
        helper.make_graph(nodes, "g", inputs, outputs, values),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    headers.split(graph(), SLOTS, ABOUT, tmp_path)
    return tmp_path


def run(path: Path, **feeds: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    answer: np.ndarray = ort.InferenceSession(str(path), options).run(["y"], feeds)[0]
    return answer


def test_both_headers_give_the_outputs_of_the_graph(folder: Path) -> None:
    rng = np.random.default_rng(1)
    feeds = {"x": (2, 3, 64), "A": (64, 5), "B": (5, 32)}
    values = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in feeds.items()}
    onnx.save(graph(), folder / "whole.onnx")
    whole = run(folder / "whole.onnx", **values)
    for name in (headers.MODEL, headers.WEB_MODEL):
        np.testing.assert_array_equal(run(folder / name, **values), whole)


def test_only_the_native_header_runs_without_an_adapter(folder: Path) -> None:
    x = np.ones((1, 1, 64), dtype=np.float32)
    none = {"A": np.zeros((64, 0), np.float32), "B": np.zeros((0, 32), np.float32)}
    np.testing.assert_array_equal(run(folder / headers.MODEL, x=x), run(folder / headers.WEB_MODEL, x=x, **none))
    with pytest.raises(ValueError, match=r"Required inputs \(\['A', 'B'\]\) are missing"):
        run(folder / headers.WEB_MODEL, x=x)


def test_a_slot_takes_one_adapter_for_all_rows_or_one_for_each_row(folder: Path) -> None:
    rng = np.random.default_rng(2)
    x, a, b = (rng.standard_normal(s).astype(np.float32) for s in ((2, 3, 64), (2, 64, 4), (2, 4, 32)))
    for name in (headers.MODEL, headers.WEB_MODEL):
        with pytest.raises(InvalidArgument, match="Invalid rank for input"):
            run(folder / name, x=x, A=a, B=b)
        for_rows = folder / f"for-rows-{name}"
        for_rows.write_bytes(without_shapes((folder / name).read_bytes(), SLOTS))
        together = run(for_rows, x=x, A=a, B=b)
        for row in range(2):
            alone = run(folder / name, x=x[row : row + 1], A=a[row], B=b[row])
            np.testing.assert_allclose(together[row : row + 1], alone, atol=1e-5)


def test_large_weights_start_at_pages_of_the_data_file_and_small_ones_stay_in_the_header(folder: Path) -> None:
    tensors = {t.name: t for t in onnx.load(folder / headers.MODEL, load_external_data=False).graph.initializer}
    place = {entry.key: entry.value for entry in tensors["W"].external_data}
    assert place["location"] == headers.WEIGHTS
    assert int(place["offset"]) % headers.PAGE == 0
    assert int(place["length"]) == 64 * 32 * 4
    assert tensors["bias"].raw_data


def test_equal_graphs_give_equal_files_wherever_their_tensors_are(folder: Path, tmp_path: Path) -> None:
    stored, store, again = graph(), OnDisk(tmp_path / "tensors"), tmp_path / "again"
    again.mkdir()
    tensors = [store.tensor(numpy_helper.to_array(tensor), tensor.name) for tensor in stored.graph.initializer]
    del stored.graph.initializer[:]
    stored.graph.initializer.extend(tensors)
    digests = headers.split(stored, SLOTS, ABOUT, again, store)
    assert digests == {name: sha256((folder / name).read_bytes()) for name in digests}
    assert len(digests) == 3


@pytest.mark.parametrize("profile", Profile)
def test_the_checker_accepts_both_headers_of_every_profile(model: PeftModel, tiny_base: Base, profile: Profile) -> None:
    """Language models are checked wherever a test of ``tests/export`` runs one (its conftest.py)."""
    check_headers(export_classifier(slotted_of(model), tiny_base, profile))


def test_the_lowest_runtime_follows_from_the_operators() -> None:
    made = graph()
    assert headers.requirements(made) == ("1.22", 20)
    made.graph.node[0].op_type = "MatMulNBits"
    assert headers.requirements(made) == ("1.23", 20)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's memory maps")
def test_a_session_opened_by_path_maps_the_weights(exported: ExportedBase, tmp_path: Path) -> None:
    for name in exported.manifest.files:
        blob = exported.read(name)
        (tmp_path / name).write_bytes(blob)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(tmp_path / headers.MODEL), options)
    assert str(tmp_path / headers.WEIGHTS) in Path("/proc/self/maps").read_text(), session
