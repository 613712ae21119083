"""The fast road: onnxruntime-genai's model builder, which fuses attention, rotary embedding and normalization.

It knows some twenty architectures, Llama's and Qwen's among them, but not all that their configurations can say, and
what it does not know it may leave out without a word. So its graph is taken only if it answers as torch does. It is
only asked for the graph in float32 and the files that onnxruntime-genai wants beside it; quantization and slots are
ours, so that both are the same on every road.
"""

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

from adapters.base import Base
from aggregation.errors import ConfigError
from export.causal.sample import Sample, says_the_same
from export.onnx.headers import NATIVE

# Projections stay apart, because each has a slot of its own; a table that is also the output layer is shared by us.
OPTIONS = ("fuse_qkv=false", "shared_embeddings=false", "hf_token=false")
CONTRIB = "com.microsoft"
SETTINGS = "genai_config.json"
QUIET = {"log_severity_level": 3}  # errors; ONNX Runtime warns of each slot that has a default, which all have


class NoFastRoadError(ConfigError):
    """The builder cannot build this model, or not as torch has it."""


@dataclass(frozen=True, slots=True)
class Built:
    """A graph in float32 with its weights, and the files that onnxruntime-genai needs beside it."""

    graph: onnx.ModelProto
    files: dict[str, bytes] = field(repr=False)


def build(base: Base, config: Any, sample: Sample) -> Built:
    """Token ids, attention mask and KV cache → logits and the next KV cache, with dynamic batch and lengths.

    Args:
        base: A causal language model.
        config: Its configuration, of transformers.
        sample: What torch says to a short text.

    Raises:
        NoFastRoadError: The builder does not know the architecture, or its graph does not answer as torch does.
        ConfigError: What it needs is not installed.
    """
    if _has_window(config):  # which the sample is too short to show
        raise NoFastRoadError(f"onnxruntime-genai's builder leaves out the sliding window of {base.folder}")
    with tempfile.TemporaryDirectory(prefix="edgeadapt-") as name:
        out = Path(name) / "out"
        with _module() as builder:
            _create(builder, base, out, Path(name) / "cache")
        files = {path.name: path.read_bytes() for path in sorted(out.iterdir()) if not path.name.startswith(NATIVE)}
        graph = onnx.load(out / NATIVE, load_external_data=False)
        graph.ClearField("producer_version")  # it names the commit of whatever repository Python was installed in
        settings = json.loads(files[SETTINGS])
        decoder = settings["model"]["decoder"]
        decoder["session_options"] |= QUIET
        files[SETTINGS] = json.dumps(settings, indent=4).encode()
        _fix_head_size(graph, decoder["head_size"])
        onnx.save(graph, out / NATIVE)
        if not says_the_same(out / NATIVE, sample):
            raise NoFastRoadError(f"onnxruntime-genai's builder does not build {base.folder} as torch has it")
        onnx.load_external_data_for_model(graph, str(out))
    share_table(graph)
    return Built(graph, files)


def _has_window(config: Any) -> bool:
    """Whether tokens forget what is farther back than a window shorter than the longest text.

    Mistral's is lost by the builder; others' it writes in a form that wants a cache of the runtime's own.
    """
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return isinstance(window, int) and window < getattr(config, "max_position_embeddings", window + 1)


def _create(builder: Any, base: Base, out: Path, cache: Path) -> None:
    where = (None, str(base.folder), str(out), "fp32", "cpu", str(cache))
    try:
        options = builder.parse_extra_options(*where, list(OPTIONS))
        builder.create_model(*where, **options)
    except OSError as error:
        if error.errno is not None:  # a full disk, say, and not what transformers raises for files that it misses
            raise
        raise NoFastRoadError(f"onnxruntime-genai cannot build {base.folder}: {error}") from error
    except Exception as error:  # the builder raises whatever what it does not know happens to lead to
        raise NoFastRoadError(f"onnxruntime-genai cannot build {base.folder}: {error}") from error


@contextmanager
def _module() -> Iterator[Any]:
    """The builder's module, while it may print what it likes.

    Importing it puts a folder of common names (``builders``, ``quantization``) on ``sys.path`` and sets up logging for
    the whole process; both are undone afterwards.
    """
    path = sys.path[:]
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield _imported()
    except ModuleNotFoundError as error:
        raise ConfigError(f"exporting a language model needs {error.name}: pip install 'edgeadapt[export]'") from error
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
    """State the width of the KV cache, which the builder leaves open, for whoever makes the first, empty one."""
    for value in (*graph.graph.input, *graph.graph.output):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param == "kv_cache_dim":
                dimension.dim_value = size


def share_table(graph: onnx.ModelProto) -> None:
    """Let an output layer that is the embedding table, turned, read the table itself: it is in the file only once."""
    values = {tensor.name: tensor for tensor in graph.graph.initializer}
    tables = {node.input[0] for node in graph.graph.node if node.op_type == "Gather" and node.input[0] in values}
    for node in graph.graph.node:
        if node.op_type != "MatMul" or (weight := values.get(node.input[1])) is None:
            continue
        for name in sorted(tables):
            if list(weight.dims) == list(values[name].dims)[::-1] and _turned(weight, values[name]):
                x, output = node.input[0], node.output[0]
                node.CopyFrom(helper.make_node("FusedMatMul", [x, name], [output], node.name, domain=CONTRIB, transB=1))
                graph.graph.initializer.remove(weight)
                break


def _turned(weight: onnx.TensorProto, table: onnx.TensorProto) -> bool:
    return bool(np.array_equal(numpy_helper.to_array(weight).T, numpy_helper.to_array(table)))
