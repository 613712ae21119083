"""The inputs of an exported graph that an adapter fills (``AdapterInputs``). Imports neither torch nor peft.
``AdapterInputs.of_tensors`` reads them from the tensors of a registry version or a PEFT folder."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

from aggregation.errors import DataError
from edgeadapt.formats.graphinputs import (
    BOTTLENECK,
    LORA_A,
    LORA_B,
    PARTS,
    VIRTUAL,
    bottleneck_of,
    input_name,
    vector_kind,
)
from edgeadapt.formats.layout import Tensors, TensorSpec
from edgeadapt.formats.peftconfig import PeftConfig

LABELS = "labels"  # the symbolic dimension of a classifier head's rows
MAGNITUDE = ".lora_magnitude_vector"  # of DoRA, one number for each output of a layer (``dora.py``)
LORA = ".lora_"  # part of the name of every parameter that LoRA and AdaLoRA add to a layer
ADDED = (LORA, ".hada_", ".vera_")  # likewise, of every method of low rank


@dataclass(frozen=True, slots=True)
class LoraSlot:
    path: str
    scaling: float


@dataclass(frozen=True, slots=True)
class SavedSlot:
    path: str
    parameters: tuple[TensorSpec, ...]


@dataclass(frozen=True, slots=True)
class AdapterInputs:
    """Lists every slot of one adapter, ordered by the module tree (from a model) or by name (from tensors)."""

    adapter: str  # peft's name of the adapter
    loras: tuple[LoraSlot, ...]
    saved: tuple[SavedSlot, ...]
    vectors: tuple[str, ...] = ()  # the graph inputs of scales, offsets and replaced parameters
    virtual: tuple[str, ...] = ()  # the graph inputs of virtual tokens

    @property
    def scaling(self) -> dict[str, float]:
        return {slot.path: slot.scaling for slot in self.loras}

    @property
    def names(self) -> tuple[str, ...]:
        pairs = [slot.path + part for slot in self.loras for part in (LORA_A, LORA_B)]
        saved = (f"{slot.path}.{spec.name}" for slot in self.saved for spec in slot.parameters)
        return (*pairs, *self.vectors, *self.virtual, *saved)

    @classmethod
    def of_tensors(cls, config: PeftConfig, tensors: Tensors) -> Self:
        """Return the inputs that an adapter fills, from all its tensors under peft's names. Raises DataError: a tensor
        is not of LoRA on a linear layer, a LoRA pair is incomplete or of two ranks, a rank differs from the one in
        ``config``, a vector is not one row, or there is no virtual token."""
        values = {input_name(name): value for name, value in tensors.items()}
        loras = tuple(_lora(path, config, values) for path in sorted(lora_paths(values)))
        saved: dict[str, list[TensorSpec]] = {}
        vectors = tuple(sorted(name for name in values if vector_kind(name)))
        single = [name for name in vectors if not name.endswith(BOTTLENECK)]
        if odd := [name for name in single if values[name].ndim != 2 or values[name].shape[0] > 1]:
            raise DataError(f"{odd[0]!r} is not one vector: the adapter is damaged", about=odd[0])
        for adapter in {bottleneck_of(name) for name in vectors if name.endswith(BOTTLENECK)}:
            _check_bottleneck(adapter, config.r, values)
        virtual = tuple(sorted(values.keys() & VIRTUAL.keys()))
        if odd := [name for name in virtual if values[name].ndim != 2 or not values[name].size]:
            raise DataError(f"{odd[0]!r} has no virtual token: the adapter is damaged", about=odd[0])
        for name in sorted(name for name in values if is_saved(name)):
            path, _, parameter = name.rpartition(".")
            saved.setdefault(path, []).append(TensorSpec(parameter, tuple(values[name].shape)))
        modules = tuple(SavedSlot(path, tuple(specs)) for path, specs in saved.items())
        return cls("default", loras, modules, vectors, virtual)


def lora_paths(names: Iterable[str]) -> set[str]:
    """Return the paths of the layers that have a LoRA pair among tensors with these graph names. Raises DataError: peft
    added a tensor that is not of LoRA on a linear layer."""
    added = [name for name in names if LORA in name and not name.endswith(MAGNITUDE)]
    if odd := sorted(name for name in added if not name.endswith((LORA_A, LORA_B))):
        reason = f"tensor {odd[0]!r} is not of plain LoRA on a linear layer and cannot be exported"
        raise DataError(reason, about=odd[0])
    return {name.removesuffix(LORA_A).removesuffix(LORA_B) for name in added}


def is_saved(name: str) -> bool:
    """Check whether a graph input is a parameter of a module in ``modules_to_save``: of no other kind of slot."""
    return not any(mark in name for mark in ADDED) and vector_kind(name) is None and name not in VIRTUAL


def summary(paths: Sequence[str]) -> str:
    """Put layers in one line of a message: each of their names once, and one path.

    >>> summary(["layers.0.q_proj", "layers.1.q_proj", "layers.0.k_proj"])
    'k_proj, q_proj (3 layers, such as layers.0.q_proj)'
    """
    names = ", ".join(sorted({path.rpartition(".")[2] for path in paths}))
    return f"{names} ({len(paths)} layers, such as {paths[0]})" if len(paths) > 1 else ", ".join(paths)


def _check_bottleneck(adapter: str, rank: int, values: Tensors) -> None:
    down, *others = (values[name].shape if (name := f"{adapter}_{part}") in values else () for part in PARTS)
    if down[1:] != (rank,) or others != [(1, rank), (rank, down[0]), (1, down[0])]:
        reason = f"{adapter!r} is not a whole bottleneck adapter of rank {rank}, the configuration's: it is damaged"
        raise DataError(reason, about=adapter)


def _lora(path: str, config: PeftConfig, values: Tensors) -> LoraSlot:
    a, b = values.get(path + LORA_A), values.get(path + LORA_B)
    if a is None or b is None or a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        text = f"{path!r} does not have a pair of LoRA matrices of one rank: the adapter is damaged or of another kind"
        raise DataError(text, about=path)
    if (rank := config.rank_of(path)) != a.shape[0]:
        reason = f"{path!r} has rank {a.shape[0]}, but the adapter's configuration says {rank}"
        raise DataError(reason, about=path)
    return LoraSlot(path, config.scaling_of(path))
