"""Methods of peft whose update of a layer is a matrix of low rank whatever is read, as equal LoRA matrices.

=========== ============================================================ ==========================================
AdaLoRA     ``ΔW = s/(r + 1e-5) B diag(E) A`` (Zhang et al. 2023)        ``A' = diag(E) A``
LoHa        ``ΔW = s (B₁A₁) ∘ (B₂A₂)`` (Hyeon-Woo et al. 2022)           rank r²: products of rows and of columns
VeRA        ``ΔW = diag(b) B diag(d) A`` (Kopiczko et al. 2024)          B and A are shared by all layers
=========== ============================================================ ==========================================

They are trained and stored as peft has them, and become LoRA for a graph. The factor of each layer is in B, so every
layer has the scaling 1. The update is equal up to the rounding of float32."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from aggregation.errors import ConfigError, DataError
from edgeadapt.formats.graphinputs import LORA_A, LORA_B, PEFT_PREFIX, input_name
from edgeadapt.formats.layout import Floats, Tensors
from edgeadapt.formats.peftconfig import MAX_RANK, Method, PeftConfig, exactly
from edgeadapt.methods.parts import FROZEN

Pair = tuple[Floats, Floats]  # A of shape (rank, in), B of shape (out, rank)
FACTORS: Mapping[Method, tuple[str, ...]] = {
    "ADALORA": (".lora_A", ".lora_B", ".lora_E"),
    "LOHA": (".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b"),
    "VERA": (".vera_lambda_b", ".vera_lambda_d"),
}
EPSILON = 1e-5  # that peft adds to AdaLoRA's rank


def as_lora(config: PeftConfig, tensors: Tensors) -> tuple[PeftConfig, Tensors]:
    """Return LoRA's configuration and tensors with the same updates; other tensors keep their names and values.

    A configuration whose method is not one of ``FACTORS`` is returned as it is. Tensors have peft's names. Raises
    ConfigError: a rank is above ``MAX_RANK``, rank or alpha is 0, or the adapter lacks what all layers share;
    DataError: a layer lacks a tensor, two do not fit together, or a rank is not that of the configuration."""
    method = config.peft_type
    if (parts := FACTORS.get(method)) is None:
        return config, tensors
    layers = sorted({name.removesuffix(part) for name in tensors for part in parts if name.endswith(part)})
    convert = _converter(config, tensors)
    result = {n: v for n, v in tensors.items() if not n.endswith(parts) and n not in FROZEN}
    ranks: dict[str, int] = {}
    for layer in layers:
        values = [tensors.get(layer + part) for part in parts]
        try:
            own, a, b = convert(input_name(layer), *values)
            fits = a.ndim == b.ndim == 2 and a.shape[0] == b.shape[1] > 0
        except (ValueError, IndexError, TypeError, AttributeError):  # of numpy: a value is missing or of another shape
            fits = False
        if not fits:
            text = f"{input_name(layer)!r} does not have tensors of {method} that fit together: the adapter is damaged"
            raise DataError(text, about=input_name(layer))
        if own != (stated := config.rank_of(input_name(layer))):
            reason = f"{input_name(layer)!r} has rank {own}, but the adapter's configuration says {stated}"
            raise DataError(reason, about=input_name(layer))
        if (rank := a.shape[0]) > MAX_RANK:
            raise ConfigError(
                f"{input_name(layer)}: {method} of this rank is LoRA of rank {rank}, above {MAX_RANK}; train it with a "
                "lower rank",
                about="r",
            )
        result |= {layer + LORA_A: a, layer + LORA_B: b}
        ranks[input_name(layer)] = rank
    return plain(ranks), result


def factor_shapes(config: PeftConfig, sizes: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors of an adapter of one of ``FACTORS``, under peft's names. ``sizes`` has inputs
    and outputs of each layer, by its path."""
    result: dict[str, tuple[int, ...]] = {}
    for path, (width, out) in sizes.items():
        rank = config.rank_of(path)
        a, b = (rank, width), (out, rank)
        shapes = {"ADALORA": (a, b, (rank, 1)), "LOHA": (b, a, b, a), "VERA": ((out,), (rank,))}[config.peft_type]
        result |= zip((PEFT_PREFIX + path + part for part in FACTORS[config.peft_type]), shapes, strict=True)
    if config.peft_type == "VERA":
        widest, most = map(max, zip(*sizes.values(), strict=True))
        result |= zip(FROZEN, ((config.r, widest), (most, config.r)), strict=True)
    return result


def gradients_of_factors(gradients: Tensors, config: PeftConfig, tensors: Tensors) -> Tensors:
    """Turn the gradients by what ``as_lora`` returns into those by peft's own tensors; what is frozen has none.
    ``gradients`` are by LoRA's matrices and the adapter's other tensors, under peft's names; ``config`` and ``tensors``
    are the arguments of ``as_lora``."""
    if (parts := FACTORS.get(config.peft_type)) is None:
        return gradients
    result = {name: value for name, value in gradients.items() if not name.endswith((LORA_A, LORA_B))}
    for layer in (name.removesuffix(LORA_A) for name in gradients if name.endswith(LORA_A)):
        by_a, by_b = gradients[layer + LORA_A], gradients[layer + LORA_B]
        values = [tensors[layer + part] for part in parts]
        match config.peft_type:
            case "ADALORA":
                changed = _by_adalora(config.lora_alpha / (config.r + EPSILON), by_a, by_b, *values)
            case "LOHA":
                changed = _by_loha(config.scaling_of(input_name(layer)), by_a, by_b, *values)
            case _:
                a, b = (tensors[name] for name in FROZEN)
                changed = (by_b * b[: len(by_b)]).sum(axis=1), (by_a * a[:, : by_a.shape[1]]).sum(axis=1)
        result |= zip((layer + part for part in parts), changed, strict=True)
    return result


def trimmed(tensors: Tensors, slots: Mapping[str, Sequence[str]]) -> Tensors:
    """Remove the columns of a shared A (VeRA) that a layer does not read. ``tensors`` come from ``as_lora``; ``slots``
    has the base's graph inputs, with dimensions as text: A's slot is as long as what its layer reads."""
    shared = [name for name in tensors if name.endswith(LORA_A) and input_name(name) in slots]
    return tensors | {name: tensors[name][:, : int(slots[input_name(name)][0])] for name in shared}


def plain(ranks: dict[str, int]) -> PeftConfig:
    rank = max(ranks.values(), default=1)
    pairs = tuple((exactly(path), size) for path, size in ranks.items() if size != rank)
    return PeftConfig("LORA", rank, rank, tuple(ranks), pairs, pairs)


def _converter(config: PeftConfig, tensors: Tensors) -> Callable[..., tuple[int, Floats, Floats]]:
    """Return the function from path and tensors of a layer to its own rank, and A and B of LoRA."""
    if config.peft_type == "LOHA":
        return lambda path, *parts: (len(parts[1]), *_loha(config.scaling_of(path), *parts))
    if config.peft_type == "ADALORA":
        start, alpha = config.r, config.lora_alpha
        if start < 1 or alpha <= 0:
            raise ConfigError("AdaLoRA needs init_r and lora_alpha above 0", about="lora_alpha")
        return lambda path, *parts: (len(parts[2]), *_adalora(alpha / (start + EPSILON), *parts))
    a, b = (tensors.get(name) for name in FROZEN)
    if a is None or b is None:
        reason = "the adapter lacks the matrices that all layers of VeRA share: save it with save_projection=True"
        raise ConfigError(reason, about="save_projection")
    return lambda path, *parts: (len(parts[1]), *_vera(a, b, *parts))


def _adalora(factor: float, a: Floats, b: Floats, e: Floats) -> Pair:
    return a * e.reshape(-1, 1), b * np.float32(factor)


def _by_adalora(factor: float, by_a: Floats, by_b: Floats, a: Floats, b: Floats, e: Floats) -> tuple[Floats, ...]:
    return by_a * e, by_b * np.float32(factor), (by_a * a).sum(axis=1, keepdims=True)


def _by_loha(
    factor: float, by_a: Floats, by_b: Floats, b1: Floats, a1: Floats, b2: Floats, a2: Floats
) -> tuple[Floats, ...]:
    """Return the gradients by the factors of the products that ``_loha`` makes."""
    rows = by_a.reshape(len(a1), len(a2), -1)
    columns = by_b.reshape(-1, len(a1), len(a2)) * np.float32(factor)
    return (
        (columns * b2[:, None]).sum(axis=2),
        (rows * a2).sum(axis=1),
        (columns * b1[:, :, None]).sum(axis=1),
        (rows * a1[:, None]).sum(axis=0),
    )


def _loha(factor: float, b1: Floats, a1: Floats, b2: Floats, a2: Floats) -> Pair:
    """Multiply each row of A₁ by each of A₂ for the rows of A; likewise the columns of B₁ and B₂ for B."""
    rank = a1.shape[0] * a2.shape[0]
    if rank > MAX_RANK:
        return np.empty((rank, 1), np.float32), np.empty((1, rank), np.float32)
    a = (a1[:, None] * a2[None]).reshape(rank, a1.shape[1])
    b = (b1[:, :, None] * b2[:, None]).reshape(b1.shape[0], rank)
    return a, b * np.float32(factor)


def _vera(a: Floats, b: Floats, lambda_b: Floats, lambda_d: Floats) -> Pair:
    """Scale A, which has the width of the widest layer: ``trimmed`` makes it as narrow as a layer is."""
    return a * lambda_d[:, None], b[: len(lambda_b)] * lambda_b[:, None]
