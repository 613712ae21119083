"""Server optimizers: from the mean of a round's deltas to the next adapter.

A mean delta is a direction to add, not a gradient to subtract. Everything is float32 over one flat vector in layout
order, with operations that IEEE 754 rounds in one way only: a run resumed from stored state goes on bit for bit.
How the mean comes about is the protocol's matter; where state is kept is the registry's.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from adapters.layout import Floats, Tensors
from aggregation.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True)
class FedAvg:
    """``x + learning_rate * mean`` (McMahan et al. 2017; the rate as in Reddi et al. 2021)."""

    learning_rate: float = 1.0

    def __post_init__(self) -> None:
        _positive("learning_rate", self.learning_rate)


@dataclass(frozen=True, slots=True)
class FedAdam:
    """Adam on the server (Reddi et al. 2021, algorithm 2). There is no bias correction.

    ``tau`` is in weight units: coordinates whose deltas are much smaller than ``tau`` move like FedAvg's, others by
    about ``learning_rate`` a round. The second moment starts at ``tau**2``, the least that the paper allows.
    """

    learning_rate: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        _positive("learning_rate", self.learning_rate)
        _positive("tau", self.tau)
        if np.float32(self.tau) ** 2 == 0:
            raise ConfigError(f"tau = {self.tau} is too small: its square is zero in float32")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)} must be at least 0 and below 1")


@dataclass(frozen=True, slots=True)
class Stateless:
    """All that FedAvg remembers."""


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """FedAdam's running means of the delta and of its square, both of shape ``(n,)``."""

    first: Floats
    second: Floats


Settings = FedAvg | FedAdam
State = Stateless | Moments


def start(settings: Settings, size: int) -> State:
    """The state before the first round, for an adapter of ``size`` elements."""
    match settings:
        case FedAvg():
            return Stateless()
        case FedAdam(tau=tau):
            return Moments(np.zeros(size, np.float32), np.full(size, np.float32(tau) ** 2, np.float32))


def step(settings: Settings, state: State, adapter: Floats, mean_delta: Floats) -> tuple[State, Floats]:
    """One round's update. Nothing is changed in place.

    Args:
        settings: Which optimizer.
        state: From ``start``, ``restore`` or the step before.
        adapter: Shape ``(n,)``: what the devices started from.
        mean_delta: Shape ``(n,)``: the mean of what they added to it.

    Raises:
        ConfigError: The state belongs to another optimizer.
        DataError: Shapes or types differ, or the update is not finite.
    """
    _check(adapter, mean_delta)
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused below, in one line
        match settings, state:
            case FedAvg(learning_rate=rate), Stateless():
                return state, _finite(adapter + np.float32(rate) * mean_delta)
            case FedAdam(), Moments():
                _check(adapter, state.first)
                return _adam(settings, state, adapter, mean_delta)
    raise ConfigError(f"{type(settings).__name__} cannot go on from the state of another optimizer")


def _adam(settings: FedAdam, state: Moments, adapter: Floats, delta: Floats) -> tuple[State, Floats]:
    rate, beta1, beta2, tau = map(np.float32, (settings.learning_rate, settings.beta1, settings.beta2, settings.tau))
    one = np.float32(1)
    first = beta1 * state.first + (one - beta1) * delta
    second = beta2 * state.second + (one - beta2) * (delta * delta)
    spread: Floats = np.sqrt(second) + tau
    return Moments(_finite(first), _finite(second)), _finite(adapter + rate * first / spread)


def to_tensors(state: State) -> Tensors:
    """What to store; empty for FedAvg. ``restore(settings, to_tensors(state), n)`` equals ``state``, bit for bit."""
    match state:
        case Stateless():
            return {}
        case Moments(first=first, second=second):
            return {"first": first, "second": second}


def restore(settings: Settings, stored: Mapping[str, Floats], size: int) -> State:
    """The state to go on from; where nothing is stored, the one to start from.

    Raises:
        ConfigError: What is stored belongs to another optimizer or an adapter of another size.
    """
    if not stored:
        return start(settings, size)
    fits = isinstance(settings, FedAdam) and stored.keys() == {"first", "second"}
    if not fits or any(value.shape != (size,) or value.dtype != np.float32 for value in stored.values()):
        raise ConfigError(
            f"the stored optimizer state is not that of {type(settings).__name__} over {size} elements:"
            " keep the optimizer that the registry was filled with, or start a new registry"
        )
    return Moments(stored["first"], stored["second"])


def _check(adapter: Floats, other: Floats) -> None:
    if adapter.ndim != 1 or adapter.shape != other.shape or adapter.dtype != np.float32 or other.dtype != np.float32:
        raise DataError(
            f"the server optimizer adds flat float32 vectors of one size, got"
            f" {adapter.dtype} {list(adapter.shape)} and {other.dtype} {list(other.shape)}"
        )


def _finite(vector: Floats) -> Floats:
    if not np.isfinite(vector).all():
        raise DataError(
            "the server's update is not finite: a delta holds NaN or infinity, or the learning rate is too high"
        )
    return vector


def _positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{name} = {value} must be a positive number")
