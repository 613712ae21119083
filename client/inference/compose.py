"""Several adapters as one: ``y = base(x) + Σ wᵢ (x Aᵢ) Bᵢ``.

The ranks are joined, ``A = [A₁ A₂ …]`` and ``B = [w₁B₁; w₂B₂; …]``, so that one product gives the sum of the updates;
nothing is approximated, and the graph needs no second set of inputs. The rank is then the sum of the ranks.

A module trained whole is no update but the module itself, and two of them have no sum. Where their shapes agree, and a
head's labels too, the module is their mean with the weights as shares. That is right for an adapter and the one it was
trained from, which lie close together; docs/decisions/0013-composing-adapters.md has the reasons.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from adapters.layout import Floats, Tensors
from adapters.manifest import AdapterManifest, BaseManifest
from adapters.ondevice import LORA_A, LORA_B, check_name
from aggregation.errors import ConfigError
from client.inference.trust import VerifiedAdapter

MAX_WEIGHT = 16.0  # beyond it an update of a sound adapter is noise


@dataclass(frozen=True, slots=True)
class WeightedAdapter:
    """One adapter of a composition, and the factor of its update."""

    name: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        check_name(self.name)
        if not (math.isfinite(self.weight) and 0 < self.weight <= MAX_WEIGHT):
            raise ConfigError(f"the weight of adapter {self.name!r} must be above 0 and at most {MAX_WEIGHT:g}")

    def __str__(self) -> str:
        return self.name if self.weight == 1 else f"{self.name}:{float(self.weight)!r}".removesuffix(".0")


Choice = tuple[WeightedAdapter, ...]


def parse(text: str) -> Choice:
    """The choice that a person wrote: ``global``, ``global+anna``, ``global:0.5+anna:1``. The inverse of ``written``.

    Raises:
        ConfigError: A name cannot be an adapter's, a weight is no number or out of range, or a name stands twice.
    """
    return choose([_part(piece.strip()) for piece in text.split("+")])


def choose(parts: Sequence[WeightedAdapter]) -> Choice:
    """The parts, sorted by name: the order changes nothing but the last bits, so one choice has one form.

    Raises:
        ConfigError: There is none, or a name stands twice.
    """
    names = [part.name for part in parts]
    if not names:
        raise ConfigError("no adapter was named; choose one at least")
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"adapter {twice[0]!r} is named twice; give it one weight instead")
    return tuple(sorted(parts, key=lambda part: part.name))


def written(choice: Choice) -> str:
    """The choice as ``parse`` reads it, and as it is shown."""
    return "+".join(map(str, choice))


@dataclass(frozen=True, slots=True)
class Adapter:
    """What a graph is given: one verified adapter, or several as one."""

    choice: Choice
    sidecars: tuple[AdapterManifest, ...]  # of the parts, in the order of ``choice``
    rank: int  # the greatest of a layer
    nbytes: int  # of the inputs
    inputs: Tensors = field(repr=False)  # by graph input

    @classmethod
    def of(cls, choice: Choice, sidecars: tuple[AdapterManifest, ...], inputs: Tensors) -> Self:
        """The adapter that has these inputs."""
        rank = max((value.shape[1] for name, value in inputs.items() if name.endswith(LORA_A)), default=0)
        return cls(choice, sidecars, rank, sum(value.nbytes for value in inputs.values()), inputs)

    @property
    def name(self) -> str:
        """The choice, written."""
        return written(self.choice)

    @property
    def labels(self) -> tuple[str, ...]:
        """The head's rows; none where there is no head."""
        return self.sidecars[0].labels

    @property
    def version(self) -> int:
        """The highest version among the parts."""
        return max(sidecar.version for sidecar in self.sidecars)


def compose(choice: Choice, verified: Sequence[VerifiedAdapter], card: BaseManifest) -> Adapter:
    """The adapters of ``choice`` as one.

    Args:
        choice: From ``parse`` or ``choose``.
        verified: What ``Trust.adapter`` returned for each part, in the same order, all for the base of ``card``.
        card: Of the base.

    Raises:
        ConfigError: The labels differ, or the ranks add up to more than the base allows.
    """
    sidecars = tuple(one.sidecar for one in verified)
    if len(verified) == 1 and choice[0].weight == 1:
        return Adapter.of(choice, sidecars, verified[0].inputs)
    if odd := [one for one in sidecars if one.labels != sidecars[0].labels]:
        raise ConfigError(
            f"adapters {sidecars[0].name!r} and {odd[0].name!r} have heads for other labels, which have no mean; "
            "use them one at a time"
        )
    weights = [part.weight for part in choice]
    inputs = {name: _joined(name, [one.inputs[name] for one in verified], weights) for name in verified[0].inputs}
    composed = Adapter.of(choice, sidecars, inputs)
    if composed.rank > card.max_rank:
        raise ConfigError(
            f"{composed.name} has rank {composed.rank}, above the base's limit of {card.max_rank}; leave one out"
        )
    return composed


def _joined(name: str, values: Sequence[Floats], weights: Sequence[float]) -> Floats:
    if name.endswith(LORA_A):
        return np.concatenate(values, axis=1)
    if name.endswith(LORA_B):
        return np.concatenate([np.float32(weight) * value for weight, value in zip(weights, values, strict=True)])
    # In float64, by numpy's average with these weights: equal modules then stay what they are.
    return np.average(values, axis=0, weights=weights).astype(np.float32)


def _part(text: str) -> WeightedAdapter:
    name, colon, weight = text.partition(":")
    try:
        return WeightedAdapter(name.strip(), float(weight) if colon else 1.0)
    except ValueError as error:
        raise ConfigError(f"{weight!r} is no weight; write NAME:NUMBER, such as global:0.5+anna:1") from error
