"""The result of a run: ``--json`` prints it, the terminal shows it, the report draws it. It is computed elsewhere."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from aggregation.steps import Step

ARMS = ("base", "local", "global", "personal")


@dataclass(frozen=True, slots=True)
class ClientResult:
    """One client's test accuracy by arm, each a share of its own test phrases.

    ``base``: the vendor's adapter, no training. ``local``: trained by the client itself, for the epochs of the
    personal arm, with the same personal step. ``global``: the last global adapter. ``personal``: the global adapter
    after the personal step. ``choice`` says which candidate the client kept as ``personal``.
    """

    name: str
    language: str
    unseen: bool  # took no part in training
    examples: int  # trained on
    tests: int  # test phrases
    accuracy: dict[str, float]  # arm → share
    choice: str


@dataclass(frozen=True, slots=True)
class ReportedRound:
    """One round as the coordinator saw it. A device whose update is in the sum may still drop out before the end."""

    round: int
    survivors: tuple[str, ...]
    dropped: dict[str, str]  # device → the step at which it dropped out
    aborted: str | None
    bytes_up: int  # of one device, mean over the survivors; a session's first round includes its setup
    bytes_down: int  # of one device, mean over the cohort
    seconds: float
    metrics: dict[str, float]  # accuracy and loss of the adapter that the round began with, on validation parts; …
    version: int | None  # of the adapter that the round produced
    epsilon: float | None  # what all sums so far may have revealed of a device; None without differential privacy


@dataclass(frozen=True, slots=True)
class GroupResult:
    """A federation of its own in a run with ``groups``."""

    name: str  # the language, or "common"
    folder: str  # of the federation, in that of the run
    clients: tuple[str, ...]  # unseen ones too
    devices: int  # that take part
    aborted: int  # rounds
    adapter: str  # SHA-256 of the last version, hex


@dataclass(frozen=True, slots=True)
class Reliability:
    """Whether the probabilities of one arm are the share of right answers, on the test phrases of all clients.

    Measured on the exported files, as devices answer. The calibration error is the mean distance between the two
    (``adapters.calibration``); the lists of answers are those of all clients together.
    """

    before: float  # calibration error without a temperature
    after: float  # with the temperatures that the adapters' manifests state
    near_ninety: int  # answers with a probability of 85 to 95 %
    right_near_ninety: float  # the share of them that is right; NaN if there are none


@dataclass(frozen=True, slots=True)
class CanaryBounds:
    """Lower bounds on epsilon from canaries (``engine.canaries``), and the account, an upper bound on the same sums."""

    count: int  # of canaries
    right: int  # of them, guessed to be in the sums or not
    account: float  # epsilon of the device that spent most
    one_run: float  # a lower bound on it that assumes nothing of the noise
    gaussian: float  # one that assumes the errors of Gaussian noise
    confidence: float  # of each bound


@dataclass(frozen=True, slots=True)
class RunResult:
    scenario: str
    seed: int
    population: int  # clients in all
    clients: tuple[ClientResult, ...]  # that were evaluated
    rounds: tuple[ReportedRound, ...]
    delta: float | None  # for which the epsilon of the rounds is stated; None without differential privacy
    adapter: dict[str, int | str]  # version, sha256, bytes, elements
    base: dict[str, int | str]  # digest, bytes
    bundle: str
    phrase: str  # to ask the bundle; no text of a client
    report: str
    parity: dict[str, float | int]  # agreement, max_abs_diff, count; accuracy of the exported global pair, and torch's
    reliability: dict[str, Reliability]  # of the arms global and personal
    plain: dict[str, dict[str, int]]  # client → right and count of the plain phrases that its own adapter answers
    seconds: dict[str, float]  # total, training (all devices, in the rounds), coordination, personal, export
    canaries: CanaryBounds | None = None  # None if none were asked for, or without differential privacy
    attack: str = "none"  # how the attackers lied in training
    attackers: tuple[str, ...] = ()
    groups: tuple[GroupResult, ...] = ()  # none if all clients share one adapter; ``adapter`` is that of the first

    @property
    def epsilon(self) -> float | None:
        """What all sums may have revealed of a device; None without differential privacy."""
        known = [each.epsilon for each in self.rounds if each.epsilon is not None]
        return known[-1] if known else None

    def to_json(self) -> dict[str, Any]:
        return {
            "accuracy": {arm: summary(self.clients, arm) for arm in ARMS},
            "device_rounds": device_rounds(self.rounds),
            "dropouts_by_step": dropouts_by_step(self.rounds),
            **asdict(self),
        }


def joined_rounds(found: Sequence[ReportedRound]) -> ReportedRound:
    """The rounds of one number in several federations as one; it is aborted if all are.

    Bytes and metrics are means over the federations that finished it, weighted by their survivors. A metric is in it
    if all of these have it; epsilon is the largest one.
    """
    if len(found) == 1:
        return found[0]
    done = [r for r in found if r.aborted is None]
    weights = [len(r.survivors) for r in done]

    def mean(values: Iterable[float]) -> float:
        return float(np.average(list(values), weights=weights)) if done else 0.0

    known = set.intersection(*(set(r.metrics) for r in done)) if done else set()
    spent = [r.epsilon for r in found if r.epsilon is not None]
    return ReportedRound(
        round=found[0].round,
        survivors=tuple(device for r in done for device in r.survivors),
        dropped={device: step for r in found for device, step in r.dropped.items()},
        aborted=None if done else found[0].aborted,
        bytes_up=round(mean(r.bytes_up for r in done)),
        bytes_down=round(mean(r.bytes_down for r in done)),
        seconds=sum(r.seconds for r in found),
        metrics={name: mean(r.metrics[name] for r in done) for name in sorted(known)},
        version=max((r.version for r in done if r.version is not None), default=None),
        epsilon=max(spent, default=None),
    )


def device_rounds(rounds: Iterable[ReportedRound]) -> int:
    """How often a device took part in a round, whether it finished the round or not."""
    return sum(len({*r.survivors, *r.dropped}) for r in rounds)


def dropouts_by_step(rounds: Iterable[ReportedRound]) -> dict[str, int]:
    """How many device-rounds ended early, by step, in the order of the protocol; a step without a dropout is absent.

    >>> r = ReportedRound(1, (), {"en-01": "unmask", "de-02": "plan", "fr-01": "plan"}, None, 0, 0, 0.0, {}, None, None)
    >>> dropouts_by_step([r])
    {'plan': 2, 'unmask': 1}
    """
    order = [step.value for step in Step]
    counts = Counter(step for r in rounds for step in r.dropped.values())
    known = sorted(counts, key=lambda step: (order.index(step) if step in order else len(order), step))
    return {step: counts[step] for step in known}


def summary(clients: Sequence[ClientResult], arm: str) -> dict[str, float]:
    """The accuracy of one arm over the clients.

    Returns:
        ``mean``, ``p10`` (10th percentile) and ``worst`` of the clients that took part in training, at least one;
        ``unseen``: the mean of those that did not, NaN if there are none.
    """
    seen = np.array([h.accuracy[arm] for h in clients if not h.unseen])
    unseen = np.array([h.accuracy[arm] for h in clients if h.unseen])
    return {
        "mean": float(seen.mean()),
        "p10": float(np.percentile(seen, 10)),
        "worst": float(seen.min()),
        "unseen": float(unseen.mean()) if unseen.size else float("nan"),
    }
