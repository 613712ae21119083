"""The slots of an exported base, and how an adapter's tensors fill them. Nothing here builds a model or imports torch.

``plan.py`` reads a plan from a model in memory; ``plan_of`` reads it from what a registry or a PEFT folder says.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from adapters.layout import Tensors, TensorSpec
from adapters.ondevice import LORA_A, LORA_B, graph_name
from adapters.peftconfig import PeftConfig
from aggregation.errors import DataError

LABELS = "labels"  # the free dimension of a head's rows
LORA = ".lora_"  # in the name of everything that peft adds to a layer


@dataclass(frozen=True, slots=True)
class LoraSlot:
    """One adapted linear layer: its path in the base, and the factor that peft applies to its update."""

    path: str
    scaling: float


@dataclass(frozen=True, slots=True)
class SavedSlot:
    """One module trained whole (``modules_to_save``): its path, and its parameters by their names within it."""

    path: str
    parameters: tuple[TensorSpec, ...]


@dataclass(frozen=True, slots=True)
class AdapterInputs:
    """All slots of a model: in the order of its module tree, or of their names where there is no model."""

    adapter: str  # peft's name of the adapter that they were read from
    loras: tuple[LoraSlot, ...]
    saved: tuple[SavedSlot, ...]

    @property
    def scaling(self) -> dict[str, float]:
        """The factor of each adapted layer by its path."""
        return {slot.path: slot.scaling for slot in self.loras}

    @property
    def inputs(self) -> tuple[str, ...]:
        """The graph inputs that an adapter fills, in order."""
        pairs = [slot.path + part for slot in self.loras for part in (LORA_A, LORA_B)]
        return (*pairs, *(f"{slot.path}.{spec.name}" for slot in self.saved for spec in slot.parameters))


def plan_of(method: PeftConfig, tensors: Tensors) -> AdapterInputs:
    """The slots that an adapter fills, from its tensors and what is said of its method.

    Args:
        method: Of the adapter; gives each layer its scaling.
        tensors: All its tensors, under peft's names.

    Raises:
        DataError: A tensor is none that LoRA on a linear layer has, a pair is broken, or a rank is not the method's.
    """
    values = {graph_name(name): value for name, value in tensors.items()}
    loras = tuple(_lora(path, method, values) for path in sorted(lora_paths(values)))
    saved: dict[str, list[TensorSpec]] = {}
    for name in sorted(name for name in values if LORA not in name):
        path, _, parameter = name.rpartition(".")
        saved.setdefault(path, []).append(TensorSpec(parameter, tuple(values[name].shape)))
    return AdapterInputs("default", loras, tuple(SavedSlot(path, tuple(specs)) for path, specs in saved.items()))


def lora_paths(names: Iterable[str]) -> set[str]:
    """The paths of the layers that have a LoRA pair among tensors of these graph names.

    Raises:
        DataError: A tensor is one that peft adds to a layer, but not of LoRA on a linear layer.
    """
    added = [name for name in names if LORA in name]
    if odd := sorted(name for name in added if not name.endswith((LORA_A, LORA_B))):
        raise DataError(f"tensor {odd[0]!r} is not of plain LoRA on a linear layer and cannot be exported")
    return {name.removesuffix(LORA_A).removesuffix(LORA_B) for name in added}


def _lora(path: str, method: PeftConfig, values: Tensors) -> LoraSlot:
    a, b = values.get(path + LORA_A), values.get(path + LORA_B)
    if a is None or b is None or a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise DataError(f"{path!r} has no pair of LoRA matrices of one rank: the adapter is damaged or of another kind")
    if (rank := method.rank_of(path)) != a.shape[0]:
        raise DataError(f"{path!r} has rank {a.shape[0]}, but the adapter's method says {rank}")
    return LoraSlot(path, method.scaling_of(path))
