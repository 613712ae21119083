"""What a kind of round is: one class, which a new kind derives from ``RoundTask`` in a module of its own. The class has
everything in which the kinds differ. ``taskkinds`` lists them; the coordinator, its auditor and the devices ask for
none of them."""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Protocol, Self, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from aggregation.errors import ProtocolError
from aggregation.groups import GroupSum
from aggregation.ring import Ring
from aggregation.session import COORDINATOR
from aggregation.spec import SessionSpec
from aggregation.vector import VectorSpec
from edgeadapt.formats import jsontext
from edgeadapt.formats.layout import Layout, Tensors
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.formats.settings import Settings
from edgeadapt.methods.parts import Part, part_of
from edgeadapt.rounds import optimizer, sums
from edgeadapt.rounds.combination import Combination
from edgeadapt.rounds.federatedmethods import FederatedMethod
from edgeadapt.rounds.sums import Bounds, HeldOut, Sums, Vector

LEAST_STEP = 0.1  # L2 norm, weight units
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Outcome:
    start: Tensors  # the adapter on offer, with the device's private parts
    trained: Tensors
    examples: int  # number of those that were trained on
    held_out: HeldOut  # the score of ``start`` on held-out examples


class DeviceRound(Protocol):
    """Gives a kind of round what its contribution needs of a device (``client.node.training``). It refuses nothing:
    what a plan asks for was checked before an example was read."""

    spec: SessionSpec
    start: Tensors  # the adapter on offer
    layout: Layout  # its layout
    digest: bytes  # SHA-256 of its file
    rounding: np.random.Generator

    def noise_key(self) -> bytes: ...  # 32 secret bytes for the noise of this round

    def attempt(self, contribution: Callable[[], T], otherwise: Callable[[], T]) -> T:
        """Return what ``contribution`` makes of the examples, or what ``otherwise`` makes if anything fails."""
        ...

    def updated(self, task: Any) -> Outcome: ...  # trained on the device's examples

    def unchanged(self, task: Any) -> Outcome:
        """Return the outcome of a device that could not train: an update of zero, with the weight of its examples. With
        weight zero, failures of other devices would show how much this one counts."""
        ...

    def embedded(self) -> NDArray[np.floating]: ...  # the training examples, shape (n, hidden)

    def labels(self) -> NDArray[np.int64]: ...  # of the same, shape (n,)

    def scored(self) -> HeldOut: ...  # the adapter on offer

    def unscored(self) -> HeldOut: ...  # the worst score on as many examples

    def compared(self, task: Any) -> Vector: ...  # of the release in the device's bundle (``evaluation``)

    def used(self, since: int, days: int) -> Mapping[str, int]: ...  # what it answered in days (``observation``)


@dataclass(frozen=True, slots=True)
class SummedRound:
    """Holds the sums of a round by group, or one of all survivors, and what devices contributed to them with."""

    spec: SessionSpec
    tensors: Tensors
    digest: bytes
    groups: Sequence[GroupSum]


@dataclass(frozen=True, slots=True)
class ServerStep:
    """Says how the coordinator steps an adapter; a kind with a rule of its own does not use ``rule``."""

    rule: optimizer.ServerOptimizer
    state: optimizer.State
    combination: Combination | None = None


class RoundTask(jsontext.Exact, ABC):
    """Describes a round, the same for every device of the cohort. A kind is a frozen dataclass that derives from this.
    ``labels``: the device's examples have these; none for a language model."""

    __slots__ = ()
    RULE: ClassVar[optimizer.ServerOptimizer | None] = None  # makes the next adapter; None: the federation's optimizer
    SEGMENT: ClassVar[str]  # of the sum with noise
    EXACT_SEGMENT: ClassVar[str | None]  # the first of the sum without noise; None: it has none
    EXACT: ClassVar[str | None]  # the kind of its sums without noise (``client.node.sumhistory``); None: it has none
    NEEDS_LABELS: ClassVar[bool] = True
    CONSENT: ClassVar[str] = ""  # the owner's switch for this kind (``client.node.policy``); empty: there is none
    LATER: ClassVar[Collection[str]] = ()  # numbers that older transcripts lack: a zero is not written
    NEED_NO_LIMIT: ClassVar[Mapping[str, str]] = {}  # numbers that need no limit of the owner, and why

    peft_config: PeftConfig
    labels: tuple[str, ...]

    # The specification.

    def encode(self) -> bytes:
        """Law: ``decode(task.encode()) == task``; equal tasks give equal bytes."""
        values = asdict(cast(Any, self))
        return jsontext.encode({name: value for name, value in values.items() if value or name not in self.LATER})

    @classmethod
    def decode(cls, raw: bytes) -> Self:
        """Read a task of this kind. Raises ProtocolError if a field is missing, unknown or out of range."""
        return cls.read(raw, names_in(raw))

    @classmethod
    def read(cls, raw: bytes, names: Collection[str]) -> Self:
        """Read a text with these ``names``; raises as ``decode``."""
        try:
            task = jsontext.decode_as(cls, raw)
        except ValidationError as error:
            first = error.errors()[0]
            field = f"task.{'.'.join(map(str, first['loc']))}"
            raise ProtocolError(f"{field}: {first['msg']}", about=field) from error
        if missing := [name for name in cls.names() if name not in {*names, *cls.LATER}]:
            raise ProtocolError(f"task.{missing[0]}: Field required", about=f"task.{missing[0]}")
        task.check()
        return task

    @classmethod
    def names(cls) -> list[str]:
        return [field.name for field in fields(cast(Any, cls))]

    def check(self) -> None:
        """Check what no single field shows. Raises ProtocolError."""
        if self.NEEDS_LABELS and not self.labels:
            reason = "a language model has no analytic head, and is not observed"
            raise ProtocolError(reason, COORDINATOR, about="task.labels")

    @abstractmethod
    def terms(self) -> dict[str, float | str]:
        """Return the settings by name. Sums from one adapter are on the same terms."""

    # What an owner bounds.

    def numbers(self) -> dict[str, float]:
        """Return every number that a coordinator chooses with the task, by name, except those that need no limit."""
        values = {name: getattr(self, name) for name in self.names() if name not in self.NEED_NO_LIMIT}
        return {name: value for name, value in values.items() if isinstance(value, int | float)}

    @property
    def private(self) -> frozenset[Part]:
        return frozenset()

    @property
    def changes(self) -> frozenset[Part]:
        return frozenset()

    def influencing(self) -> frozenset[Part]:
        """Return the parts of an adapter on which a contribution depends, also those that are not trained."""
        return frozenset(Part)

    def least_movement(self, clip_norm: float, size: int, share: float) -> float:
        """Return the distance below which two adapters count as one: L2 norm over ``influencing``, weight units.
        ``size`` counts the numbers in an update; ``share`` is a part of a long step of the task's optimizer."""
        return share * LEAST_STEP

    # The vector that is summed.

    @abstractmethod
    def noisy_size(self, layout: Layout) -> int:
        """Count the numbers of the vector with noise."""

    @abstractmethod
    def exact_vector(self, layout: Layout, bounds: Bounds) -> VectorSpec: ...

    @abstractmethod
    def exact_ring_bits(self, layout: Layout, bounds: Bounds) -> int: ...

    @classmethod
    @abstractmethod
    def check_exact(cls, spec: SessionSpec, values: Sums, survivors: int) -> None: ...

    def vector(self, layout: Layout, bounds: Bounds) -> VectorSpec:
        """Return the sums of a round. Raises ConfigError: the ring cannot hold the sums, cannot count examples one by
        one, or the task asks for noise and there is none, or the other way round; DataError: the adapter has none of
        the parts that the task shares, or no head."""
        if bounds.noise:
            return sums.noisy_spec(self.SEGMENT, self.noisy_size(layout), bounds)
        return self.exact_vector(layout, bounds)

    def ring_bits(self, layout: Layout, bounds: Bounds) -> int:
        """Return the least width of an element with which the sums are exact enough. Raises as ``vector``."""
        if bounds.noise:
            return sums.noisy_ring_bits(self.noisy_size(layout), bounds)
        return self.exact_ring_bits(layout, bounds)

    @classmethod
    def check_sum(cls, spec: SessionSpec, values: Sums, survivors: int) -> None:
        """Check that honest survivors can have a sum: else some device lied. The DataError's text names no number of
        the sum, because it is published."""
        (cls.check_exact if spec.privacy is None else sums.check_noisy)(spec, values, survivors)

    # The device's side.

    @abstractmethod
    def contribute(self, device: DeviceRound) -> Ring:
        """Return what the device sends masked, shape ``(spec.vector.size,)``, whatever fails on its examples."""

    # The coordinator's side, which its auditor repeats.

    def state_size(self, layout: Layout) -> int:
        return 0

    @abstractmethod
    def next_adapter(self, summed: SummedRound, step: ServerStep) -> tuple[optimizer.State, Tensors]:
        """Return the optimizer's state after the round, and the adapter that the round makes. Guarantee: equal
        arguments give equal bits on every machine. Raises ConfigError: the state belongs to another optimizer;
        DataError: Honest survivors cannot have these sums, or the update is not finite."""

    def distances(self, summed: SummedRound, step: ServerStep) -> tuple[float, ...]:
        """Return how far each group's mean is from their combination, in weight units; none without groups."""
        return ()

    def metrics(self, spec: SessionSpec, values: Sums, survivors: int, digest: bytes) -> dict[str, float]:
        """Return the metrics of a round, as they are published. ``values`` sums all survivors; ``digest`` is the
        SHA-256 of the adapter that the round began with."""
        return sums.published(values)


def noisy(device: DeviceRound, vector: Callable[[], Vector], otherwise: Callable[[], Vector]) -> Ring:
    """Encode with noise what ``vector`` makes of a device's examples, or what ``otherwise`` makes if it fails."""

    def encoded(found: Vector) -> Ring:
        return sums.noisy_vector(found, device.spec, device.digest, device.rounding, device.noise_key())

    return device.attempt(lambda: encoded(vector()), lambda: encoded(otherwise()))


def names_in(raw: bytes) -> frozenset[str]:
    """List the names in a JSON object; none in anything else."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return frozenset()
    return frozenset(value) if isinstance(value, dict) else frozenset()


@dataclass(frozen=True, slots=True)
class RoundOf:
    """Says what a task is for; ``noisy``: whether the federation has noise."""

    peft_config: PeftConfig
    labels: tuple[str, ...]
    version: int
    method: FederatedMethod
    noisy: bool


class KindSettings(Settings):
    KIND: ClassVar[type[RoundTask]]

    def task(self, of: RoundOf) -> RoundTask:
        """Raises ConfigError if the adapter or the method is of another kind."""
        raise NotImplementedError

    def bound(self, clip_norm: float, noisy: bool) -> float:
        """Bound the L2 norm of a contribution; ``clip_norm`` is the bound of an update."""
        return clip_norm

    def multiplier(self, federation: float) -> float:
        """Return the least noise multiplier of its sums; ``federation`` has that of all rounds, 0 without noise."""
        return federation


def distance(before: Tensors, after: Tensors, parts: Collection[Part]) -> float:
    """Return the L2 distance between two adapters of one layout, over some parts."""
    names = [name for name in before if part_of(name) in parts]
    return math.sqrt(sum(float(((after[name].astype(float) - before[name]) ** 2).sum()) for name in names))
