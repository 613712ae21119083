"""Fed-SB: LoRA of which only a square matrix between the factors is trained (Singhal et al. 2025, after LoRA-SB).

In a round, a layer computes W x + scaling · (B + F R) A x: A and B are those of the adapter on offer, F is a frozen
matrix that everybody can compute, and R, of shape ``(rank, rank)``, is zero at first and all that is trained. The mean
of R over devices is therefore exact, and so is its product with F, which the coordinator adds to B. So an adapter in a
registry or a bundle is an ordinary LoRA adapter. R exists within a round only, under the name of its layer's B with
``lora_R`` instead of ``lora_B``.

The papers take the factors from a singular value decomposition of a first gradient. Here A is the adapter's, which the
vendor chooses, and F is random, as in VeRA (Kopiczko et al. 2024): see docs/decisions/0040-fed-sb.md."""

import hashlib
import math

import numpy as np

from aggregation.errors import DataError
from aggregation.keystream import Keystream
from edgeadapt.formats.layout import Floats, Layout, Tensors, TensorSpec
from edgeadapt.methods.parts import Part, part_of


def with_squares(layout: Layout) -> Layout:
    """Add R of each LoRA layer to an adapter's layout. Raises DataError where R would be larger than B."""
    squares = []
    for spec in layout.tensors:
        if part_of(spec.name) is Part.B:
            outputs, rank = spec.shape
            if rank > outputs:
                reason = f"{spec.name!r} has rank {rank}, above its {outputs} outputs: method fedsb needs a lower one"
                raise DataError(reason, about=spec.name)
            squares.append(TensorSpec(square_name(spec.name), (rank, rank)))
    return Layout(tuple(sorted((*layout.tensors, *squares), key=lambda spec: spec.name)))


def unfolded(tensors: Tensors) -> Tensors:
    """Add R = 0 of each LoRA layer. Law: ``folded(unfolded(t), limit)`` equals ``t`` within the limit."""
    ranks = {name: tensor.shape[1] for name, tensor in tensors.items() if part_of(name) is Part.B}
    return tensors | {square_name(name): np.zeros((rank, rank), np.float32) for name, rank in ranks.items()}


def folded(tensors: Tensors, limit: float = math.inf) -> Tensors:
    """Fold R into B, which becomes B + F R, clipped to ``limit`` in absolute value; without R, nothing changes.
    Guarantee: equal arguments give equal bits on every machine, in float32."""
    squares = {name for name in tensors if part_of(name) is Part.R}
    result = {name: value for name, value in tensors.items() if name not in squares}
    for name in result.keys() & {name.replace(".lora_R.", ".lora_B.") for name in squares}:
        before, square = result[name], tensors[square_name(name)]
        frozen, after = frozen_factor(name, before.shape), before.astype(np.float64)
        for column, row in zip(frozen.T, square, strict=True):  # in a fixed order, unlike a matrix product
            after += column[:, None].astype(np.float64) * row
        result[name] = np.clip(after, -limit, limit).astype(np.float32)
    return result


def frozen_factor(name: str, shape: tuple[int, ...]) -> Floats:
    """Return F of the layer whose B has ``name`` and ``shape``: random signs over √rank, the same on every machine.
    Columns of random signs are nearly orthogonal (Achlioptas 2003). Divided so, a step of AdamW on R moves an entry of
    B as far as one on B itself, so that learning rates, noise and clip norm mean what they mean for LoRA."""
    key = hashlib.sha256(b"edgeadapt/fed-sb/1\x00" + f"{name} {shape[0]} {shape[1]}".encode()).digest()
    drawn = np.empty(shape, np.uint8)
    Keystream(key).read_into(drawn.data.cast("B"))
    return (np.where(drawn & 1, 1.0, -1.0) / math.sqrt(shape[1])).astype(np.float32)


def square_name(name: str) -> str:
    return name.replace(".lora_B.", ".lora_R.")
