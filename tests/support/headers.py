"""What every exported graph must be to other programs."""

from pathlib import Path
from tempfile import TemporaryDirectory

import onnx

from edgeadapt.formats.bundle import MODEL, WEB_MODEL, WEIGHTS
from export.onnx.exported import ExportedBase


def check_headers(exported: ExportedBase) -> None:
    """Hold both headers to ONNX's checker, which also infers shapes, and to what the manifest states about them."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / WEIGHTS).touch()  # the checker asks whether it is there
        for header in (MODEL, WEB_MODEL):
            (folder / header).write_bytes(exported.read(header))
            onnx.checker.check_model(str(folder / header), full_check=True)
            model = onnx.load(folder / header, load_external_data=False)
            shapes = {v.name: dimensions(v) for v in (*model.graph.input, *model.graph.output)}
            assert all(text for shape in shapes.values() for text in shape), "a dimension has neither size nor name"
            assert {name: shapes[name] for name in exported.manifest.slots} == exported.manifest.slots
            assert {entry.domain: entry.version for entry in model.opset_import}[""] == exported.manifest.opset
            about = {entry.key: entry.value for entry in model.metadata_props}
            assert about["base_digest"] == exported.manifest.base_digest
            assert about["minimum_onnxruntime"] == exported.manifest.onnxruntime
            assert (about["profile"], about["task"]) == (exported.manifest.profile, exported.manifest.task)
            assert model.producer_name == "edgeadapt"


def dimensions(value: onnx.ValueInfoProto) -> tuple[str, ...]:
    """The sizes and names of a value's dimensions, as text."""
    shape = value.type.tensor_type.shape.dim
    return tuple(d.dim_param or (str(d.dim_value) if d.HasField("dim_value") else "") for d in shape)
