"""The builder path: onnxruntime-genai's model builder, which fuses attention, rotary embedding and normalization.

The builder knows some twenty architectures, Llama's and Qwen's among them, but not everything that their configurations
can state, and may silently leave out what it does not know. So its graph is used only if it gives torch's logits. It
builds the graph in float32 and the files that onnxruntime-genai needs; quantization and slots are applied afterwards,
the same way as on the traced path (``traced.py``)."""

import io
import json
import logging
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from aggregation.errors import ConfigError
from edgeadapt.bases.base import Base
from edgeadapt.formats.bundle import GENERATION, MODEL
from export.causal.sample import Sample, matches
from export.onnx.exported import Report
from export.onnx.matmuls import replace_nodes, share_embedding
from export.onnx.tensorstore import OnDisk

# Projections stay separate, because each has a slot of its own; share_embedding shares the output layer's weight.
OPTIONS = ("fuse_qkv=false", "shared_embeddings=false", "hf_token=false")
QUIET = {"log_severity_level": 3}  # errors; ONNX Runtime warns of each slot that has a default, which all have


class BuilderPathError(ConfigError):
    """The builder cannot build this model, or its graph differs from torch; the traced path is tried instead."""


@dataclass(frozen=True, slots=True)
class DecoderGraph:
    graph: onnx.ModelProto
    files: dict[str, bytes] = field(repr=False)


def build(base: Base, config: Any, sample: Sample, store: OnDisk, report: Report = lambda *_: None) -> DecoderGraph:
    """Build token ids, attention mask and KV cache → logits and the next KV cache, with dynamic batch and lengths.
    ``sample``: torch's logits for a short text; ``store``: holds the weights of the graph. Raises BuilderPathError: the
    builder does not know the architecture, or its graph does not give torch's logits."""
    if _has_window(config):  # the sample is too short to show it
        raise BuilderPathError(
            f"onnxruntime-genai's builder leaves out the sliding window of {base.folder}", about="sliding_window"
        )
    with tempfile.TemporaryDirectory(prefix="edgeadapt-", dir=store.place.parent) as name:
        out = Path(name) / "out"
        report("building the graph", 0, 0)
        with _builder() as builder:
            _create(builder, base, out, Path(name) / "cache")
        files = {path.name: path.read_bytes() for path in sorted(out.iterdir()) if not path.name.startswith(MODEL)}
        graph = onnx.load(out / MODEL, load_external_data=False)
        graph.ClearField("producer_version")  # it names the commit of whatever repository Python was installed in
        settings = json.loads(files[GENERATION])
        decoder = settings["model"]["decoder"]
        decoder["session_options"] |= QUIET
        files[GENERATION] = json.dumps(settings, indent=4).encode()
        _fix_head_size(graph, decoder["head_size"])
        _standardize_normalization(graph)
        store.take(out / f"{MODEL}.data", graph)
        if not matches(graph, sample, store, report):
            raise BuilderPathError(
                f"the graph of onnxruntime-genai's builder for {base.folder} does not give torch's logits",
                about="logits",
            )
    share_embedding(graph, store)
    return DecoderGraph(graph, files)


def _has_window(config: Any) -> bool:
    """Whether tokens cannot see beyond a window that is shorter than the longest text. The builder leaves out Mistral's
    window, and writes others' in a form that needs a cache of the runtime's own."""
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return isinstance(window, int) and window < getattr(config, "max_position_embeddings", window + 1)


def _create(builder: Any, base: Base, out: Path, cache: Path) -> None:
    arguments = (None, str(base.folder), str(out), "fp32", "cpu", str(cache))
    try:
        builder.create_model(*arguments, **builder.parse_extra_options(*arguments, list(OPTIONS)))
    except Exception as error:  # an architecture that the builder does not know can cause any exception
        if isinstance(error, OSError) and error.errno is not None:  # such as a full disk; transformers sets no errno
            raise
        raise BuilderPathError(f"onnxruntime-genai cannot build {base.folder}: {error}", about="builder") from error


@contextmanager
def _builder() -> Iterator[Any]:
    """Import the builder's module, with its output suppressed. Importing it adds a folder of common names
    (``builders``, ``quantization``) to ``sys.path`` and configures logging for the whole process; both are undone."""
    path = sys.path[:]
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield _imported()
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"exporting a language model needs {error.name}: pip install 'edgeadapt[export]'", about="builder"
        ) from error
    finally:
        sys.path[:] = path


def _imported() -> Any:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        from onnxruntime_genai.models import builder
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    return builder


def _fix_head_size(graph: onnx.ModelProto, size: int) -> None:
    """State the width of the KV cache, which the builder leaves symbolic: the first, empty cache must have it."""
    for value in (*graph.graph.input, *graph.graph.output):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param == "kv_cache_dim":
                dimension.dim_value = size


def _standardize_normalization(graph: onnx.ModelProto) -> None:
    """Write RMSNorm in ONNX's operators, in place: no schema has the builder's SimplifiedLayerNormalization. ONNX
    Runtime recognizes the six nodes and runs its own operator for them, so that speed and numbers stay the same."""
    nodes: list[onnx.NodeProto] = []
    for node in graph.graph.node:
        if node.op_type != "SimplifiedLayerNormalization":
            nodes.append(node)
            continue
        (x, weight), y = node.input, node.output[0]
        epsilon = next(a.f for a in node.attribute if a.name == "epsilon")
        constants = {"two": np.float32(2), "epsilon": np.float32(epsilon), "axis": np.array([-1])}
        named = {part: f"{y}/{part}" for part in (*constants, "square", "mean", "sum", "root", "normal")}
        graph.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), named[n]) for n, v in constants.items())
        for kind, inputs, output in (
            ("Pow", [x, named["two"]], named["square"]),
            ("ReduceMean", [named["square"], named["axis"]], named["mean"]),
            ("Add", [named["mean"], named["epsilon"]], named["sum"]),
            ("Sqrt", [named["sum"]], named["root"]),
            ("Div", [x, named["root"]], named["normal"]),
            ("Mul", [named["normal"], weight], y),
        ):
            nodes.append(helper.make_node(kind, inputs, [output], output))
    replace_nodes(graph.graph, nodes)
