"""A folder of plain ``peft`` ↔ the tensors and the method of an adapter, so that nobody is locked in.

Reading imports neither torch nor peft and no pickle: ``adapter_config.json`` and ``adapter_model.safetensors``. What
the settings mean is ``peftconfig.py``'s; whether the adapter fits a base is asked when it is exported to one.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, deserialize

from adapters import files
from adapters.files import MAX_ADAPTER
from adapters.layout import Floats, Layout, Tensors
from adapters.ondevice import PEFT_PREFIX, graph_name
from adapters.peft.config import Config, config_of, method_of, saved_modules
from adapters.peft.inputs import LORA, AdapterInputs
from adapters.peftconfig import PeftConfig
from adapters.storage import new_folder, write_files
from aggregation.errors import ConfigError, DataError

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
LABELS = "labels.txt"  # not of peft: the labels of a classifier's head, one a line, in order
MAX_CONFIG = 2**20  # bytes
MAX_NAME = 512  # letters of a tensor's name
EMBEDDING = ".lora_embedding_"  # in the names of what peft adds to an embedding
BF16 = "BF16"
TYPES = {"F32": np.float32, "F16": np.float16, "F64": np.float64, BF16: np.uint16}


@dataclass(frozen=True, slots=True)
class PeftFolder:
    """What a PEFT folder holds. ``base`` is what peft noted as the base's name: a hint, not an identity."""

    peft_config: PeftConfig
    sha256: str  # of adapter_model.safetensors
    base: str | None
    tensors: Tensors = field(repr=False)  # float32, under peft's names


def read_peft(folder: Path) -> PeftFolder:
    """Read a folder that ``save_pretrained`` of a ``PeftModel`` wrote.

    Raises:
        ConfigError: Not a PEFT folder, one with pickled weights only, or an adapter that no graph can express.
        DataError: A file is damaged or too large, a tensor is not finite, or tensors and configuration disagree.
    """
    if not (folder / CONFIG).is_file():
        below = sorted(file.parent.name for file in folder.glob(f"*/{CONFIG}"))  # where peft saves what has a name
        hint = f"; name one of the adapters in it: {', '.join(below)}" if below else ""
        raise ConfigError(f"{folder} is not a PEFT folder: it has no {CONFIG}{hint}")
    if not (folder / WEIGHTS).is_file():
        reason = f"only {PICKLE}, a pickle, which is not read: save it again with safetensors"
        raise ConfigError(f"{folder} has {reason if (folder / PICKLE).exists() else f'no {WEIGHTS}'}")
    config = _config(_read(folder / CONFIG, MAX_CONFIG))
    method = method_of(config)
    blob = _read(folder / WEIGHTS, MAX_ADAPTER)
    tensors = _tensors(blob)
    _check_saved(tensors, saved_modules(config))
    AdapterInputs.of_tensors(method, tensors)
    base = config.get("base_model_name_or_path")
    return PeftFolder(method, files.sha256(blob), base if isinstance(base, str) else None, tensors)


def to_peft(tensors: Tensors, method: PeftConfig, out: Path, base: str | None = None) -> None:
    """Write a folder that ``PeftModel.from_pretrained(model, out)`` opens, with the outputs that the adapter has here.

    Args:
        tensors: All tensors of the adapter, under peft's names: a registry version's, or those of an exported file
            (``adapters.ondevice.from_graph``).
        method: Of the adapter.
        out: A folder that is not there yet, or is empty. It appears whole or not at all.
        base: What peft shall note as the base's name.

    Raises:
        ConfigError: ``out`` holds something.
        DataError: The tensors are not of this method, or not finite.
        OSError: The folder cannot be written; the error names the file.
    """
    found = AdapterInputs.of_tensors(method, tensors)
    ranks = {slot.path: method.rank_of(slot.path) for slot in found.loras}
    config = config_of(method, ranks, [slot.path for slot in found.saved], base)
    contents = {CONFIG: json.dumps(config, indent=2).encode() + b"\n", WEIGHTS: files.encode(tensors)}
    with new_folder(out) as stage:
        write_files(stage, contents)


def _read(path: Path, limit: int) -> bytes:
    if path.stat().st_size > limit:
        raise DataError(f"{path} is above the limit of {limit} bytes")
    return path.read_bytes()


def _config(raw: bytes) -> Config:
    try:
        config = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{CONFIG} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise DataError(f"{CONFIG} is not an object")
    return config


def _tensors(blob: bytes) -> Tensors:
    try:
        rows = deserialize(blob)  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise DataError(f"{WEIGHTS} is damaged or truncated: {error}") from error
    tensors = {name: _floats(name, row["dtype"], row["data"], row["shape"]) for name, row in rows}
    Layout.of(tensors).check(tensors)
    return tensors


def _floats(name: str, kind: str, data: bytes, shape: list[int]) -> Floats:
    if not name.startswith(PEFT_PREFIX) or len(name) > MAX_NAME or kind not in TYPES:
        raise DataError(f"tensor {name[:80]!r} of type {kind} is none that peft saves for an adapter of floats")
    raw = np.frombuffer(data, TYPES[kind]).reshape(shape)
    if kind == BF16:  # the upper half of a float32
        raw = (raw.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):  # too large for float32 becomes infinity, which is refused
        return raw.astype(np.float32)


def _check_saved(tensors: Tensors, saved: tuple[str, ...]) -> None:
    """Refuse tensors that peft stored for another reason than ``modules_to_save``, such as a resized embedding."""
    for name in sorted(map(graph_name, tensors)):
        if EMBEDDING in name:  # said before the copy of the base's table, which peft saves beside it
            raise ConfigError(
                f"tensor {name!r} is of LoRA on an embedding, which cannot be exported: train without it in "
                "target_modules"
            )
    for name in map(graph_name, tensors):
        parts = name.split(".")
        if "base_layer" in parts:
            raise ConfigError(
                f"tensor {name!r} is the base's own, and a base is not changed: save the adapter with "
                "save_pretrained(folder, save_embedding_layers=False)"
            )
        modules = [".".join(parts[:count]) for count in range(1, len(parts))]
        # peft takes every module whose path ends so, in the middle of a word too.
        if LORA not in name and not any(module.endswith(saved) for module in modules):
            raise ConfigError(f"tensor {name!r} belongs to no module in modules_to_save and cannot be exported")
