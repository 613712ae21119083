"""DoRA (Liu et al. 2024) as slots: ``W' = diag(m / ‖W + s B A‖) (W + s B A)``, with the norm of each output's weights.

With ``d = m / ‖W + s B A‖``, a scale of the output, a layer computes ``(x W + b) d + x A (s d B) + b (1 - d)``: the
scale, B times it, and an offset for the bias, which PEFT does not scale. ``d`` needs the base's weights, so it is
computed when the adapter is exported.
"""

from collections.abc import Mapping

import numpy as np

from adapters.graphinputs import LORA_A, LORA_B, OFFSET, OUTPUT_SCALE, PEFT_PREFIX, REPLACED, input_name, vector_site
from adapters.layout import Floats, Tensors
from adapters.peft.inputs import MAGNITUDE
from adapters.peftconfig import PeftConfig
from aggregation.errors import DataError


def magnitudes(tensors: Tensors) -> list[str]:
    """The paths of the layers of which an adapter has magnitudes."""
    return sorted(input_name(name).removesuffix(MAGNITUDE) for name in tensors if name.endswith(MAGNITUDE))


def with_scales(
    tensors: Tensors, config: PeftConfig, weights: Mapping[str, Floats], biases: Mapping[str, Floats]
) -> Tensors:
    """The tensors of an adapter, with scales and offsets in the place of magnitudes.

    Args:
        tensors: As ``read_peft`` returns them.
        config: The adapter's.
        weights: The base's, ``(out, in)``, of each layer that has magnitudes, by its path.
        biases: The base's, of those that have one.

    Raises:
        DataError: An adapter's tensor does not fit the base's, or a norm is 0.
    """
    result = {name: value for name, value in tensors.items() if not name.endswith(MAGNITUDE)}
    for name, magnitude in tensors.items():
        if not name.endswith(MAGNITUDE):
            continue
        layer = name.removesuffix(MAGNITUDE)
        path = input_name(layer)
        b, norm = (
            tensors[layer + LORA_B],
            _norm(path, tensors[layer + LORA_A], tensors[layer + LORA_B], config, weights),
        )
        if magnitude.shape != norm.shape:
            raise DataError(f"{path!r} of the adapter has other sizes than the base's layer", about=path)
        scale = magnitude / norm
        result[layer + LORA_B] = (scale[:, None] * b).astype(np.float32)
        result[layer + OUTPUT_SCALE] = scale[None].astype(np.float32)
        own = tensors.get(f"{layer}.bias{REPLACED}")  # the adapter's, in the place of the base's
        if (bias := biases.get(path) if own is None else own[0]) is not None:
            result[layer + OFFSET] = (bias * (1 - scale))[None].astype(np.float32)
    return result


def scaled_layers(tensors: Tensors, config: PeftConfig) -> list[str]:
    """The paths of the layers that ``with_scales`` gave scales: no other LoRA has any."""
    scaled = [input_name(vector_site(name)) for name in tensors if name.endswith(OUTPUT_SCALE)]
    return sorted(scaled) if config.peft_type == "LORA" else []


def with_magnitudes(tensors: Tensors, config: PeftConfig, weights: Mapping[str, Floats]) -> Tensors:
    """The inverse of ``with_scales``, up to the rounding of float32.

    Of an output whose magnitude is 0, B is lost; whatever it is, the output is 0.

    Args:
        tensors: Of an adapter with scales at ``scaled_layers``.
        config: The adapter's.
        weights: As for ``with_scales``.

    Raises:
        DataError: As ``with_scales``.
    """
    result = dict(tensors)
    for path in scaled_layers(tensors, config):
        layer = PEFT_PREFIX + path
        scale = result.pop(layer + OUTPUT_SCALE)[0].astype(np.float64)
        result.pop(layer + OFFSET, None)
        b = (tensors[layer + LORA_B] / np.where(scale == 0, 1, scale)[:, None]).astype(np.float32)
        result[layer + LORA_B] = b
        magnitude = scale * _norm(path, tensors[layer + LORA_A], b, config, weights)
        result[layer + MAGNITUDE] = magnitude.astype(np.float32)
    return result


def _norm(path: str, a: Floats, b: Floats, config: PeftConfig, weights: Mapping[str, Floats]) -> Floats:
    """The norm of each output's weights with the update: ``‖W + s B A‖``, of shape ``(out,)``."""
    weight = weights[path].astype(np.float64)
    if (b.shape[0], a.shape[1]) != weight.shape:
        raise DataError(f"{path!r} of the adapter has other sizes than the base's layer", about=path)
    norm: Floats = np.linalg.norm(weight + config.scaling_of(path) * (b.astype(np.float64) @ a), axis=1)
    if not (norm > 0).all():
        raise DataError(f"{path!r}: with this adapter, an output of the layer has no weights", about=path)
    return norm
