"""Server optimizers: from the mean of a round's deltas to the next adapter.

A mean delta is added; it is not a gradient, which would be subtracted. Everything is float32 over one flat vector in
layout order, and uses only operations whose result IEEE 754 defines: a run resumed from stored state makes the same
adapters, bit for bit. No coordinate of an adapter exceeds ``LARGEST``. The protocol makes the mean, the registry keeps
the state.

>>> rule = FedAvg(learning_rate=0.5)
>>> state = start(rule, size=2)
>>> state, adapter = step(rule, state, np.float32([1, 2]), np.float32([4, -4]))
>>> adapter
array([3., 0.], dtype=float32)
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from aggregation.errors import ConfigError, DataError
from edgeadapt.extensions import Extensions
from edgeadapt.formats.layout import Floats, Layout, Tensors
from edgeadapt.formats.manifest import ServerRule

# Weight units; half of what devices train by default (``client.node.policy``). A device that lies within the clip
# norm for a hundred rounds could otherwise lead a coordinate to where every device refuses the adapter, for ever.
LARGEST = 512.0

State = Mapping[str, Floats]  # of a server optimizer, by name: float32 of shape (n,)


@runtime_checkable
class ServerOptimizer(Protocol):
    """A server optimizer is a frozen dataclass whose fields are numbers, which a manifest has with its name. Guarantee
    of each: equal arguments give equal bits on every machine, and no argument is changed."""

    def start(self, size: int) -> State:
        """Return the state before the first round, for an adapter of ``size`` elements; empty if there is none."""
        ...

    def step(self, state: State, adapter: Floats, mean: Floats) -> tuple[State, Floats]:
        """Return the next state and adapter. ``adapter``, ``mean``: as for the function ``step``, which checks both."""
        ...


@dataclass(frozen=True, slots=True)
class FedAvg:
    """Federated averaging: ``x + learning_rate * mean``. McMahan et al. 2017, with the server's learning rate of Reddi
    et al. 2021. ``learning_rate = 1`` gives the plain mean of the devices' adapters. Raises ConfigError: the learning
    rate is not a positive number."""

    learning_rate: float = 1.0

    def __post_init__(self) -> None:
        _positive("learning_rate", self.learning_rate)

    def start(self, size: int) -> State:
        return {}

    def step(self, state: State, adapter: Floats, mean: Floats) -> tuple[State, Floats]:
        return state, adapter + np.float32(self.learning_rate) * mean


@dataclass(frozen=True, slots=True)
class FedAdam:
    """Adam on the server (Reddi et al. 2021, algorithm 2), without bias correction.

    For each coordinate, with the mean delta ``d``, starting from ``m = 0`` and ``v = tau**2``, the paper's least::

        m = beta1 * m + (1 - beta1) * d
        v = beta2 * v + (1 - beta2) * d**2
        x = x + learning_rate * m / (sqrt(v) + tau)

    ``tau`` is in weight units. Coordinates whose deltas are much smaller than ``tau`` move as with FedAvg, others by
    about ``learning_rate`` a round.

    Raises ConfigError: ``learning_rate`` or ``tau`` is not a positive number, the square of ``tau`` is zero in float32,
    or a decay is not at least 0 and below 1."""

    learning_rate: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        _positive("learning_rate", self.learning_rate)
        _positive("tau", self.tau)
        if np.float32(self.tau) ** 2 == 0:
            raise ConfigError(f"tau = {self.tau} is too small: its square is zero in float32", about="tau")
        _decay("beta1", self.beta1)
        _decay("beta2", self.beta2)

    def start(self, size: int) -> State:
        return {"first": np.zeros(size, np.float32), "second": np.full(size, np.float32(self.tau) ** 2, np.float32)}

    def step(self, state: State, adapter: Floats, mean: Floats) -> tuple[State, Floats]:
        rate, beta1, tau = map(np.float32, (self.learning_rate, self.beta1, self.tau))
        first = beta1 * state["first"] + (np.float32(1) - beta1) * mean
        second = self._second(state["second"], mean * mean)
        scale: Floats = np.sqrt(second) + tau
        return {"first": first, "second": second}, adapter + rate * first / scale

    def _second(self, second: Floats, square: Floats) -> Floats:
        beta2 = np.float32(self.beta2)
        after: Floats = beta2 * second + (np.float32(1) - beta2) * square
        return after


@dataclass(frozen=True, slots=True)
class FedYogi(FedAdam):
    """Yogi on the server (Reddi et al. 2021, algorithm 2) is FedAdam with another second moment::

        v = v - (1 - beta2) * d**2 * sign(v - d**2)

    It grows as fast as FedAdam's where deltas become larger, and shrinks more slowly where they become smaller."""

    def _second(self, second: Floats, square: Floats) -> Floats:
        after: Floats = second - (np.float32(1) - np.float32(self.beta2)) * square * np.sign(second - square)
        return after


@dataclass(frozen=True, slots=True)
class FedAvgM:
    """Federated averaging with momentum on the server (Hsu et al. 2019, "Measuring the Effects of Non-Identical Data
    Distribution for Federated Visual Classification").

    For each coordinate, with the mean delta ``d``, starting from ``v = 0``::

        v = momentum * v + d
        x = x + learning_rate * v

    Raises ConfigError: the learning rate is not a positive number, or the momentum is not at least 0 and below 1."""

    learning_rate: float = 1.0
    momentum: float = 0.9

    def __post_init__(self) -> None:
        _positive("learning_rate", self.learning_rate)
        _decay("momentum", self.momentum)

    def start(self, size: int) -> State:
        return {"velocity": np.zeros(size, np.float32)}

    def step(self, state: State, adapter: Floats, mean: Floats) -> tuple[State, Floats]:
        velocity = np.float32(self.momentum) * state["velocity"] + mean
        return {"velocity": velocity}, adapter + np.float32(self.learning_rate) * velocity


class _NoStep:
    """Names what made a version without an optimizer's step. An optimizer's state does not outlive it."""

    __slots__ = ()

    def start(self, size: int) -> State:
        return {}

    def step(self, state: State, adapter: Floats, mean: Floats) -> tuple[State, Floats]:
        raise ConfigError(f"{type(self).__name__} is not a server optimizer", about="rule")


@dataclass(frozen=True, slots=True)
class AnalyticHead(_NoStep):
    """Names the rule of a version whose head the moments gave (``edgeadapt.rounds.analytic``). Its numbers are in the
    task of the round's plan."""


@dataclass(frozen=True, slots=True)
class Evaluation(_NoStep):
    """Names the rule of a round that only counts (``edgeadapt.rounds.evaluation``)."""


@dataclass(frozen=True, slots=True)
class Observation(_NoStep):
    """Names the rule of a round that only observes (``edgeadapt.rounds.observation``)."""


def _require_optimizer(name: str, kind: type[ServerOptimizer]) -> None:
    """Check that a class can be a server optimizer: a manifest must have all that it depends on."""
    frozen = is_dataclass(kind) and kind.__dataclass_params__.frozen
    if not (isinstance(kind, type) and frozen and issubclass(kind, ServerOptimizer)):
        reason = f"{name!r} must be a frozen dataclass with start(size) and step(state, adapter, mean)"
    elif kind.__name__.lower() != name:
        reason = f"{name!r} must have the name of its class {kind.__name__}, in lower case"
    else:
        return
    raise ConfigError(f"the server optimizer {reason}", about="rule")


_OURS = (FedAvg, FedAvgM, FedAdam, FedYogi)
OPTIMIZERS = Extensions[type[ServerOptimizer]](
    "edgeadapt.server_rules",
    "server optimizer",
    "rule",
    {kind.__name__.lower(): kind for kind in _OURS},
    _require_optimizer,
)
_NO_STEPS: dict[str, type[ServerOptimizer]] = {kind.__name__: kind for kind in (AnalyticHead, Evaluation, Observation)}


def name_of(rule: ServerOptimizer) -> str:
    return type(rule).__name__.lower()


def made(name: str, numbers: Mapping[str, float]) -> ServerOptimizer:
    """Make the optimizer of a name in settings. Raises ConfigError: it is not known, or does not have such numbers."""
    kind = OPTIMIZERS.find(name)
    try:
        return kind(**numbers)
    except TypeError as error:
        reason = f"server optimizer {name!r} has the numbers {', '.join(numbers_of(kind))}, not {', '.join(numbers)}"
        raise ConfigError(reason, about="rule") from error


def numbers_of(kind: type[ServerOptimizer]) -> list[str]:
    table: Any = kind
    return [field.name for field in fields(table)]


def to_rule(settings: ServerOptimizer) -> ServerRule:
    """Name the rule for a version's manifest. Law: ``of_rule(to_rule(settings)) == settings``."""
    table: Any = settings
    return ServerRule(type(settings).__name__, asdict(table))


def of_rule(rule: ServerRule) -> ServerOptimizer:
    """Return the optimizer that a manifest names.

    >>> of_rule(ServerRule("FedAvg", {"learning_rate": 0.5}))
    FedAvg(learning_rate=0.5)

    Raises ConfigError: it is not installed, or its numbers are not those of that name or out of their range."""
    kind = _NO_STEPS.get(rule.name) or OPTIMIZERS.find(rule.name.lower())
    if kind.__name__ != rule.name or {*numbers_of(kind)} != {*rule.numbers}:
        raise ConfigError(f"there is no server optimizer {rule.name!r} with such numbers", about="rule")
    return kind(**rule.numbers)


def start(settings: ServerOptimizer, size: int) -> State:
    """Return the state before the first round, for an adapter of ``size`` elements.

    >>> start(FedAdam(tau=0.5), 2)
    {'first': array([0., 0.], dtype=float32), 'second': array([0.25, 0.25], dtype=float32)}

    Raises DataError: it is not a finite float32 vector of that size for each name."""
    return _checked(settings.start(size), size)


def step(settings: ServerOptimizer, state: State, adapter: Floats, mean_delta: Floats) -> tuple[State, Floats]:
    """Compute the update of one round.

    Args:
        adapter: float32 of shape ``(n,)``, weight units: what the devices started from.
        mean_delta: float32 of shape ``(n,)``, weight units: the weighted mean of the survivors' deltas.

    Returns:
        The next state, and the next adapter, float32 of shape ``(n,)``, each coordinate clipped to ``LARGEST`` in
        absolute value. Guarantee: the arguments are not changed, the result is finite, and equal arguments give equal
        bits.

    Raises ConfigError: the state belongs to another optimizer; DataError: shapes or types differ, or the update is not
    finite."""
    size = adapter.size
    for vector in (adapter, mean_delta, *state.values()):
        _require_flat(vector, size)
    if state.keys() != settings.start(size).keys():
        text = f"{type(settings).__name__} cannot continue from {sorted(state)}, the state of another optimizer"
        raise ConfigError(text, about="state")
    with np.errstate(all="ignore"):  # what is not finite is refused below, in one line
        after, moved = settings.step(state, adapter, mean_delta)
    if after.keys() != state.keys():
        raise ConfigError(f"{type(settings).__name__} changed the names of its state", about="state")
    return _checked(after, size), np.clip(_finite(moved, size), -np.float32(LARGEST), np.float32(LARGEST))


def advance(
    settings: ServerOptimizer, state: State, tensors: Tensors, shared: Layout, mean: Floats
) -> tuple[State, Tensors]:
    """Apply ``step`` to the summed tensors (``shared``); keep the others. ``mean``: float32, ``(shared.size,)``."""
    state, vector = step(settings, state, shared.flatten(shared.select(tensors)), mean)
    return state, tensors | shared.unflatten(vector)


def restore(settings: ServerOptimizer, stored: State, size: int) -> State:
    """Return the stored state, or that before the first round where nothing is stored. Raises ConfigError: the stored
    state belongs to another optimizer, or to an adapter of another size."""
    begun = start(settings, size)
    if not stored or isinstance(settings, _NoStep):
        return begun
    if stored.keys() != begun.keys() or any(v.shape != (size,) or v.dtype != np.float32 for v in stored.values()):
        reason = f"the stored optimizer state is not that of {type(settings).__name__} over {size} elements:"
        reason += " keep the optimizer that wrote it, or start a new registry"
        raise ConfigError(reason, about="optimizer")
    return stored


def _require_flat(vector: Floats, size: int) -> None:
    if not isinstance(vector, np.ndarray) or vector.shape != (size,) or vector.dtype != np.float32:
        other = np.asarray(vector)
        text = f"a server optimizer has flat float32 vectors of one size, {size}, got {other.dtype} {list(other.shape)}"
        raise DataError(text, about="shape")


def _checked(state: State, size: int) -> State:
    return {name: _finite(vector, size) for name, vector in state.items()}


def _finite(vector: Floats, size: int) -> Floats:
    _require_flat(vector, size)
    if not np.isfinite(vector).all():
        reason = "the server's update is not finite: a delta holds NaN or infinity, or the learning rate is too high"
        raise DataError(reason, about="update")
    return vector


def _decay(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ConfigError(f"{name} = {value} must be at least 0 and below 1", about=name)


def _positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{name} = {value} must be a positive number", about=name)
