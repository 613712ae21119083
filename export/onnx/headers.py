"""One graph as two small headers over one file of weights.

ONNX Runtime maps the file of weights into memory, so every process that opens the base by its path shares one copy. The
native header gives each slot an empty default, because ONNX Runtime checks required inputs before it applies an
adapter; onnxruntime-web refuses defaults for inputs, so its header has none. Slots declare the shapes of one adapter,
with a name for each free dimension. ``edgeadapt.bases.slotshapes`` drops them where each row has an adapter of its own
(A of shape ``(rows, in, rank)``), which MatMul broadcasts."""

import copy
import hashlib
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from edgeadapt.formats.bundle import MODEL, WEB_MODEL, WEIGHTS
from edgeadapt.formats.files import sha256
from edgeadapt.formats.graphinputs import empty_inputs
from export.onnx.tensorstore import INLINE, MEMORY, TensorStore, external

PAGE = 4096  # bytes; a memory mapping starts at a page

PRODUCER = "edgeadapt"
# The first versions of ONNX Runtime with the option that maps weights from a folder, which devices need, and with the
# operators of quantized and of fused graphs as they are written here (docs/reference/bundle-format.md, "Graphs").
FLOAT_RUNTIME, CONTRIB_RUNTIME = "1.22", "1.23"
NEWER = {"GatherBlockQuantized", "GroupQueryAttention", "MatMulNBits"}

Slots = Mapping[str, tuple[str, ...]]


def requirements(graph: onnx.ModelProto) -> tuple[str, int]:
    """Find the lowest version of ONNX Runtime that runs ``graph``, and the version of ONNX's operators that it uses."""
    newer = any(node.op_type in NEWER for node in graph.graph.node)
    return CONTRIB_RUNTIME if newer else FLOAT_RUNTIME, next(o.version for o in graph.opset_import if not o.domain)


def split(
    graph: onnx.ModelProto,
    slots: Slots,
    about: Mapping[str, str],
    folder: Path,
    store: TensorStore = MEMORY,
    others: Mapping[str, onnx.ModelProto] = MappingProxyType({}),
    parts: Mapping[str, Sequence[int]] = MappingProxyType({}),
) -> dict[str, str]:
    """Write the files of ``graph``, which itself loses its weights. Returns the SHA-256, hex, of each by name.

    ``slots`` are inputs without defaults: their dimensions, digits for a fixed one, else the name of a symbolic one.
    ``about`` becomes metadata of the model. ``others`` are further headers over the same file, such as the training
    graph, by their names; it grows by what only they have. ``parts``, from ``matmuls.merge``, are the rows of tensors
    that they have one by one."""
    graphs = [graph, *others.values()]
    digests = {WEIGHTS: _externalize(graphs, folder / WEIGHTS, store, parts)}
    for model in graphs:
        model.producer_name, model.producer_version = PRODUCER, version(PRODUCER)
        helper.set_model_props(model, dict(about))
    # Only inputs and outputs have shapes: an exporter's shapes in between may be wrong.
    del graph.graph.value_info[:]
    for value in graph.graph.input:
        if value.name in slots:
            sizes = [int(text) if text.isdigit() else text for text in slots[value.name]]
            value.CopyFrom(helper.make_tensor_value_info(value.name, onnx.TensorProto.FLOAT, sizes))
    headers = {MODEL: _with_defaults(graph, slots), WEB_MODEL: graph}
    for name, header in (headers | dict(others)).items():
        content = header.SerializeToString(deterministic=True)
        (folder / name).write_bytes(content)
        digests[name] = sha256(content)
    return digests


def _with_defaults(header: onnx.ModelProto, slots: Slots) -> onnx.ModelProto:
    result = copy.deepcopy(header)
    result.graph.initializer.extend(numpy_helper.from_array(empty, name) for name, empty in empty_inputs(slots).items())
    return result


def _externalize(
    graphs: Sequence[onnx.ModelProto], file: Path, store: TensorStore, parts: Mapping[str, Sequence[int]]
) -> str:
    """Move the large tensors out, in their order, each to a page of its own; equal bytes are stored once. Returns the
    SHA-256 of ``file``, hex."""
    offsets: dict[bytes, int] = {}
    whole = hashlib.sha256()
    with file.open("wb") as out:
        for tensor in (tensor for graph in graphs for tensor in graph.graph.initializer):
            values = store.array(tensor)
            if values.nbytes < INLINE:
                tensor.CopyFrom(_inline(tensor, values))
                continue
            content = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
            digest = hashlib.sha256(content).digest()
            if digest not in offsets:
                padding = bytes(-out.tell() % PAGE)
                offsets[digest] = out.tell() + len(padding)
                for part in (padding, content):
                    out.write(part)
                    whole.update(part)
                start, counts = 0, parts.get(tensor.name, ())
                for rows in counts:
                    end = start + rows * (len(content) // sum(counts))
                    offsets.setdefault(hashlib.sha256(content[start:end]).digest(), offsets[digest] + start)
                    start = end
            moved = external(tensor.name, values, WEIGHTS, offsets[digest])
            moved.data_type, moved.dims[:] = tensor.data_type, tensor.dims
            if tensor.HasField("doc_string"):
                moved.doc_string = tensor.doc_string
            tensor.CopyFrom(moved)
    return whole.hexdigest()


def _inline(tensor: onnx.TensorProto, values: NDArray[Any]) -> onnx.TensorProto:
    if tensor.HasField("raw_data"):
        return tensor
    return numpy_helper.from_array(values, tensor.name)
