"""The outcome of a trial: how each client's model does on its texts, and what it cost."""

import math
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field


@dataclass(frozen=True, slots=True)
class Tally:
    """The answers to some texts, or how well a language model predicts them.

    Attributes:
        right: A character for each text that is classified: ``1`` if its answer is right, else ``0``.
        loss: Mean cross-entropy of a text in nats, of a language model for each byte; 0 without texts.
        predicted: Texts of a language model.
    """

    right: Annotated[str, Field(pattern=r"^[01]*$")]
    loss: float
    predicted: int = 0

    @property
    def count(self) -> int:
        return len(self.right) or self.predicted

    @property
    def accuracy(self) -> float:
        """The share of right answers; NaN without answers."""
        return self.right.count("1") / len(self.right) if self.right else math.nan

    @property
    def bits(self) -> float:
        """Mean loss of a language model in bits per byte; NaN without texts of one."""
        return self.loss / math.log(2) if self.predicted else math.nan


@dataclass(frozen=True, slots=True)
class ClientScore:
    """How one client's classifier answers, or how well its language model predicts.

    Attributes:
        name: Of the client.
        unseen: Whether it took no part in training.
        validation, test: The client's own texts of these parts.
        public: The population's public texts.
    """

    name: str
    unseen: bool
    validation: Tally
    test: Tally
    public: Tally


@dataclass(frozen=True, slots=True)
class Cost:
    """What a trial cost. Scoring is not counted.

    Attributes:
        epochs: Passes of a client over its training texts.
        steps: Steps of the optimizer, all clients together.
        cpu_seconds: Of training; in a federation with coordination and secure aggregation, all devices together.
        bytes_up, bytes_down: Of one device, all rounds together.
    """

    epochs: int
    steps: int
    cpu_seconds: float
    bytes_up: float = 0.0
    bytes_down: float = 0.0


@dataclass(frozen=True, slots=True)
class RoundPoint:
    """One round: what the adapter does that it began with, if it is published, and one device's bytes until then."""

    round: int
    value: float | None  # accuracy, or bits per byte, on the validation texts of its devices
    bytes: float


@dataclass(frozen=True, slots=True)
class TrialResult:
    """All that is measured of one arm on one seed.

    Attributes:
        clients: In the order of the population.
        cost: Of the trial.
        rounds: Of its federation.
        aggregation_error: Of the last round of training (``aggregationerror``); None if it was not measured.
    """

    clients: tuple[ClientScore, ...]
    cost: Cost
    rounds: tuple[RoundPoint, ...] = ()
    aggregation_error: float | None = None


Outcome = TrialResult | str  # why the trial failed, in one line
