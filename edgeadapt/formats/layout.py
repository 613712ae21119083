"""The layout of an adapter: its tensors' names and shapes, and their order in a flat vector. Aggregation adds vectors,
so all machines need the same order. The digest of the layout is in the session's offer and in every manifest."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from aggregation.errors import DataError
from edgeadapt.formats import jsontext

Floats = NDArray[np.float32]
Tensors = dict[str, Floats]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Describes one float32 tensor: its name as PEFT saves it, and its shape."""

    name: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Layout:
    """Orders tensors by name. Law: ``layout.unflatten(layout.flatten(tensors))`` equals ``tensors``, bit for bit."""

    tensors: tuple[TensorSpec, ...]

    def __post_init__(self) -> None:
        names = [spec.name for spec in self.tensors]
        if not names:
            raise DataError("the adapter has no tensors", about="layout")
        if names != sorted(set(names)):
            raise DataError("an adapter layout names every tensor once, in sorted order", about="layout")

    @classmethod
    def of(cls, tensors: Mapping[str, Floats]) -> Self:
        return cls(tuple(TensorSpec(name, tuple(tensors[name].shape)) for name in sorted(tensors)))

    @property
    def size(self) -> int:
        return sum(spec.size for spec in self.tensors)

    @property
    def digest(self) -> str:
        """Hash the names and shapes in order (SHA-256, hex)."""
        rows = [[spec.name, list(spec.shape)] for spec in self.tensors]
        return hashlib.sha256(jsontext.encode(rows)).hexdigest()

    def select(self, tensors: Mapping[str, Floats]) -> Tensors:
        return {spec.name: tensors[spec.name] for spec in self.tensors if spec.name in tensors}

    def check(self, tensors: Mapping[str, Floats]) -> None:
        """Check that tensors have this layout and finite values. Raises DataError: a tensor is missing, unknown, of
        another shape or type, or holds NaN or infinity."""
        if odd := sorted({spec.name for spec in self.tensors}.symmetric_difference(tensors)):
            reason = f"tensor {odd[0]!r} is missing from the adapter or unknown to its layout"
            raise DataError(reason, about=odd[0])
        for spec in self.tensors:
            tensor = tensors[spec.name]
            if tensor.dtype != np.float32 or tensor.shape != spec.shape:
                stated = f"{tensor.dtype} {list(tensor.shape)}"
                reason = f"tensor {spec.name!r} is {stated}, expected float32 {list(spec.shape)}"
                raise DataError(reason, about=spec.name)
            if not np.isfinite(tensor).all():
                raise DataError(f"tensor {spec.name!r} holds NaN or infinity", about=spec.name)

    def flatten(self, tensors: Mapping[str, Floats]) -> Floats:
        """Return one vector of shape ``(size,)``: the tensors in layout order, each row-major. Raises as ``check``.

        >>> tensors = {"b": np.array([[1, 2], [3, 4]], np.float32), "a": np.array([0], np.float32)}
        >>> Layout.of(tensors).flatten(tensors).tolist()
        [0.0, 1.0, 2.0, 3.0, 4.0]
        """
        self.check(tensors)
        return np.concatenate([tensors[spec.name].reshape(-1) for spec in self.tensors])

    def unflatten(self, vector: Floats) -> Tensors:
        """Return views of a vector of shape ``(size,)`` as tensors. Raises DataError for another size or type."""
        if vector.shape != (self.size,) or vector.dtype != np.float32:
            stated = f"{vector.dtype} vector of shape {vector.shape}"
            raise DataError(f"a {stated} does not fit a layout of {self.size} float32 elements", about="vector")
        ends = np.cumsum([spec.size for spec in self.tensors])
        return {
            spec.name: vector[end - spec.size : end].reshape(spec.shape)
            for spec, end in zip(self.tensors, ends, strict=True)
        }
