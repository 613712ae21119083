"""Merge an adapter into its base: for methods of peft that have no slots, or where an adapter shall become the base.

peft opens the adapter and merges it (``merge_and_unload``). What is written is opened again and compared with peft's
answers before. The result is a base of its own: adapters of the previous base have another digest, and do not fit it.
``config.json`` states what was merged, and so does the manifest of a bundle that is exported from it.

A classifier's adapter brings the head, and adapters of the merged base must bring it too. It is therefore written as an
adapter of its own, ``head``, that changes nothing else."""

import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, PeftType, get_peft_model
from peft import __version__ as peft_version
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from aggregation.errors import ConfigError, DataError, one_line
from edgeadapt.bases import pretrained
from edgeadapt.bases.base import MERGED_ADAPTERS, Base, find_base
from edgeadapt.bases.classifiergraph import ENCODER
from edgeadapt.formats.graphinputs import PEFT_PREFIX, in_modules, input_name
from edgeadapt.formats.manifest import Task
from edgeadapt.formats.storage import file_sha256, new_folder
from edgeadapt.methods.peft.config import MERGED, Settings, check_numbers, saved_modules
from edgeadapt.methods.peft.folder import WEIGHTS, read_settings
from export.bundle.base import model_of, usual_task
from export.bundle.sources import TASKS
from export.onnx.calibrate import TEXT, TOKENS
from export.onnx.dequantize import copy_others
from export.onnx.peftmodel import logits_of
from export.onnx.slotted import label_count
from export.onnx.targets import ALL, linear_layers

CONFIG = "config.json"
MODULES = ".modules_to_save."
HEAD = "head"  # a folder in the merged base's
CLOSE = 1e-4  # share of the largest logit: merging rounds each weight once
TOKENIZER_FILES = ("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
Shapes = Mapping[str, tuple[int, ...]]  # shapes in an adapter's file, by peft's names


@dataclass(frozen=True, slots=True)
class Merge:
    base: Base
    peft_type: str
    adapter: str  # SHA-256 of the adapter's file
    error: float  # largest difference to peft's logits, as a share of the largest logit
    head: Path | None  # the folder of the adapter that brings a classifier's head


def merge(base: Base, folder: Path, out: Path) -> Merge:
    """Write the base that answers as ``base`` does with the adapter in a PEFT folder, to a new or empty folder.

    The base is read whole into memory, in float32. If the adapter brings tables of another number of tokens, its
    tokenizer is taken from ``folder`` too. Raises ConfigError: peft cannot merge adapters of this type or cannot open
    this one, the adapter is of another base, or the merged base answers differently."""
    settings = read_settings(folder)
    kind = str(settings.get("peft_type"))
    if kind not in MERGED:
        raise ConfigError(
            f"adapters of the type {kind[:40]!r} cannot be merged into a base; peft merges {', '.join(sorted(MERGED))}",
            about="peft_type",
        )
    if kind not in PeftType.__members__:
        reason = f"the installed peft {peft_version} does not know adapters of the type {kind}: pip install -U peft"
        raise ConfigError(reason, about="peft")
    check_numbers(settings)
    if settings.get("megatron_config"):  # peft would import a module that the file names
        raise ConfigError("the adapter is for Megatron, which is not supported", about="megatron_config")
    shapes = _shapes(folder / WEIGHTS)
    task, saved, labels = _trained_as(base, settings, shapes)
    if task == "text-classification" and labels is None:
        raise ConfigError(
            'the adapter brings no head: train its module in modules_to_save (task_type="SEQ_CLS" does)',
            about="modules_to_save",
        )
    inner = model_of(base, task, mean=_mean(shapes), saved=saved, labels=labels)
    resized = task == "text-generation" and _resize(inner, shapes, folder)
    adapted = _opened(inner, folder, shapes)
    _separate(adapted)
    ids = _sample(folder if resized else base.folder, inner)
    expected, merged = _merged(adapted, ids, folder)
    note = {"peft_type": kind, "sha256": file_sha256(folder / WEIGHTS), "base_digest": base.digest}
    with new_folder(out) as stage:
        _write(merged, base, folder if resized else None, note, stage)
        again = model_of(find_base(str(stage)), task, mean=_mean(shapes), saved=saved, labels=labels)
        if labels is not None:
            again = _with_head(again, merged, saved, stage / HEAD)
        error = float((_logits(again, ids) - expected).abs().max() / expected.abs().max())
        if not error <= CLOSE:
            raise ConfigError(
                f"the merged base does not give peft's logits (off by {error:.0e} of the largest); it is not written",
                about="logits",
            )
    return Merge(find_base(str(out)), kind, note["sha256"], error, out / HEAD if labels is not None else None)


def _shapes(weights: Path) -> Shapes:
    try:
        with safe_open(weights, "np") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise DataError(f"{WEIGHTS} is damaged or truncated: {error}", about=WEIGHTS) from error


def _trained_as(base: Base, settings: Settings, shapes: Shapes) -> tuple[Task, tuple[str, ...], int | None]:
    """Find the task of an adapter, the modules that it brings, and of a classifier the rows of its head."""
    saved, stated = saved_modules(settings), settings.get("task_type")
    task = TASKS.get(stated) if isinstance(stated, str) else None
    task = task or ("text-classification" if _mean(shapes) else usual_task(base))
    if task == "text-generation":
        return task, saved, None
    brought = {input_name(name): shape for name, shape in shapes.items() if in_modules(input_name(name), saved)}
    if _mean(shapes):
        return task, saved, brought.get("classifier.weight", (None,))[0]
    return task, saved, label_count(base, brought) if brought else None


def _mean(shapes: Shapes) -> bool:
    return any(input_name(name).startswith(ENCODER) for name in shapes)


def _resize(model: Any, shapes: Shapes, folder: Path) -> bool:
    """Give the model, in place, as many tokens as the adapter's tables have. Returns whether that changed it. New rows
    are NaN, so that those which the adapter does not bring are found."""
    tables = [path for path, module in model.named_modules() if module in _tables(model)]
    brought = {shape[0] for name, shape in shapes.items() if len(shape) == 2 and _is_table(name, tables)}
    rows = model.get_input_embeddings().weight.shape[0]
    if brought <= {rows}:
        return False
    if len(brought) > 1 or not (folder / "tokenizer.json").is_file():
        raise ConfigError(
            f"the adapter brings tables of {', '.join(map(str, sorted(brought)))} tokens, the base has {rows}: put the "
            "tokenizer of its training (tokenizer.json) into its folder",
            about="tokenizer.json",
        )
    model.resize_token_embeddings(brought.pop(), mean_resizing=False)
    with torch.no_grad():
        for table in _tables(model):
            table.weight[rows:] = torch.nan
    return True


def _tables(model: Any) -> list[Any]:
    owner: Any = next(part for part in model.modules() if hasattr(part, "get_input_embeddings"))
    tables = (owner.get_input_embeddings(), owner.get_output_embeddings())
    return [module for module in tables if module is not None]


def _is_table(name: str, tables: Sequence[str]) -> bool:
    """Whether peft's tensor is the weight of one of these modules, as a module to save or as a copy of the base's."""
    path = input_name(name).removesuffix(".weight").removesuffix(".base_layer")
    return name.endswith(".weight") and path in tables


def _opened(inner: nn.Module, folder: Path, shapes: Shapes) -> PeftModel:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they say is checked below
            model = PeftModel.from_pretrained(inner, folder).eval()
            loaded = model.load_adapter(str(folder), "default")  # once more, for what it says about names
    except Exception as error:  # many classes without a common base
        raise _refusal(folder, error) from error
    state = model.state_dict(keep_vars=True)
    present = {id(value) for name, value in state.items() if name not in loaded.missing_keys}
    missing = {name for name in loaded.missing_keys if id(state[name]) not in present}  # some are shared by layers
    # peft saves a second copy of a table with new tokens, and does not read it.
    copies = {name for name in loaded.unexpected_keys if MODULES in name and name.replace(MODULES, ".") in shapes}
    if odd := sorted(missing | (set(loaded.unexpected_keys) - copies)):
        path = odd[0].removeprefix(PEFT_PREFIX)[:200]
        reason = f"the adapter in {folder} is of another base, or damaged: {path!r} has no counterpart"
        raise ConfigError(reason, about="--peft")
    return model


def _separate(model: PeftModel) -> None:
    """Give each layer weights of its own, in place: a merge into one would change others that share them. Layers that
    peft repeats (``layer_replication``) share theirs, and so do tied tables of which one is adapted."""
    tables, seen = _tables(model), set[nn.Parameter]()
    tied = set() if any(hasattr(table, "base_layer") for table in tables) else {table.weight for table in tables}
    for module in model.modules():
        for name, value in module.named_parameters(recurse=False):
            if value in seen and value not in tied:
                setattr(module, name, nn.Parameter(value.detach().clone(), requires_grad=value.requires_grad))
            seen.add(value)


def _merged(adapted: PeftModel, ids: Tensor, folder: Path) -> tuple[Tensor, Any]:
    """Consumes ``adapted``."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = _logits(adapted, ids)
            model: Any = adapted.merge_and_unload(safe_merge=True).eval()
    except Exception as error:  # many classes without a common base
        raise _refusal(folder, error) from error
    for name, value in model.named_parameters():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise DataError(f"{name} has values that are not finite, or that the adapter does not bring", about=name)
    return expected, model


def _refusal(folder: Path, error: Exception) -> ConfigError:
    reason = one_line(error)
    return ConfigError(f"peft cannot merge the adapter in {folder} into this base: {reason}", about="--peft")


def _sample(tokenizer: Path, model: nn.Module) -> Tensor:
    config: Any = next(part.config for part in model.modules() if hasattr(part, "config"))
    length = min(TOKENS, getattr(config, "max_position_embeddings", None) or TOKENS)
    return torch.tensor([pretrained.tokenizer(Base(tokenizer, "")).encode(TEXT).ids[:length]])


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return logits_of(model(input_ids=ids, attention_mask=torch.ones_like(ids)))


def _write(merged: Any, base: Base, tokenizer: Path | None, note: dict[str, str], stage: Path) -> None:
    model = merged.encoder if hasattr(merged, "classifier") and not hasattr(merged, "config") else merged
    embeddings, output = model.get_input_embeddings(), getattr(model, "get_output_embeddings", lambda: None)()
    if output is not None and output.weight is not embeddings.weight:
        model.config.tie_word_embeddings = False  # the adapter brings one of the two, or both
    model.save_pretrained(stage)
    copy_others(base, stage, CONFIG)
    for file in (file for pattern in TOKENIZER_FILES for file in (tokenizer.glob(pattern) if tokenizer else ())):
        shutil.copyfile(file, stage / file.name)
    config = json.loads((stage / CONFIG).read_text())
    config[MERGED_ADAPTERS] = [*config.get(MERGED_ADAPTERS, []), note]
    (stage / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _with_head(again: Any, merged: Any, saved: Sequence[str], folder: Path) -> PeftModel:
    """Give the written base an adapter that brings the head, which is saved in ``folder``."""
    heads = [name for name in saved if any(path.endswith(name) for path, _ in again.named_modules())]
    brought = {name: value for name, value in merged.state_dict().items() if in_modules(name, heads)}
    again.load_state_dict(brought, strict=False)
    layer = linear_layers(again, [ALL], heads)[0]
    own = hasattr(again, "config")
    lora = LoraConfig(
        r=1, target_modules=[layer], modules_to_save=heads, task_type="SEQ_CLS" if own else None, lora_alpha=1
    )
    adapter = get_peft_model(again, lora).eval()
    with torch.no_grad():
        for name, value in adapter.named_parameters():
            if ".lora_" in name:  # peft draws A; B is 0
                value.zero_()
    adapter.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's, with nothing filled in
    return adapter
