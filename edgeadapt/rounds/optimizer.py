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
from dataclasses import asdict, dataclass, fields

import numpy as np

from aggregation.errors import ConfigError, DataError
from edgeadapt.formats.layout import Floats, Layout, Tensors
from edgeadapt.formats.manifest import ServerRule

# Weight units; half of what devices train by default (``client.node.policy``). A device that lies within the clip
# norm for a hundred rounds could otherwise lead a coordinate to where every device refuses the adapter, for ever.
LARGEST = 512.0


@dataclass(frozen=True, slots=True)
class FedAvg:
    """Federated averaging: ``x + learning_rate * mean``.

    McMahan et al. 2017, with the server's learning rate of Reddi et al. 2021. ``learning_rate = 1`` gives the plain
    mean of the devices' adapters. Raises ConfigError: the learning rate is not a positive number.
    """

    learning_rate: float = 1.0

    def __post_init__(self) -> None:
        _positive("learning_rate", self.learning_rate)


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
    or a decay is not at least 0 and below 1.
    """

    learning_rate: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        _positive("learning_rate", self.learning_rate)
        _positive("tau", self.tau)
        if np.float32(self.tau) ** 2 == 0:
            raise ConfigError(
                f"tau = {self.tau} is too small: its square is zero in float32", about="tau", value=self.tau
            )
        _decay("beta1", self.beta1)
        _decay("beta2", self.beta2)


@dataclass(frozen=True, slots=True)
class FedYogi(FedAdam):
    """Yogi on the server (Reddi et al. 2021, algorithm 2) is FedAdam with another second moment::

        v = v - (1 - beta2) * d**2 * sign(v - d**2)

    It grows as fast as FedAdam's where deltas become larger, and shrinks more slowly where they become smaller.
    """


@dataclass(frozen=True, slots=True)
class FedAvgM:
    """Federated averaging with momentum on the server (Hsu et al. 2019, "Measuring the Effects of Non-Identical Data
    Distribution for Federated Visual Classification").

    For each coordinate, with the mean delta ``d``, starting from ``v = 0``::

        v = momentum * v + d
        x = x + learning_rate * v

    Raises ConfigError: the learning rate is not a positive number, or the momentum is not at least 0 and below 1.
    """

    learning_rate: float = 1.0
    momentum: float = 0.9

    def __post_init__(self) -> None:
        _positive("learning_rate", self.learning_rate)
        _decay("momentum", self.momentum)


@dataclass(frozen=True, slots=True)
class AnalyticHead:
    """Names the rule of a version whose head the moments gave (``edgeadapt.rounds.analytic``): not an optimizer. Its
    numbers are in the task of the round's plan. An optimizer's state does not outlive it."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Names the rule of a round that only counts (``edgeadapt.rounds.evaluation``): not an optimizer. An optimizer's
    state does not outlive it."""


@dataclass(frozen=True, slots=True)
class Stateless:
    """Is the state of FedAvg, an analytic head and an evaluation."""


@dataclass(frozen=True, slots=True, eq=False)
class Velocity:
    velocity: Floats


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Holds FedAdam's ``m`` and ``v``: running means of the delta and of its square, float32 of shape ``(n,)``."""

    first: Floats
    second: Floats


Settings = FedAvg | FedAvgM | FedAdam | FedYogi | AnalyticHead | Evaluation
State = Stateless | Velocity | Moments
_KINDS = (FedAvg, FedAvgM, FedAdam, FedYogi, AnalyticHead, Evaluation)
KINDS: dict[str, type[Settings]] = {kind.__name__: kind for kind in _KINDS}


def to_rule(settings: Settings) -> ServerRule:
    """Name the rule for a version's manifest. Law: ``of_rule(to_rule(settings)) == settings``."""
    return ServerRule(type(settings).__name__, asdict(settings))


def of_rule(rule: ServerRule) -> Settings:
    """Return the optimizer that a manifest names.

    >>> of_rule(ServerRule("FedAvg", {"learning_rate": 0.5}))
    FedAvg(learning_rate=0.5)

    Raises ConfigError: there is no such optimizer, or its numbers are not those of that name or out of their range.
    """
    kind = KINDS.get(rule.name)
    if kind is None or {field.name for field in fields(kind)} != set(rule.numbers):
        raise ConfigError(
            f"there is no server optimizer {rule.name!r} with such numbers", about="rule", value=rule.name
        )
    return kind(**rule.numbers)


def start(settings: Settings, size: int) -> State:
    """Return the state before the first round, for an adapter of ``size`` elements.

    >>> start(FedAdam(tau=0.5), 2)
    Moments(first=array([0., 0.], dtype=float32), second=array([0.25, 0.25], dtype=float32))
    """
    match settings:
        case FedAvg() | AnalyticHead() | Evaluation():
            return Stateless()
        case FedAvgM():
            return Velocity(np.zeros(size, np.float32))
        case FedAdam(tau=tau):
            return Moments(np.zeros(size, np.float32), np.full(size, np.float32(tau) ** 2, np.float32))


def step(settings: Settings, state: State, adapter: Floats, mean_delta: Floats) -> tuple[State, Floats]:
    """Compute the update of one round.

    Args:
        state: From ``start``, ``restore`` or the previous step.
        adapter: float32 of shape ``(n,)``, weight units: what the devices started from.
        mean_delta: float32 of shape ``(n,)``, weight units: the weighted mean of the survivors' deltas.

    Returns:
        The next state, and the next adapter, float32 of shape ``(n,)``, each coordinate clipped to ``LARGEST`` in
        absolute value. Guarantee: the arguments are not changed, the result is finite, and equal arguments give equal
        bits.

    Raises ConfigError: the state belongs to another optimizer; DataError: shapes or types differ, or the update is not
    finite.
    """
    _check(adapter, mean_delta)
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused below, in one line
        match settings, state:
            case FedAvg(learning_rate=rate), Stateless():
                return state, _within(adapter + np.float32(rate) * mean_delta)
            case FedAvgM(learning_rate=rate, momentum=momentum), Velocity(velocity=velocity):
                _check(adapter, velocity)
                faster = _finite(np.float32(momentum) * velocity + mean_delta)
                return Velocity(faster), _within(adapter + np.float32(rate) * faster)
            case FedAdam(), Moments():
                _check(adapter, state.first)
                return _adam(settings, state, adapter, mean_delta)
    raise ConfigError(
        f"{type(settings).__name__} cannot continue from {type(state).__name__}, the state of another optimizer",
        about="state",
    )


def _adam(settings: FedAdam, state: Moments, adapter: Floats, delta: Floats) -> tuple[State, Floats]:
    rate, beta1, beta2, tau = map(np.float32, (settings.learning_rate, settings.beta1, settings.beta2, settings.tau))
    one = np.float32(1)
    first = beta1 * state.first + (one - beta1) * delta
    square = delta * delta
    if isinstance(settings, FedYogi):
        second = state.second - (one - beta2) * square * np.sign(state.second - square)
    else:
        second = beta2 * state.second + (one - beta2) * square
    scale: Floats = np.sqrt(second) + tau
    return Moments(_finite(first), _finite(second)), _within(adapter + rate * first / scale)


def advance(settings: Settings, state: State, tensors: Tensors, shared: Layout, mean: Floats) -> tuple[State, Tensors]:
    """Apply ``step`` to the summed tensors (``shared``); keep the others. ``mean``: float32, ``(shared.size,)``."""
    state, vector = step(settings, state, shared.flatten(shared.select(tensors)), mean)
    return state, tensors | shared.unflatten(vector)


def to_tensors(state: State) -> Tensors:
    """Return the tensors to store; empty for FedAvg. Guarantee: ``restore(settings, to_tensors(state), n)`` equals
    ``state``, bit for bit."""
    match state:
        case Stateless():
            return {}
        case Velocity(velocity=velocity):
            return {"velocity": velocity}
        case Moments(first=first, second=second):
            return {"first": first, "second": second}


def restore(settings: Settings, stored: Mapping[str, Floats], size: int) -> State:
    """Return the state in ``stored`` (``to_tensors``), or that before the first round where nothing is stored. Raises
    ConfigError: the stored state belongs to another optimizer, or to an adapter of another size."""
    if not stored or isinstance(settings, AnalyticHead | Evaluation):
        return start(settings, size)
    kind: type[Velocity | Moments] | None = None
    if not isinstance(settings, FedAvg):
        kind = Velocity if isinstance(settings, FedAvgM) else Moments
    fits = kind is not None and stored.keys() == {field.name for field in fields(kind)}
    if kind is None or not fits or any(v.shape != (size,) or v.dtype != np.float32 for v in stored.values()):
        raise ConfigError(
            f"the stored optimizer state is not that of {type(settings).__name__} over {size} elements:"
            " keep the optimizer that wrote it, or start a new registry",
            about="optimizer",
        )
    return kind(**stored)


def _check(adapter: Floats, other: Floats) -> None:
    if adapter.ndim != 1 or adapter.shape != other.shape or adapter.dtype != np.float32 or other.dtype != np.float32:
        raise DataError(
            f"the server optimizer adds flat float32 vectors of one size, got"
            f" {adapter.dtype} {list(adapter.shape)} and {other.dtype} {list(other.shape)}",
            about="shape",
        )


def _finite(vector: Floats) -> Floats:
    if not np.isfinite(vector).all():
        raise DataError(
            "the server's update is not finite: a delta holds NaN or infinity, or the learning rate is too high",
            about="update",
        )
    return vector


def _within(adapter: Floats) -> Floats:
    return np.clip(_finite(adapter), -np.float32(LARGEST), np.float32(LARGEST))


def _decay(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ConfigError(f"{name} = {value} must be at least 0 and below 1", about=name, value=value)


def _positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{name} = {value} must be a positive number", about=name, value=value)
