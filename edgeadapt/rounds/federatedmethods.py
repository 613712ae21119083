"""Federated methods: which parts of an adapter devices train in a round, and whose updates are summed.

A method says nothing to a device but this, in the task of a plan. The mean of LoRA's factors A and B is the mean of the
updates B·A only if all devices have the same A or the same B (``exact``); of the head it always is.

>>> [part.value for part in METHODS["rolora"].trained(version=3)], METHODS["fedit"].exact
(['B', 'head'], False)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from edgeadapt.methods.parts import PARTS, Part

FACTORS = (Part.A, Part.B)


@dataclass(frozen=True, slots=True)
class FederatedMethod:
    """Describes one method. ``turns``: the parts that are trained, by turns: the adapter of version v is trained in
    those of turn v. ``shared``: the parts whose updates are summed. Others that are trained stay on the devices."""

    name: str
    source: str
    turns: tuple[tuple[Part, ...], ...] = (PARTS,)
    shared: tuple[Part, ...] = PARTS

    def trained(self, version: int) -> tuple[Part, ...]:
        """Return the parts that devices train of the adapter of ``version``. Not by rounds: a round that is repeated
        from the same adapter must have the same task."""
        return self.turns[version % len(self.turns)]

    @property
    def exact(self) -> bool:
        """Check whether the coordinator's mean is the mean of the devices' updates to the model."""
        return all(not {*FACTORS} <= {*turn} & {*self.shared} for turn in self.turns) and not self.private

    @property
    def splits_factors(self) -> bool:
        """Check whether A and B are not treated alike, so that the adapter has to be LoRA without magnitudes."""
        return any(Part.R in parts or len({*FACTORS} & {*parts}) == 1 for parts in (*self.turns, self.shared))

    @property
    def private(self) -> frozenset[Part]:
        return frozenset(part for turn in self.turns for part in turn) - frozenset(self.shared)


_METHODS = (
    FederatedMethod("fedit", "Zhang et al. 2024, Towards Building the Federated GPT: Federated Instruction Tuning"),
    FederatedMethod(
        "ffa",
        "Sun et al. 2024, Improving LoRA in Privacy-Preserving Federated Learning",
        ((Part.B, Part.HEAD),),
        (Part.B, Part.HEAD),
    ),
    FederatedMethod(
        "rolora",
        "Chen et al. 2024, Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA",
        ((Part.A, Part.HEAD), (Part.B, Part.HEAD)),
        (*FACTORS, Part.HEAD),
    ),
    FederatedMethod(
        "fedsb",
        "Singhal et al. 2025, Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance in "
        "(Private) Federated LoRA Fine-Tuning",
        ((Part.R, Part.HEAD),),
        (Part.R, Part.HEAD),
    ),
    FederatedMethod(
        "fedsa",
        "Guo et al. 2024, Selective Aggregation for Low-Rank Adaptation in Federated Learning",
        (PARTS,),
        (Part.A, Part.VECTORS, Part.HEAD),
    ),
    FederatedMethod(
        "fedper",
        "Arivazhagan et al. 2019, Federated Learning with Personalization Layers",
        (PARTS,),
        (*FACTORS, Part.VECTORS),
    ),
    FederatedMethod(
        "fedbabu",
        "Oh et al. 2022, FedBABU: Toward Enhanced Representation for Federated Image Classification",
        ((*FACTORS, Part.VECTORS),),
        (*FACTORS, Part.VECTORS),
    ),
    FederatedMethod("head", "FedAvg of the head alone, on the frozen base", ((Part.HEAD,),), (Part.HEAD,)),
)
METHODS: Mapping[str, FederatedMethod] = MappingProxyType({method.name: method for method in _METHODS})
