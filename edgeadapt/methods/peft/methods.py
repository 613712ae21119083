"""The tensors of peft's methods ↔ those that graphs read: LoRA's, and the vectors of ``graphinputs.VECTORS``.

======================================================== =============================================================
peft's name, after the prefix                            becomes
======================================================== =============================================================
``LAYER.ia3_l`` (out, 1)                                 ``LAYER.output_scale`` (1, out)
``LAYER.ia3_l`` (1, in), of a feed-forward layer         ``LAYER.input_scale`` (1, in)
``LAYER.beft_bias`` (1, out)                             ``LAYER.output_offset`` (1, out)
``LAYER.lora_B.bias`` (out), of ``lora_bias``            the same, times the layer's scaling
``NORM.ln_tuning_layers.PARAMETER`` (width)              ``NORM.PARAMETER.replaced`` (1, width)
``MODULE.bias`` (out), of ``bias="all"``, ``lora_only``  ``MODULE.bias.replaced`` (1, out)
======================================================== =============================================================

All of these come back; LoRA's tensors and modules in ``modules_to_save`` keep their names. The matrices of AdaLoRA,
LoHa and VeRA become equal LoRA matrices (``lowrank.py``), and stay so. With virtual tokens, peft does not wrap the
model, so its names lack a part of the prefix. What it saves of P-tuning, and of prefix tuning with a projection, is
what their encoders return; the encoders themselves are not in the folder."""

import numpy as np

from aggregation.errors import ConfigError, DataError
from edgeadapt.formats.graphinputs import (
    BOTTLENECK,
    ENDINGS,
    INPUT_SCALE,
    LORA_A,
    OFFSET,
    OUTPUT_SCALE,
    PEFT_PREFIX,
    PREFIX,
    PROMPT,
    REPLACED,
    VIRTUAL,
    in_modules,
    input_name,
    vector_kind,
    vector_site,
)
from edgeadapt.formats.layout import Floats, Tensors
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.methods.parts import HEAD
from edgeadapt.methods.peft.config import Settings, saved_modules

IA3, BEFT, NORM = ".ia3_l", ".beft_bias", ".ln_tuning_layers."
BIAS, BASE_BIAS, LORA_BIAS = ".bias", ".base_layer.bias", ".lora_B.bias"
COPIES = (".original_module.bias", ".modules_to_save.bias")  # of a head's bias, with bias="all"; peft reads neither
UNWRAPPED, EMBEDDINGS = "base_model.", "prompt_embeddings"  # peft's, with virtual tokens
VIRTUAL_TOKENS = {"PROMPT_TUNING": PROMPT, "P_TUNING": PROMPT, "PREFIX_TUNING": PREFIX}  # peft's type → graph input


def from_peft_tensors(tensors: Tensors, config: PeftConfig, settings: Settings) -> Tensors:
    """Replace peft's own tensors in a PEFT folder by vectors. Other methods than ``config``'s keep their names.

    ``settings`` (``adapter_config.json``) says which biases the adapter replaces or brings. A version in a registry has
    none; there, the configuration says so. Raises DataError: a tensor has a shape that its method does not give it, or
    a name that only a graph's input has."""
    result: Tensors = {}
    bias = settings.get("bias", config.bias)
    saved = saved_modules(settings) if settings else (HEAD,)
    for name, value in tensors.items():
        if bias == "all" and name.endswith(COPIES):
            continue
        if name.endswith(LORA_BIAS):
            replaces = bool(settings.get("lora_bias"))
        else:
            replaces = bias != "none" and name.endswith(BIAS) and not in_modules(input_name(name), saved)
        renamed, changed = _from_peft(name, value, config, replaces)
        result[renamed] = changed
    return result


def to_peft_tensors(tensors: Tensors, config: PeftConfig) -> Tensors:
    """Invert ``from_peft_tensors``, up to the rounding of a layer's scaling. Raises ConfigError for a scale of LoRA's:
    of DoRA, magnitudes come first (``dora.with_magnitudes``)."""
    if any(PEFT_PREFIX + name in tensors for name in VIRTUAL):
        return {_to_unwrapped(name): value for name, value in tensors.items()}
    return dict(_to_peft(name, value, config, tensors) for name, value in tensors.items())


def is_peft_name(name: str, method: str) -> bool:
    """Check whether ``name`` is of the form in which peft names the tensors of ``method``."""
    if method in VIRTUAL_TOKENS:
        return name == EMBEDDINGS or name.startswith(UNWRAPPED)
    return name.startswith(PEFT_PREFIX)


def _from_peft(name: str, value: Floats, config: PeftConfig, bias: bool) -> tuple[str, Floats]:
    method = config.peft_type
    if name.endswith(ENDINGS.get(method.lower(), ())):
        return name, value
    unwrapped = name.removeprefix(UNWRAPPED) if method in VIRTUAL_TOKENS else input_name(name)
    if vector_kind(name) or (unwrapped in VIRTUAL and name != EMBEDDINGS):
        raise DataError(f"tensor {input_name(name)[:80]!r} is not one that peft saves", about=name)
    if method in VIRTUAL_TOKENS:
        return PEFT_PREFIX + (VIRTUAL_TOKENS[method] if name == EMBEDDINGS else unwrapped), value
    if method == "IA3" and name.endswith(IA3):
        if value.ndim != 2 or 1 not in value.shape or value.shape == (1, 1):
            raise _odd(name, value)
        kind = INPUT_SCALE if value.shape[0] == 1 else OUTPUT_SCALE
        return name.removesuffix(IA3) + kind, value.reshape(1, -1)
    if method == "BEFT" and name.endswith(BEFT):
        if value.ndim != 2 or value.shape[0] != 1:
            raise _odd(name, value)
        return name.removesuffix(BEFT) + OFFSET, value
    path, norm, parameter = name.partition(NORM)
    if method == "LN_TUNING" and norm:
        return f"{path}.{parameter}{REPLACED}", _row(name, value)
    if bias and name.endswith(LORA_BIAS):
        layer = name.removesuffix(LORA_BIAS)
        return layer + OFFSET, _row(name, value) * np.float32(config.scaling_of(input_name(layer)))
    if bias:
        layer = name.removesuffix(BASE_BIAS) if name.endswith(BASE_BIAS) else name.removesuffix(BIAS)
        return layer + BIAS + REPLACED, _row(name, value)
    return name, value


def _to_peft(name: str, value: Floats, config: PeftConfig, tensors: Tensors) -> tuple[str, Floats]:
    site, lora = vector_site(name), config.peft_type == "LORA"
    match vector_kind(name):
        case ".output_scale" if not lora:
            return site + IA3, value.reshape(-1, 1)
        case ".input_scale" if not lora:
            return site + IA3, value
        case ".output_offset" if lora:
            factor = config.scaling_of(input_name(site))
            return site + LORA_BIAS, value[0] / np.float32(factor or 1.0)
        case ".output_offset":
            return site + BEFT, value
        case ".replaced" if lora:
            layer = site.removesuffix(BIAS)
            return layer + (BASE_BIAS if layer + LORA_A in tensors else BIAS), value[0]
        case ".replaced":
            path, _, parameter = site.rpartition(".")
            return path + NORM + parameter, value[0]
        case kind if kind is None or kind in BOTTLENECK:
            return name, value
    reason = f"{input_name(site)}: a scale has no place in a LoRA folder of peft; keep the folder that it came from"
    raise ConfigError(reason, about=name)


def _row(name: str, value: Floats) -> Floats:
    if value.ndim != 1:
        raise _odd(name, value)
    return value[np.newaxis]


def _to_unwrapped(name: str) -> str:
    return EMBEDDINGS if input_name(name) in VIRTUAL else UNWRAPPED + input_name(name)


def _odd(name: str, value: Floats) -> DataError:
    return DataError(f"tensor {input_name(name)[:80]!r} is {list(value.shape)}, not one vector", about=name)
