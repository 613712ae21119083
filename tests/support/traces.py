"""Graphs that torch has traced, kept on disk for all workers and later runs: a trace of a tiny model takes seconds.

A graph is found again under a digest of all that it depends on: the module with its tensors and settings, the example,
the exporter's sources and the versions of what it uses. A module whose description differs in anything is traced.

    python -m tests.support.traces COMMAND…             # `edgeadapt COMMAND…`, which finds its graphs here too
"""

import gc
import inspect
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from hashlib import sha256
from importlib.machinery import PathFinder
from importlib.metadata import version
from pathlib import Path
from tempfile import gettempdir
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
STORE = ROOT / ".pytest_cache" / "traces"
USED = ("numpy", "onnx", "onnx-ir", "onnxscript", "peft", "torch", "transformers")
EXPORTER = "export.onnx.graph"
Export = Callable[..., Any]


def collect_rarely() -> None:
    """Collect garbage less often: each full collection visits all of torch, an eighth of the time of a trace."""
    gc.set_threshold(50_000, 20, 50)


def keep_traces() -> None:
    """Let ``export.onnx.graph.export`` look here first, if it is imported. The real one stays as ``export.real``."""
    graph: Any = sys.modules.get(EXPORTER)
    if graph is not None and not hasattr(graph.export, "real"):
        graph.export = _kept(graph.export)


def keep_later_traces() -> None:
    """Let the exporter look here first, once this process imports it."""
    sys.meta_path.insert(0, _Importer)


class _Importer(PathFinder):
    """Calls ``keep_traces`` as soon as the exporter is imported."""

    @classmethod
    def find_spec(cls, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != EXPORTER or (spec := super().find_spec(fullname, path, target)) is None:
            return None
        loader: Any = spec.loader
        run = loader.exec_module

        def exec_module(module: Any) -> None:
            run(module)
            keep_traces()

        loader.exec_module = exec_module
        return spec


@contextmanager
def traced_anew() -> Iterator[None]:
    """Let torch trace whatever is exported in the block."""
    graph: Any = sys.modules[EXPORTER]
    kept, graph.export = graph.export, graph.export.real
    try:
        yield
    finally:
        graph.export = kept


def _kept(export: Export) -> Export:
    import numpy as np
    import onnx
    from onnx import external_data_helper, numpy_helper

    from export.onnx.tensorstore import INLINE, MEMORY

    def kept(module: Any, example: Any, dynamic: Any, **options: Any) -> Any:
        store, weights = options.get("store", MEMORY), options.get("weights") or {}
        about = example, dynamic, options["inputs"], options["outputs"], type(store).__name__
        file = STORE / _sources() / _key(module, weights, *about)
        if not file.is_file():
            traced = export(module, example, dynamic, **options)
            whole = onnx.ModelProto()
            whole.CopyFrom(traced)
            for tensor in whole.graph.initializer:
                if external_data_helper.uses_external_data(tensor):
                    _exchange(tensor, numpy_helper.from_array(np.array(store.array(tensor)), tensor.name))
            _write(file, whole.SerializeToString())
            return traced
        traced = onnx.load_from_string(file.read_bytes())
        for tensor in traced.graph.initializer:
            if store.folder and (values := numpy_helper.to_array(tensor)).nbytes >= INLINE:
                _exchange(tensor, store.tensor(values, tensor.name))
        return traced

    kept.real = export  # type: ignore[attr-defined]
    return kept


def _exchange(tensor: Any, other: Any) -> None:
    """Give a tensor another's values; a description stays, also an empty one, so that the file has the same bytes."""
    if tensor.HasField("doc_string"):
        other.doc_string = tensor.doc_string
    tensor.CopyFrom(other)


def _write(file: Path, content: bytes) -> None:
    if not file.parent.exists():
        for old in {*STORE.glob("*")} - {file.parent}:  # which another worker may just have made
            shutil.rmtree(old, ignore_errors=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{os.getpid()}")
    unfinished.write_bytes(content)
    unfinished.replace(file)


@cache
def _sources() -> str:
    digest = sha256(repr([version(name) for name in USED]).encode() + Path(__file__).read_bytes())
    for part in ("edgeadapt", "export"):
        for path in sorted((ROOT / part).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _key(module: Any, weights: Any, *about: Any) -> str:
    """Of the module: the class, source, attributes and tensors of each of its parts; ``weights``: of a hollow one."""
    digest = sha256(_described(about).encode())
    for path, part in module.named_modules():
        kind = type(part)
        digest.update(
            f"{path}\0{kind.__module__}.{kind.__qualname__}\0{_source(kind.forward)}\0{part.training}".encode()
        )
        for name, value in sorted(vars(part).items()):
            if not name.startswith(("_parameters", "_buffers", "_modules", "_backward", "_forward", "_state_dict")):
                digest.update(f"{name}={_described(value)}\0".encode())
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        read = weights.get(tensor.data_ptr())
        values = (tensor if read is None else read()).detach().contiguous()
        digest.update(f"{name}\0{tuple(tensor.shape)}\0{tensor.dtype}\0{read is None}\0".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


@cache
def _source(function: Any) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return repr(function)


def _described(value: Any) -> str:
    """A text that is the same for equal values in any process, whatever folder the model is from."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        held = value.detach().contiguous().numpy() if hasattr(value, "detach") else value
        return f"{tuple(value.shape)} {value.dtype} {sha256(held.tobytes()).hexdigest()}"
    if isinstance(value, dict):
        return repr(sorted((repr(key), _described(each)) for key, each in value.items()))
    if isinstance(value, list | tuple):
        return repr([_described(each) for each in value])
    if isinstance(value, set | frozenset):
        return repr(sorted(map(_described, value)))
    return re.sub(rf" at 0x[0-9a-f]+|{re.escape(gettempdir())}/[\w./-]+", "", str(value))


if __name__ == "__main__":
    from edgeadapt import program

    collect_rarely()
    keep_later_traces()
    program.main()
