"""Results of arms and of runs, for classifiers and language models alike. They are computed elsewhere."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from aggregation.steps import Step

ARMS = ("base", "local", "global", "personal")


@dataclass(frozen=True, slots=True)
class Tally:
    """Counts right answers to some texts, or how well a language model predicts them."""

    right: Annotated[str, Field(pattern=r"^[01]*$")]  # of each text that is classified: 1 if its answer is right
    loss: float  # mean cross-entropy of a text in nats, of a language model for each byte; 0 without texts
    predicted: int = 0  # texts of a language model
    scores: tuple[float, ...] = ()  # of each text in a task of others, from 0 to 1

    @property
    def count(self) -> int:
        return len(self.right) or len(self.scores) or self.predicted

    @property
    def accuracy(self) -> float:
        """The share of right answers, or the mean score; NaN without answers."""
        if self.scores:
            return math.fsum(self.scores) / len(self.scores)
        return self.right.count("1") / len(self.right) if self.right else math.nan

    @property
    def bits(self) -> float:
        """Return a language model's mean loss in bits per byte; NaN without texts of one."""
        return self.loss / math.log(2) if self.predicted else math.nan


@dataclass(frozen=True, slots=True)
class ClientScore:
    name: str
    unseen: bool  # whether the client took no part in training
    validation: Tally
    test: Tally
    public: Tally  # the population's public texts
    choice: str = ""  # the adapter that the client kept, where the arm lets it choose


@dataclass(frozen=True, slots=True)
class Cost:
    """Says what a trial cost. Scoring is not counted; bytes are those of one device, in all rounds together. Bytes up
    are those that the device sent, also in answers that were lost or of a round that aborted."""

    epochs: int  # passes of a client over its training texts
    steps: int  # steps of the optimizer, all clients together
    cpu_seconds: float  # of training; in a federation with coordination and secure aggregation, all devices together
    bytes_up: float = 0.0
    bytes_down: float = 0.0


@dataclass(frozen=True, slots=True)
class RoundPoint:
    """Describes one round: the adapter that it began with, if published, and one device's bytes until then."""

    round: int
    value: float | None  # accuracy, or bits per byte, on the validation texts of its devices
    bytes: float


@dataclass(frozen=True, slots=True)
class RoundTally:
    rounds: int = 0
    aborted: int = 0  # without a sum
    repeated: int = 0  # of these, rounds of the analytic head for which another one made up
    unfitted: bool = False  # no round fitted the analytic head, of one group at least
    resumed: tuple[int, ...] = ()  # rounds in which an interruption ended a session early
    retries: int = 0  # how often all rounds began again, because some had aborted

    @property
    def is_short(self) -> bool:
        """Check whether the adapter lacks the sum of a round that was planned."""
        return self.aborted > self.repeated

    @property
    def is_void(self) -> bool:
        """Check whether the adapter is not what the arm stands for: nothing trained it, or nothing fitted its head."""
        return self.unfitted or 0 < self.rounds == self.aborted


@dataclass(frozen=True, slots=True)
class CanaryBounds:
    """Holds lower bounds on epsilon from canaries (``engine.canaries``), and the account, an upper bound."""

    count: int  # of canaries
    right: int  # of them, guessed to be in the sums or not
    account: float  # epsilon of the device that spent most
    one_run: float  # a lower bound on it that assumes nothing of the noise
    gaussian: float  # one that assumes the errors of Gaussian noise
    confidence: float  # of each bound


@dataclass(frozen=True, slots=True)
class TrialResult:
    clients: tuple[ClientScore, ...]  # in the order of the population
    cost: Cost
    rounds: tuple[RoundPoint, ...] = ()
    aggregation_error: float | None = None
    epsilon: float | None = None  # what the rounds may have revealed of a device; None without differential privacy
    canaries: CanaryBounds | None = None  # of a global arm, if the scenario asks for some
    metric: str = ""  # name of the score of a task of others
    round_tally: RoundTally = RoundTally()


Outcome = TrialResult | str  # why the trial failed, in one line


@dataclass(frozen=True, slots=True)
class Metric:
    name: str  # in a heading
    key: str  # in JSON
    of: Callable[[Tally], float]  # its value for a tally
    sign: int  # 1 if more is better, else -1
    titles: Mapping[str, str]  # of the figures over clients; ``p10`` is the tenth from the bad end
    decile: str  # ``p10`` in a sentence
    factor: float  # with ``digits`` and ``unit``: how a difference is printed
    digits: int
    unit: str
    differences: str  # the unit of differences in full

    def score(self, tally: Tally) -> float:
        """Return the value, or its negative where less is better."""
        return self.sign * self.of(tally)

    def size(self, difference: float, *, signed: bool = False) -> str:
        """Format a difference without its unit, with its sign if asked."""
        return f"{self.factor * difference:{'+' if signed else ''}.{self.digits}f}"


TITLES = {"mean": "mean", "p10": "10th pct.", "worst": "worst", "unseen": "unseen"}
ACCURACY = Metric(
    "accuracy", "accuracy", lambda tally: tally.accuracy, 1, TITLES, "10th", 100, 1, "points", "percentage points"
)
BITS = Metric(
    "bits per byte",
    "loss",
    lambda tally: tally.bits,
    -1,
    TITLES | {"p10": "90th pct."},
    "90th",
    1,
    3,
    "bits per byte",
    "bits per byte",
)
METRICS = {metric.name: metric for metric in (ACCURACY, BITS)}


def metric_named(name: str) -> Metric:
    """Return one of ``METRICS``, or the score of a task of others under the name that the task gives it."""
    return METRICS.get(name) or replace(ACCURACY, name=name, key="score")


def metric_of(results: Iterable[TrialResult]) -> Metric:
    """Return what trials of one suite are compared by; accuracy if there are none."""
    results = list(results)
    if own := [result.metric for result in results if result.metric]:
        return metric_named(own[0])
    tallies = (tally for result in results for c in result.clients for tally in (c.validation, c.test, c.public))
    return BITS if any(tally.predicted for tally in tallies) else ACCURACY


@dataclass(frozen=True, slots=True)
class ClientResult:
    """Describes one client in a run: ``arms`` has the accuracy on its test texts, or their bits per byte, by arm.

    ``base``: no training. ``local``: trained by the client itself, for the epochs of the rounds, with the same personal
    step. ``global``: the last global adapter. ``personal``: the global adapter after the personal step; ``choice`` says
    which candidate the client kept."""

    name: str
    language: str
    unseen: bool  # took no part in training
    examples: int  # trained on
    tests: int
    arms: dict[str, float]
    choice: str


@dataclass(frozen=True, slots=True)
class ReportedRound:
    """Describes one round as the coordinator saw it. A device in the sum may still drop out before the end."""

    round: int
    survivors: tuple[str, ...]
    dropped: dict[str, str]  # device → the step at which it dropped out
    aborted: str | None
    bytes_up: int  # sent by one device, mean over the cohort; a session's first round includes its setup
    bytes_down: int  # sent to one device, mean over the cohort
    seconds: float
    metrics: dict[str, float]  # accuracy and loss of the adapter that the round began with, on validation parts
    version: int | None  # of the adapter that the round produced
    epsilon: float | None  # what all sums so far may have revealed of a device; None without differential privacy


@dataclass(frozen=True, slots=True)
class GroupResult:
    name: str  # the language, or "common"
    folder: str  # of the federation, in that of the run
    clients: tuple[str, ...]  # unseen ones too
    devices: int  # that take part
    aborted: int  # rounds
    adapter: str  # SHA-256 of the last version, hex


@dataclass(frozen=True, slots=True)
class Reliability:
    """Says whether the probabilities of one arm are the share of right answers, on the test phrases of all clients.
    Measured on the exported files, as devices answer. The calibration error is the mean distance between the two
    (``edgeadapt.formats.calibration``); the lists of answers are those of all clients together."""

    before: float  # calibration error without a temperature
    after: float  # with the temperatures that the adapters' manifests state
    near_ninety: int  # answers with a probability of 85 to 95 %
    right_near_ninety: float  # the share of them that is right; NaN if there are none


@dataclass(frozen=True, slots=True)
class Lesson:
    """Holds a phrase that an exported bundle gets wrong, to be taught; never a text that somebody gave."""

    bundle: str
    phrase: str
    label: str  # the right one


@dataclass(frozen=True, slots=True)
class ExportResult:
    bundle: str
    phrase: str  # to ask the bundle; no text of a client
    report: str
    parity: dict[str, float | int]  # agreement, max_abs_diff, count; accuracy of the exported global pair, and torch's
    reliability: dict[str, Reliability]  # of the arms global and personal
    plain: dict[str, dict[str, int]]  # client → right and count of the plain phrases that its own adapter answers
    answered: dict[str, dict[str, int]]  # right label → answer of the personal adapters → test phrases of all clients
    lesson: Lesson | None = None  # None for texts of one's own, or where all answers are right
    by_word: bool = False  # labels are of words
    confused: str = ""  # page of pictures or sounds that were answered wrong


@dataclass(frozen=True, slots=True)
class RunResult:
    """Holds the default arms on one seed: ``--json`` prints it, the terminal shows it, the report draws it."""

    scenario: str
    seed: int
    metric: str  # as ``metric_named`` takes it
    population: int  # clients in all
    clients: tuple[ClientResult, ...]  # that were evaluated
    rounds: tuple[ReportedRound, ...]
    delta: float | None  # for which the epsilon of the rounds is stated; None without differential privacy
    adapter: dict[str, int | str]  # version, sha256, bytes, elements
    base: dict[str, int | str]  # digest, bytes
    seconds: dict[str, float]  # total, training (all devices, in the rounds), coordination, personal, export
    exported: ExportResult | None = None  # None for a language model
    canaries: CanaryBounds | None = None  # None if none were asked for, or without differential privacy
    masked: bool = True  # whether the sums were; without masks there is no transcript
    attack: str = "none"  # how the attackers lied in training
    attackers: tuple[str, ...] = ()
    groups: tuple[GroupResult, ...] = ()  # none if all clients share one adapter; ``adapter`` is that of the first
    round_tally: RoundTally = RoundTally()
    finding: tuple[float, float] | None = None  # epsilon and delta of the round that found the groups

    @property
    def epsilon(self) -> float | None:
        """Return what the sums of the rounds may have revealed of a device; None without differential privacy."""
        spent = [each.epsilon for each in self.rounds if each.epsilon is not None]
        return spent[-1] if spent else None

    def summary(self, arm: str) -> dict[str, float]:
        """Return one arm's ``mean``, ``p10`` (10th percentile from the bad end), ``worst`` and ``unseen``. The first
        three are over the clients that took part in training, at least one; ``unseen`` is the mean of the others, NaN
        if there are none."""
        sign = metric_named(self.metric).sign
        seen = sign * np.array([client.arms[arm] for client in self.clients if not client.unseen])
        unseen = [client.arms[arm] for client in self.clients if client.unseen]
        return {
            "mean": float(sign * seen.mean()),
            "p10": float(sign * np.percentile(seen, 10)),
            "worst": float(sign * seen.min()),
            "unseen": float(np.mean(unseen)) if unseen else math.nan,
        }

    def to_json(self) -> dict[str, Any]:
        key, table = metric_named(self.metric).key, asdict(self)
        clients = [{(key if name == "arms" else name): v for name, v in row.items()} for row in table["clients"]]
        return {
            key: {arm: self.summary(arm) for arm in ARMS},
            "device_rounds": device_rounds(self.rounds),
            "dropouts_by_step": dropouts_by_step(self.rounds),
            "epsilon": self.epsilon,
            **(table.pop("exported") or {}),
            **table,
            "clients": clients,
        }


def joined_rounds(same: Sequence[ReportedRound]) -> ReportedRound:
    """Join the rounds of one number in several federations; the joined one is aborted if all are. Bytes and metrics are
    means over the federations that finished it, weighted by their survivors. A metric is in it if all of these have it;
    epsilon is the largest one."""
    if len(same) == 1:
        return same[0]
    done = [r for r in same if r.aborted is None]
    weights = [len(r.survivors) for r in done]

    def mean(values: Iterable[float]) -> float:
        return float(np.average(list(values), weights=weights)) if done else 0.0

    common = set.intersection(*(set(r.metrics) for r in done)) if done else set()
    return ReportedRound(
        round=same[0].round,
        survivors=tuple(device for r in done for device in r.survivors),
        dropped={device: step for r in same for device, step in r.dropped.items()},
        aborted=None if done else same[0].aborted,
        bytes_up=round(mean(r.bytes_up for r in done)),
        bytes_down=round(mean(r.bytes_down for r in done)),
        seconds=sum(r.seconds for r in same),
        metrics={name: mean(r.metrics[name] for r in done) for name in sorted(common)},
        version=max((r.version for r in done if r.version is not None), default=None),
        epsilon=max((r.epsilon for r in same if r.epsilon is not None), default=None),
    )


def device_rounds(rounds: Iterable[ReportedRound]) -> int:
    return sum(len({*r.survivors, *r.dropped}) for r in rounds)


def dropouts_by_step(rounds: Iterable[ReportedRound]) -> dict[str, int]:
    """Count the device-rounds that ended early, by step, in the order of the protocol; steps without any are absent.

    >>> r = ReportedRound(1, (), {"en-01": "unmask", "de-02": "plan", "fr-01": "plan"}, None, 0, 0, 0.0, {}, None, None)
    >>> dropouts_by_step([r])
    {'plan': 2, 'unmask': 1}
    """
    order = [step.value for step in Step]
    counts = Counter(step for r in rounds for step in r.dropped.values())
    ordered = sorted(counts, key=lambda step: (order.index(step) if step in order else len(order), step))
    return {step: counts[step] for step in ordered}
