"""The tensors of an adapter as inputs of an exported graph, and the slots that they fill.

A layer with every kind of slot computes::

    h = base(x * input_scale)
    y = h * output_scale + (x @ A) @ B + offset + f(h @ down + down_bias) @ up + up_bias

``base`` is the frozen layer with its bias. A has the shape ``(in, rank)`` and B ``(rank, out)``, with the layer's
scaling folded in; both are peft's tensors transposed. The three vectors have the shape ``(given, width)``: ``given``
is 1, or 0 for an adapter that lacks the vector. What is absent changes nothing: the graph then takes a scale of 1 and
an offset of 0 (docs/decisions/0013-slots-and-composition.md). The last term is a bottleneck adapter: ``(out, rank)``,
``(1, rank)``, ``(rank, out)`` and a vector, with f one of ``ACTIVATIONS``. At a normalization N that reads s, it is
``N(s + bottleneck(N(s)))``. A further kind of vector replaces a vector among the base's parameters, such as a bias or
the weight of a normalization. Modules in ``modules_to_save`` keep their shapes.

The whole base has two more slots: embeddings of virtual tokens before a text, ``(virtual tokens, width)``, and their
keys and values in every layer, ``(virtual tokens, layers * 2 * heads * width)`` (docs/decisions/0023)."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from aggregation.errors import DataError
from edgeadapt.formats.layout import Floats, Layout, Tensors

PEFT_PREFIX = "base_model.model."  # peft puts it before every name of the base's module tree
LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"
OUTPUT_SCALE, INPUT_SCALE, OFFSET = ".output_scale", ".input_scale", ".output_offset"  # follow the path of a layer
SCALES = (OUTPUT_SCALE, INPUT_SCALE)
REPLACED = ".replaced"  # follows the name of a parameter
ACTIVATIONS = {"bottleneck": "swish", "bottleneck_relu": "relu", "bottleneck_gelu": "gelu"}  # method → f
PARTS = ("down", "down_bias", "up", "up_bias")  # of a bottleneck adapter
ENDINGS = {method: tuple(f".{method}_{part}" for part in PARTS) for method in ACTIVATIONS}
DOWN, DOWN_BIAS, UP, UP_BIAS = zip(*ENDINGS.values(), strict=True)
BOTTLENECK = (*DOWN, *DOWN_BIAS, *UP, *UP_BIAS)
BY_COLUMN, BY_ROW = (LORA_A, *DOWN, *DOWN_BIAS), (LORA_B, *UP)  # end what has a column, or a row, for each rank
RANKED = (*BY_COLUMN, *BY_ROW)
VECTORS = (*SCALES, OFFSET, REPLACED, *UP_BIAS)
GIVEN = "given_"  # prefix of the symbolic dimension of a vector: 1, or 0 for an adapter that lacks it
PROMPT, PREFIX = "prompt_embeddings", "prefix_key_values"  # of virtual tokens, a row for each
VIRTUAL = {PROMPT: "prompt_tokens", PREFIX: "prefix_tokens"}  # graph input → the symbolic dimension of its rows


def to_inputs(tensors: Tensors, scaling: Mapping[str, float]) -> Tensors:
    """Return an adapter's graph inputs, from its tensors under peft's names and the factor of each layer by its path.

    >>> a, b = np.ones((2, 3), np.float32), np.ones((5, 2), np.float32)
    >>> peft = {"base_model.model.q.lora_A.weight": a, "base_model.model.q.lora_B.weight": b}
    >>> {name: value.shape for name, value in to_inputs(peft, {"q": 2.0}).items()}
    {'q.lora_A.weight': (3, 2), 'q.lora_B.weight': (2, 5)}
    """
    return {input_name(name): _transposed(input_name(name), value, scaling) for name, value in tensors.items()}


def from_inputs(inputs: Tensors, scaling: Mapping[str, float]) -> Tensors:
    """Return the tensors in peft's names and shapes: ``from_inputs(to_inputs(t, s), s) == t`` up to rounding."""
    inverse = {path: 1 / factor if factor else 1.0 for path, factor in scaling.items()}
    return {PEFT_PREFIX + name: _transposed(name, value, inverse) for name, value in inputs.items()}


def gradients_of_tensors(gradients: Tensors, scaling: Mapping[str, float]) -> Tensors:
    """Turn gradients by the graph inputs of ``to_inputs`` into those by the tensors under peft's names. ``to_inputs``
    transposes, and multiplies B by the scaling; so does the chain rule."""
    return {PEFT_PREFIX + name: _transposed(name, value, scaling) for name, value in gradients.items()}


def input_name(peft_name: str) -> str:
    """Return the graph input for the tensor that peft calls ``peft_name``.

    >>> input_name("base_model.model.encoder.query.lora_A.weight")
    'encoder.query.lora_A.weight'
    """
    return peft_name.removeprefix(PEFT_PREFIX)


def layout_of(inputs: Tensors) -> Layout:
    """Return the layout, in peft's names and shapes, of the tensors of which these are the graph inputs."""
    return Layout.of({PEFT_PREFIX + name: value.T if _is_lora(name) else value for name, value in inputs.items()})


def vector_kind(name: str) -> str | None:
    """Return the kind of vector, or the part of a bottleneck adapter, that a graph input takes; None for any other.

    >>> vector_kind("encoder.key.output_scale"), vector_kind("encoder.key.lora_A.weight")
    ('.output_scale', None)
    """
    return next((kind for kind in (*VECTORS, *BOTTLENECK) if name.endswith(kind)), None)


def vector_site(name: str) -> str:
    """Return the layer at which the vector ``name`` is, or the parameter that it replaces.

    >>> vector_site("encoder.norm.weight.replaced")
    'encoder.norm.weight'
    """
    return name.removesuffix(vector_kind(name) or "")


def bottleneck_of(name: str) -> str:
    """Return the layer and method of a part of a bottleneck adapter.

    >>> bottleneck_of("encoder.dense.bottleneck_relu_down_bias")
    'encoder.dense.bottleneck_relu'
    """
    return name.removesuffix("_bias").removesuffix("_down").removesuffix("_up")


def dimensions_of(name: str, number: int, width: int) -> tuple[str, str]:
    """Return the dimensions of the slot for a vector, the base's ``number``, or for a part of a bottleneck adapter.

    >>> dimensions_of("query.output_scale", 3, 64), dimensions_of("query.bottleneck_up", 4, 64)
    (('given_3', '64'), ('rank_query_bottleneck', '64'))
    """
    rank = f"rank_{bottleneck_of(name)}".replace(".", "_")
    if name.endswith(BY_COLUMN):
        return "1" if name.endswith(DOWN_BIAS) else str(width), rank
    return rank if name.endswith(BY_ROW) else f"{GIVEN}{number}", str(width)


def layer_of(name: str) -> str:
    """Return the layer or normalization at which the vector or the LoRA matrix ``name`` is.

    >>> layer_of("encoder.norm.weight.replaced"), layer_of("encoder.key.lora_A.weight")
    ('encoder.norm', 'encoder.key')
    """
    site = vector_site(name)
    return site.rpartition(".")[0] if name.endswith(REPLACED) else site.removesuffix(LORA_A).removesuffix(LORA_B)


def virtual_tokens(inputs: Tensors) -> int:
    return sum(len(inputs[name]) for name in VIRTUAL if name in inputs)


def empty_inputs(slots: Mapping[str, Sequence[str]]) -> Tensors:
    """Make inputs that change nothing: of rank 0, and absent vectors. ``slots``: as a base's manifest states them."""
    shapes = {name: [int(size) if size.isdigit() else 0 for size in sizes] for name, sizes in slots.items()}
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


def with_placeholders(tokens: Sequence[int], count: int) -> list[int]:
    """Put placeholders of ``count`` virtual tokens, which no graph reads, before a language model's prompt. They repeat
    its first token: samplers that penalize a prompt's tokens must find none that is not in it."""
    return [*([tokens[0]] * count), *tokens]


def check_slots(inputs: Tensors, slots: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Check that an adapter fills exactly the slots of a graph; return the size of each symbol.

    >>> check_slots({"A": np.ones((6, 2), np.float32)}, {"A": ("6", "rank_0")})
    {'rank_0': 2}

    ``inputs``: the adapter's tensors by graph input. ``slots``: the dimensions of each graph input: digits for a fixed
    size, or a symbol for one size everywhere. Raises DataError: a tensor is missing, unknown or of a shape that the
    graph does not take, or a vector is there more than once; about the tensor."""
    if odd := sorted(set(inputs).symmetric_difference(slots)):
        reason = f"tensor {odd[0]!r} is missing from the adapter or has no slot in the base's graph"
        raise DataError(reason, about=odd[0])
    sizes: dict[str, int] = {}
    for name, dimensions in slots.items():
        shape = inputs[name].shape
        fits = len(shape) == len(dimensions) and all(
            size == (int(text) if text.isdigit() else sizes.setdefault(text, size))
            for text, size in zip(dimensions, shape, strict=True)
        )
        fits = fits and not (dimensions[0].startswith(GIVEN) and shape[0] > 1)
        if not fits:
            reason = f"tensor {name!r} is {list(shape)}, its slot takes [{', '.join(dimensions)}]"
            raise DataError(reason, about=name)
    return sizes


def _is_lora(name: str) -> bool:
    return name.endswith((LORA_A, LORA_B))


def _transposed(name: str, value: Floats, scaling: Mapping[str, float]) -> Floats:
    if not _is_lora(name):
        return value
    factor = scaling[name.removesuffix(LORA_B)] if name.endswith(LORA_B) else 1.0
    return np.ascontiguousarray(value.T) * np.float32(factor)


def in_modules(name: str, saved: Iterable[str]) -> bool:
    """Check whether a parameter belongs to a module that ``saved``, peft's ``modules_to_save``, names.

    Peft matches every module whose path ends with a name, even in the middle of a word.

    >>> in_modules("pre_classifier.weight", ["classifier"])
    True
    """
    parts, ends = name.split("."), tuple(saved)
    return any(".".join(parts[:count]).endswith(ends) for count in range(1, len(parts)))
