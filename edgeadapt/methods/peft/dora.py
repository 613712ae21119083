"""DoRA (Liu et al. 2024) as slots: ``W' = diag(m / ‖W + s B A‖) (W + s B A)``, with the norm of each output's weights.

With ``d = m / ‖W + s B A‖``, a scale of the output, a layer computes ``(x W + b) d + x A (s d B) + b (1 - d)``: the
scale, B times it, and an offset for the bias, which PEFT does not scale. ``d`` needs the base's weights, so it is
computed when the adapter is exported, and by a training graph at each step."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from aggregation.errors import DataError
from edgeadapt.formats.graphinputs import (
    LORA_A,
    LORA_B,
    OFFSET,
    OUTPUT_SCALE,
    PEFT_PREFIX,
    REPLACED,
    input_name,
    vector_site,
)
from edgeadapt.formats.layout import Floats, Tensors
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.methods.peft.inputs import MAGNITUDE

NormsOf = Callable[[Tensors, Sequence[str]], Mapping[str, Floats]]  # tensors, layers → the norms of their weights


def magnitudes(tensors: Tensors) -> list[str]:
    return sorted(input_name(name).removesuffix(MAGNITUDE) for name in tensors if name.endswith(MAGNITUDE))


def with_scales(tensors: Tensors, norms_of: NormsOf, biases: Mapping[str, Floats]) -> Tensors:
    """Replace the magnitudes of an adapter (``read_peft``) by scales and offsets. ``norms_of``: as ``weight_norms``.
    ``biases``: the base's, of those layers that have one. Raises DataError: an adapter's tensor does not fit the
    base's, or a norm is 0."""
    result = {name: value for name, value in tensors.items() if not name.endswith(MAGNITUDE)}
    paths = magnitudes(tensors)
    norms = norms_of(result, paths) if paths else {}
    for path in paths:
        layer = PEFT_PREFIX + path
        magnitude, norm = tensors[layer + MAGNITUDE], _positive(norms[path], path)
        if magnitude.shape != norm.shape:
            raise DataError(f"{path!r} of the adapter has other sizes than the base's layer", about=path)
        scale = magnitude / norm
        result[layer + LORA_B] = (scale[:, None] * tensors[layer + LORA_B]).astype(np.float32)
        result[layer + OUTPUT_SCALE] = scale[None].astype(np.float32)
        own = tensors.get(f"{layer}.bias{REPLACED}")  # the adapter's replaces the base's
        if (bias := biases.get(path) if own is None else own[0]) is not None:
            result[layer + OFFSET] = (bias * (1 - scale))[None].astype(np.float32)
    return result


def scaled_layers(tensors: Tensors, config: PeftConfig) -> list[str]:
    """Name the paths of the layers that ``with_scales`` gave scales: no other LoRA has any."""
    scaled = [input_name(vector_site(name)) for name in tensors if name.endswith(OUTPUT_SCALE)]
    return sorted(scaled) if config.peft_type == "LORA" else []


def with_magnitudes(tensors: Tensors, config: PeftConfig, norms_of: NormsOf) -> Tensors:
    """Invert ``with_scales``, up to the rounding of float32. An output whose magnitude is 0 loses B, and stays 0.
    ``tensors`` have scales at ``scaled_layers``; ``norms_of`` is as ``weight_norms``."""
    result, scales = dict(tensors), dict[str, Floats]()
    for path in scaled_layers(tensors, config):
        layer = PEFT_PREFIX + path
        scale = scales[path] = result.pop(layer + OUTPUT_SCALE)[0].astype(np.float64)
        result.pop(layer + OFFSET, None)
        result[layer + LORA_B] = (tensors[layer + LORA_B] / np.where(scale == 0, 1, scale)[:, None]).astype(np.float32)
    norms = norms_of(result, list(scales)) if scales else {}
    for path, scale in scales.items():
        result[PEFT_PREFIX + path + MAGNITUDE] = (scale * _positive(norms[path], path)).astype(np.float32)
    return result


def gradients_of_magnitudes(
    gradients: Tensors, tensors: Tensors, norms: Mapping[str, Floats], biases: Mapping[str, Floats]
) -> Tensors:
    """Return the gradients by the tensors of an adapter, from those by what ``with_scales`` makes of ``tensors`` and
    ``biases``. The norm counts as a constant, as PEFT has it (Liu et al. 2024, section 4.3). ``norms``: of the weights
    of each layer with magnitudes, by its path."""
    result = dict(gradients)
    for path in magnitudes(tensors):
        layer = PEFT_PREFIX + path
        by_scale = result.pop(layer + OUTPUT_SCALE)[0]
        by_b, b = gradients[layer + LORA_B], tensors[layer + LORA_B]
        by_scale = by_scale + (by_b * b).sum(axis=1)
        if path in biases:
            by_scale = by_scale - biases[path] * result.pop(layer + OFFSET)[0]
        result[layer + LORA_B] = (tensors[layer + MAGNITUDE] / norms[path])[:, None] * by_b
        result[layer + MAGNITUDE] = by_scale / norms[path]
    return result


def weight_norms(
    tensors: Tensors, paths: Sequence[str], config: PeftConfig, weights: Mapping[str, Floats]
) -> dict[str, Floats]:
    """Return the norm of each output's weights with the update, ``‖W + s B A‖``, shape ``(out,)``, by the layer's path.
    ``tensors``: A and B of each layer, as PEFT has them. ``weights``: the base's, ``(out, in)``, by the path of the
    layer. Raises DataError: an adapter's tensor does not fit the base's."""
    norms = {}
    for path in paths:
        a, b = (tensors[PEFT_PREFIX + path + kind] for kind in (LORA_A, LORA_B))
        weight = weights[path].astype(np.float64)
        if (b.shape[0], a.shape[1]) != weight.shape:
            raise DataError(f"{path!r} of the adapter has other sizes than the base's layer", about=path)
        norms[path] = np.linalg.norm(weight + config.scaling_of(path) * (b.astype(np.float64) @ a), axis=1)
    return norms


def _positive(norm: Floats, path: str) -> Floats:
    if not (norm > 0).all():
        raise DataError(f"{path!r}: with this adapter, an output of the layer has no weights", about=path)
    return norm
