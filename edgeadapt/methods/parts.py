"""The parts of an adapter, which federated methods train and share apart from each other. A task names the parts that a
device trains in a round, and those whose updates it shares. What is trained and not shared stays on the device
(``client.node.privateparts``)."""

from collections.abc import Collection
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from aggregation.errors import DataError
from edgeadapt.formats.graphinputs import input_name
from edgeadapt.formats.layout import Layout

# In peft's names; virtual tokens have one in a file and another in a model.
VECTORS = (
    ".ia3_l",
    ".beft_bias",
    ".bottleneck_",
    ".ln_tuning_layers.",
    ".lora_magnitude_vector",
    *(f".lora_{factor}" for factor in "ABE"),  # of AdaLoRA, which are parameters; LoRA's are of modules
    ".hada_",
    ".vera_lambda_",
    "prompt_embeddings",
    "prompt_encoder.",
)

HEAD = "classifier"  # path of the head that devices train
FROZEN = ("base_model.vera_A", "base_model.vera_B")


class Part(StrEnum):
    A = "A"  # of LoRA: from a layer's input to the rank
    B = "B"  # of LoRA: from the rank to the layer's output; zero on day one
    # Of other methods: scales, magnitudes, offsets, parameters of normalizations, biases of the base, virtual tokens;
    # and all of AdaLoRA, LoHa and VeRA, of which no federated method trains a factor apart.
    VECTORS = "vectors"
    HEAD = "head"  # modules that are trained in full
    R = "R"  # of Fed-SB, between B and A within a round; no adapter's file has it (``edgeadapt.methods.lorasb``)
    FROZEN = "frozen"  # A and B of VeRA, which all layers share: in an adapter's file, and never trained


PARTS = (Part.A, Part.B, Part.VECTORS, Part.HEAD)  # of an adapter's file, without what is frozen


def part_of(name: str) -> Part:
    """Return the part to which a tensor belongs, by peft's name of it in a file or in its model.

    >>> part_of("base_model.model.encoder.query.lora_A.weight"), part_of("base_model.model.classifier.bias")
    (<Part.A: 'A'>, <Part.HEAD: 'head'>)
    >>> part_of("base_model.model.encoder.query.lora_A"), part_of("base_model.model.encoder.query.lora_A.default")
    (<Part.VECTORS: 'vectors'>, <Part.VECTORS: 'vectors'>)
    """
    of_module = name.endswith((".weight", ".bias"))
    if ".lora_A." in name and of_module:
        return Part.A
    if ".lora_B." in name and of_module:
        return Part.B
    if ".lora_R." in name:
        return Part.R
    if name.startswith(FROZEN):
        return Part.FROZEN
    if is_bias(name):
        return Part.VECTORS
    return Part.VECTORS if any(mark in name for mark in VECTORS) else Part.HEAD


def is_bias(name: str) -> bool:
    """Check for a bias of the base, which PEFT replaces with ``bias="all"`` or ``"lora_only"``."""
    return name.endswith(".bias") and ".lora_B." not in name and not input_name(name).startswith(f"{HEAD}.")


def only(layout: Layout, parts: Collection[Part]) -> Layout:
    """Return the layout of some parts of an adapter. Raises DataError if the adapter has none of them."""
    chosen = tuple(spec for spec in layout.tensors if part_of(spec.name) in parts)
    if not chosen:
        named = ", ".join(sorted(part.value for part in parts))
        raise DataError(f"the adapter has none of the parts {named}: choose another method", about="task.parts")
    return Layout(chosen)


def mask(layout: Layout, parts: Collection[Part]) -> NDArray[np.bool_]:
    """Mark the elements of the flat vector of ``layout`` that belong to ``parts``, shape ``(layout.size,)``."""
    return np.concatenate([np.full(spec.size, part_of(spec.name) in parts) for spec in layout.tensors])
