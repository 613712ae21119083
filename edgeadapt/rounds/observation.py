"""A round of observation: histograms of what devices answered in some days, as one sum that always has noise.

Devices train nothing. A device whose owner allows it contributes, of each histogram, the share of its answers in each
bin: one that is used much counts as one that is used little. One with fewer than ``LEAST`` answers contributes zeros.
The days are past, so a device's counts of them do not change any more. The sums are published, as they are private
already; the adapter stays what it was, as in an evaluation."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from aggregation import rotation
from aggregation.errors import ProtocolError
from aggregation.ring import Ring
from aggregation.spec import OBSERVED, SessionSpec
from edgeadapt.formats.layout import Layout
from edgeadapt.formats.manifest import Sha256
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.formats.policy import Outcome
from edgeadapt.rounds import optimizer
from edgeadapt.rounds.evaluation import CountingTask
from edgeadapt.rounds.roundtask import DeviceRound, KindSettings, RoundOf, RoundTask, noisy
from edgeadapt.rounds.sums import Sums, Vector, clip

Histogram = Literal["labels", "probability", "doubt", "unknown", "latency", "adapter", "lessons", "outcome"]
Histograms = Annotated[tuple[Histogram, ...], Field(min_length=1, max_length=8)]
Day = Annotated[int, Field(ge=0, lt=2**24)]  # since 1970-01-01, UTC
Days = Annotated[int, Field(ge=1, le=31)]
Releases = Annotated[tuple[Sha256, ...], Field(max_length=8)]

NOISE = "observation_noise"  # metric: standard deviation of the noise in each bin of a sum
OTHER = ""  # label of a text that has no answer
DECILES = 10  # of the probability of the first answer; the first half of them is doubt
UNKNOWN = (0.0, 0.1, 0.25, 0.5)  # shares of unknown tokens, up to and including; one bin more is above
LATENCY = (5, 10, 20, 50, 100, 200, 500)  # milliseconds, up to and including; one bin more is above
LESSONS = ("answered", "corrected", "undone")
SHOWN = 12  # digits of a release's digest
DECIMALS = 3  # of a sum
DEVICES = "observation_devices"  # metric: about how many devices contributed
SINCE, DAYS = "observation_since", "observation_days"  # metrics: what was asked for
LEAST = 20  # answers of a device that contributes; not the coordinator's choice, who would ask the device with most
PRESENT = 0.25  # what a device adds to the number of devices
LONGEST = 0.3  # norm of a histogram: 200 devices show one new answer in ten (tests/edgeadapt/releases/test_drift.py)


@dataclass(frozen=True, slots=True)
class ObservationTask(CountingTask):
    """Asks for ``histograms`` of the answers of ``days`` days from ``since`` on. ``releases``: contents of adapters
    (``AdapterManifest.content``), by which the histogram "adapter" tells them apart."""

    RULE: ClassVar[optimizer.ServerOptimizer | None] = optimizer.Observation()
    SEGMENT: ClassVar[str] = OBSERVED
    NO_NOISE: ClassVar[str] = "what devices answered is not summed without noise: set observation.noise_multiplier"
    CONSENT: ClassVar[str] = "observations"
    NEED_NO_LIMIT: ClassVar[dict[str, str]] = {
        "since": "any day: the noise of each sum is accounted for, whatever days it is about",
        "days": "1 to 31, and accounted for as since",
    }

    peft_config: PeftConfig
    labels: tuple[str, ...]
    histograms: Histograms
    since: Day
    days: Days
    releases: Releases = ()

    def check(self) -> None:
        RoundTask.check(self)
        if reason := _odd(self.histograms, self.releases):
            raise ProtocolError(reason, about="task.histograms")

    def terms(self) -> dict[str, float | str]:
        numbers = {f"observation.{name}": getattr(self, name) for name in ("since", "days")}
        return numbers | {"observation.histograms": ",".join(self.histograms)}

    def bins(self) -> dict[str, tuple[frozenset[str], ...]]:
        """Map each histogram to its bins: the keys of the counts (``keys``) that belong to each. The usual bin of a
        histogram is left out, as the rest: most answers are in it, and a device's vector is short without it."""
        deciles = [frozenset({f"probability/{number}"}) for number in range(DECILES)]
        every = {
            "labels": [frozenset({f"labels/{label}"}) for label in (*self.labels, OTHER)],
            "probability": deciles[:-1],
            "doubt": [frozenset[str]().union(*deciles[: DECILES // 2])],
            "unknown": [frozenset({f"unknown/{number}"}) for number in range(1, len(UNKNOWN) + 1)],
            "latency": [frozenset({f"latency/{number}"}) for number in range(len(LATENCY) + 1)],
            "adapter": [frozenset({f"adapter/{release}"}) for release in self.releases],
            "lessons": [frozenset({f"lessons/{name}"}) for name in LESSONS[1:]],
            "outcome": [frozenset({f"outcome/{name}"}) for name in list(Outcome)[1:]],
        }
        return {name: tuple(every[name]) for name in self.histograms}

    def shares(self, counts: Mapping[str, int]) -> Vector:
        """Return what a device with these counts contributes: shape ``(noisy_size(),)``, of the L2 norm of
        ``ObservationRounds.bound`` at most.

        First ``PRESENT``, or 0 of a device with too few answers; then, of each histogram, the bins' shares of all
        answers, shortened to ``LONGEST``. A label that the task lacks counts as a text without an answer."""
        answers, vector = counts.get(f"lessons/{LESSONS[0]}", 0), [np.array([PRESENT])]
        if answers < LEAST:
            return np.zeros(1 + sum(map(len, self.bins().values())))
        for name, bins in self.bins().items():
            found = np.array([sum(counts.get(key, 0) for key in own) for own in bins], np.float64)
            if name == "labels":
                found[-1] = max(0.0, answers - found[:-1].sum())
            vector.append(clip(found / answers, LONGEST))
        return np.concatenate(vector)

    def noisy_size(self, layout: Layout) -> int:
        return 1 + sum(map(len, self.bins().values()))

    def contribute(self, device: DeviceRound) -> Ring:
        nothing = np.zeros(device.spec.vector.size)
        return noisy(device, lambda: self.shares(device.used(self.since, self.days)), lambda: nothing)

    def metrics(self, spec: SessionSpec, values: Sums, survivors: int, digest: bytes) -> dict[str, float]:
        """Return the number of devices that contributed, the sum of each bin in devices, by its number among
        ``labels`` or else by what it counts, ``unknown.1`` for example, and ``NOISE``, the deviation of each; that of
        the first is ``1 / PRESENT`` times as large."""
        sums = iter(rotation.rotate_back(values[OBSERVED], rotation.seed(digest)).tolist())
        table = {SINCE: float(self.since), DAYS: float(self.days), DEVICES: round(next(sums) / PRESENT, DECIMALS)}
        for name, bins in self.bins().items():
            for i, own in enumerate(bins):
                what = i if name == "labels" else min(own).partition("/")[2][:SHOWN]
                table[f"{name}.{what}"] = round(next(sums), DECIMALS)
        return table | {NOISE: spec.vector.segment(OBSERVED).noise * math.sqrt(survivors)}


class ObservationRounds(KindSettings):
    """Rounds that sum what devices answered in some days, after all others."""

    KIND: ClassVar[type[RoundTask]] = ObservationTask

    rounds: int = Field(default=0, ge=0)
    """how many of the rounds, the last ones, observe and do not train"""
    histograms: Histograms = ("doubt",)
    """what is observed: labels, probability (in tenths), doubt (whether it is below one half), unknown (share of
    unknown tokens), latency, adapter (which release answered), lessons (corrections) or outcome (to confirm, unsure or
    blocked by the policy); noise grows with the root of their number"""
    since: Day = 0
    """first day, counted from 1970-01-01 UTC"""
    days: Days = 7
    """number of days"""
    releases: Releases = ()
    """SHA-256 of what the adapters of releases are, which the histogram adapter tells apart"""
    noise_multiplier: float = Field(default=4.6, gt=0, le=1000)
    """standard deviation of the noise, as privacy.noise_multiplier, also in a federation without noise; in one that has
    more, that"""

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if reason := _odd(self.histograms, self.releases):
            raise ValueError(reason)
        return self

    def task(self, of: RoundOf) -> ObservationTask:
        asked = self.histograms, self.since, self.days, self.releases
        return ObservationTask(of.peft_config, of.labels, *asked)

    def bound(self, clip_norm: float, noisy: bool) -> float:
        return math.hypot(PRESENT, LONGEST * math.sqrt(len(self.histograms)))

    def multiplier(self, federation: float) -> float:
        return max(federation, self.noise_multiplier)


def _odd(histograms: Sequence[str], releases: Sequence[str]) -> str:
    if len({*histograms}) < len(histograms) or len({*releases}) < len(releases):
        return "a histogram or a release is named twice"
    if "adapter" in histograms and not releases:
        return "the histogram adapter tells releases apart: name one with --release"
    return ""


def keys(label: str | None, probability: float, unknown: float, seconds: float, adapter: str) -> list[str]:
    """Return the keys of the counts to which an answer adds one. ``label``: None: the text had no answer, and
    ``probability`` counts in no bin. ``unknown``: share of the text's unknown tokens. ``adapter``:
    ``AdapterManifest.content`` of the adapter that answered; empty: several did, as one."""
    found = [
        f"labels/{label or OTHER}",
        f"unknown/{sum(unknown > bound for bound in UNKNOWN)}",
        f"latency/{sum(1000 * seconds > bound for bound in LATENCY)}",
        f"adapter/{adapter}",
        f"lessons/{LESSONS[0]}",
    ]
    return found if label is None else [*found, f"probability/{min(DECILES - 1, int(DECILES * probability))}"]


def described(key: str) -> str:
    """Say in words what a key of ``keys`` counts.

    >>> [described(key) for key in ("probability/7", "latency/1", "unknown/4", "labels/")]
    ['probability .7 to .8', 'latency 5 to 10 ms', 'unknown tokens above 50 %', 'no answer']
    """
    kind, _, rest = key.partition("/")
    if kind == "labels":
        return f"label {rest}" if rest else "no answer"
    if kind == "probability":
        return f"probability .{rest} to {'1' if int(rest) == DECILES - 1 else f'.{int(rest) + 1}'}"
    if kind == "unknown":
        return "unknown tokens " + _between([f"{bound:.0%}".replace("%", " %") for bound in UNKNOWN], int(rest))
    if kind == "latency":
        return "latency " + _between([f"{bound} ms" for bound in LATENCY], int(rest))
    return f"adapter {rest[:SHOWN] or 'of several'}" if kind == "adapter" else rest


def _between(bounds: Sequence[str], place: int) -> str:
    if place == len(bounds):
        return f"above {bounds[-1]}"
    return f"{bounds[place - 1].split()[0]} to {bounds[place]}" if place else f"up to {bounds[0]}"
