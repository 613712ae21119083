"""A folder of the ``peft`` library ↔ the tensors and the configuration of an adapter. Reading needs neither torch, peft
nor pickle, only ``adapter_config.json`` (``config.py``) and ``adapter_model.safetensors``. Export checks whether the
adapter fits a base."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, deserialize

from aggregation.errors import ConfigError, DataError
from edgeadapt.formats import files
from edgeadapt.formats.files import MAX_ADAPTER
from edgeadapt.formats.graphinputs import INPUT_SCALE, in_modules, input_name, layer_of, virtual_tokens
from edgeadapt.formats.layout import Floats, Layout, Tensors
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.formats.storage import new_folder, read, write_files
from edgeadapt.methods.parts import FROZEN
from edgeadapt.methods.peft import adapterhub
from edgeadapt.methods.peft.config import Settings, config_of, saved_modules, settings_of
from edgeadapt.methods.peft.dora import magnitudes
from edgeadapt.methods.peft.inputs import AdapterInputs, is_saved, lora_paths
from edgeadapt.methods.peft.lowrank import as_lora
from edgeadapt.methods.peft.methods import from_peft_tensors, is_peft_name, to_peft_tensors

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
LABELS = "labels.txt"  # our own addition: the labels of a classifier's head, one a line, in order
MAX_CONFIG = 2**20  # bytes
MAX_NAME = 512  # characters of a tensor's name
EMBEDDING = ".lora_embedding_"  # part of the names of LoRA tensors on an embedding
BF16 = "BF16"
CHOOSING = ("exclude_modules", "layers_to_transform")  # settings that choose among the layers of target_modules
TYPES = {"F32": np.float32, "F16": np.float16, "F64": np.float64, BF16: np.uint16}


@dataclass(frozen=True, slots=True)
class PeftFolder:
    """Holds the content of a PEFT folder. ``base`` is the base's name that peft noted: a hint, not an identity."""

    peft_config: PeftConfig
    sha256: str  # of adapter_model.safetensors
    base: str | None
    task_type: str | None  # such as SEQ_CLS or CAUSAL_LM
    tensors: Tensors = field(repr=False)  # float32, under peft's names; vectors as ``methods`` names them


def read_peft(folder: Path) -> PeftFolder:
    """Read a folder that ``save_pretrained`` of a ``PeftModel``, or AdapterHub's ``save_adapter``, wrote. Raises
    ConfigError: not a PEFT folder, one with pickled weights only, or an adapter that no graph can express; DataError: a
    file is damaged or too large, a tensor is not finite, or tensors and configuration disagree."""
    if (folder / adapterhub.WEIGHTS).is_file():
        return _read_adapterhub(folder)
    settings = read_settings(folder)
    config = config_of(settings)
    blob = read(folder / WEIGHTS, MAX_ADAPTER)
    tensors = from_peft_tensors(_tensors(blob, settings["peft_type"]), config, settings)
    _check_saved(tensors, saved_modules(settings))
    count = virtual_tokens({input_name(name): value for name, value in tensors.items()})
    if count != (stated := settings.get("num_virtual_tokens") or 0):
        reason = f"the adapter has {count} virtual tokens, but {CONFIG} states {stated!r:.40}"
        raise DataError(reason, about="num_virtual_tokens")
    _check_magnitudes(tensors, bool(settings.get("use_dora")))
    inputs = AdapterInputs.of_tensors(*as_lora(config, tensors))
    if not isinstance(settings.get("target_modules"), list) or any(map(settings.get, CHOOSING)):
        config = _with_paths(config, inputs)
    base, task = (_text(settings.get(name)) for name in ("base_model_name_or_path", "task_type"))
    return PeftFolder(config, files.sha256(blob), base, task, tensors)


def _read_adapterhub(folder: Path) -> PeftFolder:
    settings = _settings(read(folder / CONFIG, MAX_CONFIG))
    present = [name for name in (adapterhub.WEIGHTS, adapterhub.HEAD) if (folder / name).exists()]
    blobs = {name: read(folder / name, MAX_ADAPTER) for name in present}
    adapter, head, *_ = (*(_tensors(blob, None, name) for name, blob in blobs.items()), {})
    config, tensors = adapterhub.from_adapterhub(settings.get("config"), adapter, head)
    AdapterInputs.of_tensors(config, tensors)
    task = "SEQ_CLS" if head else None
    return PeftFolder(config, files.sha256(b"".join(blobs.values())), _text(settings.get("model_name")), task, tensors)


def read_settings(folder: Path) -> Settings:
    """Read ``adapter_config.json`` of a folder whose weights are not pickled, as it is. Raises as ``read_peft``."""
    if not (folder / CONFIG).is_file():
        below = sorted(file.parent.name for file in folder.glob(f"*/{CONFIG}"))  # where peft saves named adapters
        hint = f"; name one of the adapters in it: {', '.join(below)}" if below else ""
        raise ConfigError(f"{folder} is not a PEFT folder: it has no {CONFIG}{hint}", about=CONFIG)
    if not (folder / WEIGHTS).is_file():
        for pickle in (PICKLE, adapterhub.PICKLE):
            if (folder / pickle).exists():
                reason = f"{folder} has only {pickle}, a pickle, which is not read: save it again with safetensors"
                raise ConfigError(reason, about=pickle)
        raise ConfigError(f"{folder} has no {WEIGHTS}", about=WEIGHTS)
    return _settings(read(folder / CONFIG, MAX_CONFIG))


def to_peft(tensors: Tensors, config: PeftConfig, out: Path, base: str | None = None) -> None:
    """Write a folder that ``PeftModel.from_pretrained(model, out)`` opens, with the outputs that the adapter has here.

    ``out``: a new or empty folder. It is written atomically. ``base``: the name of the base that peft notes. Raises
    ConfigError: ``out`` is not empty; DataError: the tensors do not match ``config``, or are not finite; OSError: the
    folder cannot be written; the error names the file."""
    inputs = AdapterInputs.of_tensors(*as_lora(config, tensors))
    count = virtual_tokens({input_name(name): value for name, value in tensors.items()})
    stated = settings_of(config, inputs, base, count) | ({"use_dora": True} if magnitudes(tensors) else {})
    settings = json.dumps(stated, indent=2).encode() + b"\n"
    contents = {CONFIG: settings, WEIGHTS: files.encode(to_peft_tensors(tensors, config))}
    with new_folder(out) as stage:
        write_files(stage, contents)


def _with_paths(config: PeftConfig, inputs: AdapterInputs) -> PeftConfig:
    scaled = {layer_of(name) for name in inputs.vectors if name.endswith(INPUT_SCALE)}
    feedforward = tuple(sorted(scaled)) if config.feedforward_modules else ()
    paths = {slot.path for slot in inputs.loras} or set(map(layer_of, inputs.vectors))
    return replace(config, target_modules=tuple(sorted(paths)), feedforward_modules=feedforward)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _settings(raw: bytes) -> Settings:
    try:
        settings = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{CONFIG} is not JSON: {error}", about=CONFIG) from error
    if not isinstance(settings, dict):
        raise DataError(f"{CONFIG} is not an object", about=CONFIG)
    return settings


def _tensors(blob: bytes, method: str | None, file: str = WEIGHTS) -> Tensors:
    try:
        rows = deserialize(blob)  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise DataError(f"{file} is damaged or truncated: {error}", about=file) from error
    known = FROZEN if method else [name for name, _ in rows]
    odd = [(name, row["dtype"]) for name, row in rows if not (name in known or is_peft_name(name, method or ""))]
    if odd:
        raise _odd(*odd[0])
    tensors = {name: _floats(name, row["dtype"], row["data"], row["shape"]) for name, row in rows}
    Layout.of(tensors).check(tensors)
    return tensors


def _floats(name: str, kind: str, data: bytes, shape: list[int]) -> Floats:
    if len(name) > MAX_NAME or kind not in TYPES:
        raise _odd(name, kind)
    raw = np.frombuffer(data, TYPES[kind]).reshape(shape)
    if kind == BF16:  # the upper half of a float32
        raw = (raw.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinity, which is refused
        return raw.astype(np.float32)


def _odd(name: str, kind: str) -> DataError:
    reason = f"tensor {name[:80]!r} of type {kind} is not one that peft saves for an adapter of floats"
    return DataError(reason, about=name[:80])


def _check_saved(tensors: Tensors, saved: tuple[str, ...]) -> None:
    """Check that peft saved tensors for ``modules_to_save`` only, not such as a resized embedding."""
    names = sorted(map(input_name, tensors))
    for name in names:
        if EMBEDDING in name:  # before the embedding itself, which peft saves too and which is refused below
            reason = f"tensor {name!r} is of LoRA on an embedding, which cannot be exported: train without it in "
            reason += "target_modules, or merge the adapter into its base with 'edgeadapt base merge'"
            raise ConfigError(reason, about=name)
    for name in names:
        if "base_layer" in name.split("."):
            reason = f"tensor {name!r} is a copy of the base's, and a base is not changed: save the adapter with "
            reason += "save_pretrained(folder, save_embedding_layers=False)"
            raise ConfigError(reason, about=name)
        if is_saved(name) and not in_modules(name, saved):
            reason = f"tensor {name!r} belongs to no module in modules_to_save and cannot be exported"
            raise ConfigError(reason, about=name)


def _check_magnitudes(tensors: Tensors, dora: bool) -> None:
    """Check that peft would read the magnitudes, and that DoRA's layers have some."""
    layers = magnitudes(tensors)
    if layers and not dora:
        reason = f"{layers[0]!r} has magnitudes, and adapter_config.json does not say use_dora: the adapter is damaged"
        raise DataError(reason, about=layers[0])
    if dora and (lacking := sorted(lora_paths(map(input_name, tensors)).symmetric_difference(layers))):
        reason = f"{lacking[0]!r} lacks either its magnitudes or its matrices, and use_dora needs both"
        raise ConfigError(reason, about="use_dora")
