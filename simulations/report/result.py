"""The result of a run: what `--json` prints, the table shows and the report draws. All of it is computed elsewhere."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

ARMS = ("base", "local", "global", "personal")


@dataclass(frozen=True, slots=True)
class HouseholdResult:
    """One household's test accuracy by arm, each a share of its own test phrases.

    ``base``: the vendor's head, no training. ``local``: trained alone, for as many epochs as the personal arm saw in
    all. ``global``: the last shared adapter. ``personal``: the best of base, global and privately fine-tuned by its own
    held-out part; ``choice`` says which that was.
    """

    name: str
    language: str
    unseen: bool  # took no part in training
    examples: int  # trained on
    tests: int  # test phrases
    accuracy: dict[str, float]  # arm → share
    choice: str


@dataclass(frozen=True, slots=True)
class RoundResult:
    """One round as the coordinator saw it."""

    round: int
    survivors: tuple[str, ...]
    dropped: dict[str, str]  # device → the step at which it was lost
    aborted: str | None
    bytes_up: int  # a device, mean over the survivors; a session's set-up counts in its first round
    bytes_down: int  # a device, mean over the cohort
    seconds: float
    metrics: dict[str, float]  # accuracy and loss (of the adapter the round began with, on held-out parts), examples, …
    version: int | None


@dataclass(frozen=True, slots=True)
class RunResult:
    """Everything a run says about itself."""

    scenario: str
    seed: int
    households: tuple[HouseholdResult, ...]
    rounds: tuple[RoundResult, ...]
    adapter: dict[str, int | str]  # version, sha256, bytes, elements
    base: dict[str, int | str]  # digest, bytes
    bundle: str
    report: str
    parity: dict[str, float | int]  # agreement, max_abs_diff, count; accuracy of the exported global pair
    seconds: dict[str, float]  # total, training (on all devices in the rounds), coordination, personal, export

    def to_json(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return {"accuracy": {arm: summary(self.households, arm) for arm in ARMS}, **asdict(self)}


def summary(households: Sequence[HouseholdResult], arm: str) -> dict[str, float]:
    """``mean``, ``p10``, ``worst`` of the households that took part; ``unseen``: the mean of those that did not."""
    seen = np.array([h.accuracy[arm] for h in households if not h.unseen])
    unseen = np.array([h.accuracy[arm] for h in households if h.unseen])
    return {
        "mean": float(seen.mean()),
        "p10": float(np.percentile(seen, 10)),
        "worst": float(seen.min()),
        "unseen": float(unseen.mean()) if unseen.size else float("nan"),
    }
