"""Adapters of one kind for every slot of an exported base, and torch with the same change: hooks, and no peft."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from edgeadapt.formats.graphinputs import (
    ACTIVATIONS,
    GIVEN,
    INPUT_SCALE,
    LORA_A,
    LORA_B,
    OFFSET,
    OUTPUT_SCALE,
    PARTS,
    PREFIX,
    PROMPT,
    REPLACED,
    VIRTUAL,
    layer_of,
    vector_site,
)
from edgeadapt.formats.layout import Floats, Tensors
from export.onnx.peftmodel import logits_of
from export.onnx.targets import SlotKind

RANK, TOKENS = 3, 4  # of a low-rank update; virtual tokens
SIZE, VIRTUAL_SIZE = 0.3, 1.0  # standard deviations of what is drawn
ENDS: dict[SlotKind, tuple[str, ...]] = {
    SlotKind.LOW_RANK: (LORA_A, LORA_B),
    SlotKind.SCALE: (OUTPUT_SCALE,),
    SlotKind.INPUT_SCALE: (INPUT_SCALE,),
    SlotKind.OFFSET: (OFFSET,),
    SlotKind.NORMS: (REPLACED,),
    SlotKind.BIASES: (".bias" + REPLACED,),
    SlotKind.PROMPT: (PROMPT,),
    SlotKind.PREFIX: (PREFIX,),
    **{SlotKind(name.replace("_", "-")): tuple(f".{name}_{part}" for part in PARTS) for name in ACTIVATIONS},
}
KINDS = tuple(ENDS)
NEUTRAL = {OUTPUT_SCALE: 1.0, INPUT_SCALE: 1.0}
Slots = Mapping[str, Sequence[str]]


def drawn(slots: Slots, kind: SlotKind, model: nn.Module) -> Tensors:
    """Random values for every slot of a kind, by graph input."""
    rng = np.random.default_rng(len(slots))
    found = {}
    for name, dimensions in slots.items():
        if not name.endswith(ENDS[kind]) or (kind is SlotKind.NORMS and not _of_norm(model, name)):
            continue
        shape = [_size(text) for text in dimensions]
        value = (VIRTUAL_SIZE if name in VIRTUAL else SIZE) * rng.standard_normal(shape, dtype=np.float32)
        if name.endswith(REPLACED):
            value += model.get_parameter(vector_site(name)).detach().numpy()
        found[name] = value + np.float32(next((NEUTRAL[end] for end in NEUTRAL if name.endswith(end)), 0))
    return found


def _of_norm(model: nn.Module, name: str) -> bool:
    weight = getattr(model.get_submodule(layer_of(name)), "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 1


def _size(text: str) -> int:
    return int(text) if text.isdigit() else 1 if text.startswith(GIVEN) else TOKENS if "tokens" in text else RANK


def by_torch(model: Any, given: Tensors, ids: Any, heads: tuple[int, int] = (1, 1), cache: str = "") -> Floats:
    """The logits of a text's own tokens, or of the text, with what an adapter changes.

    Args:
        model: Of transformers.
        given: The adapter's graph inputs.
        ids: Token ids, ``(rows, tokens)``.
        heads: For a prefix: the heads and the width of the KV cache.
        cache: For a prefix: the argument that takes the cache.
    """
    tokens, mask = torch.from_numpy(ids), torch.ones(ids.shape, dtype=torch.int64)
    more: dict[str, Any] = {}
    with torch.no_grad(), _changed(model, given):
        if PROMPT in given:
            embedded = model.get_input_embeddings()(tokens)
            prompt = torch.from_numpy(given[PROMPT]).to(embedded).expand(len(ids), -1, -1)
            text: dict[str, Tensor] = {"inputs_embeds": torch.cat([prompt, embedded], 1)}
        else:
            text = {"input_ids": tokens}
        if PREFIX in given:
            parts = torch.from_numpy(given[PREFIX]).reshape(TOKENS, -1, *heads).permute(1, 2, 0, 3)
            rows = [part.expand(len(ids), -1, -1, -1).clone() for part in parts]
            more = {cache: DynamicCache(zip(rows[::2], rows[1::2], strict=True)), "use_cache": True}
        virtual = TOKENS * bool({PROMPT, PREFIX} & given.keys())
        mask = torch.cat([torch.ones(len(ids), virtual, dtype=torch.int64), mask], 1)
        logits = logits_of(model(**text, attention_mask=mask, **more)).numpy()
    found: Floats = logits[:, -ids.shape[1] :] if logits.ndim == 3 else logits
    return found


@contextmanager
def _changed(model: nn.Module, given: Tensors) -> Iterator[None]:
    hooks, own = [], {}
    layers = {layer_of(name) for name in given if not name.endswith((REPLACED, PROMPT, PREFIX))}
    values = {name: torch.from_numpy(value) for name, value in given.items()}
    for path in sorted(layers):
        kinds = {name.removeprefix(path): value for name, value in values.items() if layer_of(name) == path}
        module = model.get_submodule(path)
        if INPUT_SCALE in kinds:
            hooks.append(module.register_forward_pre_hook(partial(_scaled, kinds)))
        hooks.append(module.register_forward_hook(partial(_updated, kinds)))
    for name in (name for name in given if name.endswith(REPLACED)):
        parameter = model.get_parameter(vector_site(name))
        own[parameter] = parameter.data
        parameter.data = values[name][0].to(parameter)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, value in own.items():
            parameter.data = value


def _scaled(kinds: Mapping[str, Tensor], _layer: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
    return args[0] * kinds[INPUT_SCALE][0].to(args[0])


def _updated(kinds: Mapping[str, Tensor], _layer: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
    changed = [_bottleneck(kinds, name, y) for name in ACTIVATIONS if f".{name}_up" in kinds]
    if OUTPUT_SCALE in kinds:
        y = y * kinds[OUTPUT_SCALE][0].to(y)
    if LORA_A in kinds:
        y = y + args[0] @ kinds[LORA_A].to(y) @ kinds[LORA_B].to(y)
    y = y + kinds[OFFSET][0].to(y) if OFFSET in kinds else y
    return sum(changed, y)


def _bottleneck(kinds: Mapping[str, Tensor], name: str, y: Tensor) -> Tensor:
    down, down_bias, up, up_bias = (kinds[f".{name}_{part}"].to(y) for part in PARTS)
    bent = {"swish": nn.SiLU(), "relu": nn.ReLU(), "gelu": nn.GELU()}[ACTIVATIONS[name]](y @ down + down_bias[0])
    return bent @ up + up_bias[0]
