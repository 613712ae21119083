"""The result of a run of a language model: bits per byte of its clients' test texts. It is computed elsewhere."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from simulations.report.result import ARMS, CanaryBounds


@dataclass(frozen=True, slots=True)
class AuthorResult:
    """One client's loss by arm, in bits per byte of its test texts.

    ``base``: the base as it is. ``local``: trained by the client itself, for the epochs of the rounds and of the
    personal step. ``global``: the last global adapter. ``personal``: the global adapter, fine-tuned in private. Of
    ``local`` and ``personal`` the client keeps what is best on its validation texts, the base and the start included.
    """

    name: str
    unseen: bool  # took no part in training
    texts: int  # trained on
    tests: int
    loss: dict[str, float]  # arm → bits per byte
    choice: str


@dataclass(frozen=True, slots=True)
class LanguageResult:
    """What a run of a language model reports."""

    scenario: str
    seed: int
    population: int  # clients in all
    clients: tuple[AuthorResult, ...]  # that were evaluated
    rounds: int
    epsilon: float | None  # what all sums may have revealed of a device; None without differential privacy
    delta: float | None  # for which epsilon is stated
    adapter: dict[str, int | str]  # version, sha256, bytes
    base: dict[str, int | str]  # digest, bytes
    seconds: dict[str, float]
    canaries: CanaryBounds | None = None  # as of ``RunResult``

    def to_json(self) -> dict[str, Any]:
        return {"loss": {arm: summary(self.clients, arm) for arm in ARMS}, **asdict(self)}


def summary(clients: Sequence[AuthorResult], arm: str) -> dict[str, float]:
    """The loss of one arm over the clients: ``mean`` and ``worst`` of those that took part, mean of the ``unseen``."""
    seen = [client.loss[arm] for client in clients if not client.unseen]
    unseen = [client.loss[arm] for client in clients if client.unseen]
    return {
        "mean": float(np.mean(seen)),
        "worst": max(seen),
        "unseen": float(np.mean(unseen)) if unseen else math.nan,
    }
