"""What changed from one version of an adapter to another: tensor by tensor, layer by layer, and in the manifests.

The tensors A and B of LoRA have no meaning of their own: ``(2A, B/2)`` is the same adapter. So each layer that has both
is compared by its update ``ΔW = s B A`` too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np

from edgeadapt.formats.graphinputs import LORA_A, LORA_B, input_name
from edgeadapt.formats.layout import Floats, Tensors
from edgeadapt.formats.manifest import PrivacyBound, VersionManifest


@dataclass(frozen=True, slots=True)
class TensorChange:
    """Compares a tensor or a layer's update in both versions. ``before``, ``after``: Frobenius norms, weight units."""

    name: str  # peft's name of the tensor; for an update the layer's path
    shape: tuple[int, ...]  # in both
    before: float
    after: float
    change: float  # the norm of the difference
    cosine: float | None  # of the angle between the two, -1 to 1; None if one of them is zero

    @classmethod
    def of(cls, name: str, old: Floats, new: Floats) -> Self:
        first, two = (np.asarray(each, np.float64).ravel() for each in (old, new))
        before, after = float(np.linalg.norm(first)), float(np.linalg.norm(two))
        cosine = float(np.clip(first @ two / (before * after), -1, 1)) if before and after else None
        return cls(name, tuple(old.shape), before, after, float(np.linalg.norm(two - first)), cosine)


@dataclass(frozen=True, slots=True)
class VersionDifference:
    """Compares version ``after`` with version ``before``.

    Args:
        before, after: Their numbers.
        same_base: They are for one base.
        tensors: In both versions, with one shape.
        updates: Of layers with LoRA in both, ``s B A``.
        total: All of ``tensors`` as one vector; None if there are none.
        added, removed: Names of tensors that only one of the two has, or that have another shape.
        labels_added, labels_removed: Of the head.
        labels_moved: The labels are the same, in another order.
        peft_config: The method's settings are the same.
        metrics: Name → before and after; None where a version does not have it.
        privacy: Before and after.
    """

    before: int
    after: int
    same_base: bool
    tensors: tuple[TensorChange, ...]
    updates: tuple[TensorChange, ...]
    total: TensorChange | None
    added: tuple[str, ...]
    removed: tuple[str, ...]
    labels_added: tuple[str, ...]
    labels_removed: tuple[str, ...]
    labels_moved: bool
    peft_config: bool
    metrics: Mapping[str, tuple[float | None, float | None]]
    privacy: tuple[PrivacyBound | None, PrivacyBound | None]


def difference(old: VersionManifest, new: VersionManifest, before: Tensors, after: Tensors) -> VersionDifference:
    """Compare two versions by their manifests and tensors. Raises DataError if a layer of LoRA has no scaling."""
    both = [name for name in before if name in after and before[name].shape == after[name].shape]
    changes = tuple(TensorChange.of(name, before[name], after[name]) for name in both)
    flat = [np.concatenate([each[name].ravel() for name in both]) if both else None for each in (before, after)]
    total = None if flat[0] is None or flat[1] is None else TensorChange.of("all", flat[0], flat[1])
    first, second = _updates(old, before), _updates(new, after)
    alike = [name for name in first if name in second and first[name].shape == second[name].shape]
    return VersionDifference(
        before=old.version,
        after=new.version,
        same_base=old.base_digest == new.base_digest,
        tensors=changes,
        updates=tuple(TensorChange.of(name, first[name], second[name]) for name in alike),
        total=total,
        added=tuple(sorted(after.keys() - set(both))),
        removed=tuple(sorted(before.keys() - set(both))),
        labels_added=tuple(label for label in new.labels if label not in old.labels),
        labels_removed=tuple(label for label in old.labels if label not in new.labels),
        labels_moved=old.labels != new.labels and sorted(old.labels) == sorted(new.labels),
        peft_config=old.peft_config == new.peft_config,
        metrics={name: (old.metrics.get(name), new.metrics.get(name)) for name in sorted({*old.metrics, *new.metrics})},
        privacy=(old.privacy, new.privacy),
    )


def _updates(manifest: VersionManifest, tensors: Tensors) -> dict[str, Floats]:
    """Map the path of each layer with LoRA to its update, ``(out, in)``."""
    updates = {}
    for layer in (name.removesuffix(LORA_A) for name in tensors if name.endswith(LORA_A)):
        a, b, path = tensors[layer + LORA_A], tensors.get(layer + LORA_B), input_name(layer)
        if b is not None and a.ndim == b.ndim == 2:
            updates[path] = np.float32(manifest.peft_config.scaling_of(path)) * (b @ a)
    return updates
