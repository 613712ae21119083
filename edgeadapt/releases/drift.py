"""Whether the answers of a fleet have changed between two observations (``edgeadapt.rounds.observation``).

Of each bin of a histogram, the two shares are compared. What they differ by without any change has a variance of three
parts: the noise that devices added; chance within a device, which has ``LEAST`` answers or more; and devices that took
part in one of the two only, whose habits may differ as much as answers can. So the test holds its level, and may find
less than there is. It does not know of devices that had enough answers on the days of one observation only."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Annotated, Any, Self

import numpy as np
from pydantic import Field

from aggregation.errors import ConfigError, DataError
from edgeadapt.formats.jsontext import Exact
from edgeadapt.formats.manifest import Count, Sha256, VersionManifest
from edgeadapt.releases.verdict import Figure
from edgeadapt.rounds.observation import DAYS, DECILES, DEVICES, LEAST, NOISE, PRESENT, SINCE, described
from edgeadapt.rounds.sums import Vector

CHANCE = 0.05  # of an alarm, over all histograms together, where nothing has changed
VISIBLE = 3.0  # standard deviations of its noise, which the number of contributing devices exceeds
TOP = 3  # bins that a summary names
USUAL = {"probability": DECILES - 1, "unknown": 0}  # the bin that is left out of a sum, as the rest
TROUBLE = ("doubt", "lessons")  # histograms of which more is worse
Name = Annotated[str, Field(max_length=64)]


@dataclass(frozen=True, slots=True)
class Observed(Exact):
    """Holds what a round observed. ``metrics``: those of ``version``, which its signed manifest has; ``alone``: share
    of its survivors that the observation with which it is compared lacks."""

    round: Count
    version: Sha256
    labels: Annotated[tuple[str, ...], Field(max_length=4096)]
    metrics: Annotated[dict[Name, Figure], Field(max_length=8192)]
    alone: Annotated[float, Field(ge=0, le=1)]

    @classmethod
    def of(cls, manifest: VersionManifest, other: VersionManifest) -> Self:
        alone = len({*manifest.survivors} - {*other.survivors}) / len(manifest.survivors)
        return cls(manifest.round, manifest.sha256, manifest.labels, manifest.metrics, alone)

    @property
    def days(self) -> tuple[float, float]:
        """The first day of its answers, and the day after the last."""
        since = self.metrics.get(SINCE, math.inf)
        return since, since + self.metrics.get(DAYS, 0.0)

    @property
    def histograms(self) -> dict[str, tuple[str, ...]]:
        found: dict[str, tuple[str, ...]] = {}
        for name in sorted((name for name in self.metrics if "." in name), key=lambda name: (len(name), name)):
            histogram, _, bin_ = name.partition(".")
            found[histogram] = *found.get(histogram, ()), bin_
        return found

    def named(self, histogram: str) -> tuple[str, ...]:
        """Name the bins as a person reads them."""
        if histogram == "doubt":
            return ("probability below .5",)
        texts = [*self.labels, ""] if histogram == "labels" else []
        bins = self.histograms[histogram]
        return tuple(described(f"{histogram}/{texts[int(each)] if texts else each}") for each in bins)

    def shares(self, histogram: str) -> Vector:
        """Raises ConfigError: too few devices contributed to see them."""
        devices, hidden = self.metrics[DEVICES], VISIBLE * self.metrics[NOISE] / PRESENT
        if devices < hidden:
            reason = f"round {self.round} has about {max(0.0, devices):.0f} devices that count their answers, and"
            reason += f" its noise hides {hidden:.0f}: observe fewer histograms at once, or a larger fleet"
            raise ConfigError(reason, about="observation.histograms")
        return np.array([self.metrics[f"{histogram}.{each}"] for each in self.histograms[histogram]]) / devices

    def summary(self, histogram: str) -> str:
        """Name the most frequent bins, or of ordered ones the median and the ninth decile. Raises as ``shares``."""
        shares, names = np.clip(self.shares(histogram), 0.0, None).tolist(), list(self.named(histogram))
        if histogram in USUAL:
            shares.insert(USUAL[histogram], max(0.0, 1.0 - sum(shares)))
            names.insert(USUAL[histogram], described(f"{histogram}/{USUAL[histogram]}"))
        elif histogram != "latency":
            whole = sum(shares) if histogram == "labels" else 1.0  # devices shorten what is in many bins
            top = sorted(zip(shares, names, strict=True), reverse=True)[:TOP]
            return ", ".join(f"{name} {share / (whole or 1.0):.2f}" for share, name in top)
        below = np.cumsum(shares)
        median, ninth = (names[int(np.searchsorted(below, share * below[-1]))] for share in (0.5, 0.9))
        return f"median: {median}; ninth decile: {ninth}"

    def variance(self, histogram: str) -> Vector:
        """Return the variance of each share where nothing has changed."""
        p, devices = np.clip(self.shares(histogram), 0.0, 1.0), self.metrics[DEVICES]
        noise = (self.metrics[NOISE] / devices) ** 2 * (1 + (p / PRESENT) ** 2)
        chance: Vector = noise + p * (1 - p) / devices * (1 / LEAST + self.alone)
        return chance


@dataclass(frozen=True, slots=True)
class Drift:
    """Compares one histogram. ``p``: the probability of such a difference in any bin where nothing has changed."""

    histogram: str
    bins: tuple[str, ...]
    before: tuple[float, ...]  # shares
    after: tuple[float, ...]
    most: int  # the bin that differs most, by its standard deviation
    p: float

    def __str__(self) -> str:
        i = self.most
        return f"{self.histogram}: {self.bins[i]} {self.before[i]:.3f} → {self.after[i]:.3f} (p = {self.p:.3g})"


@dataclass(frozen=True, slots=True)
class Drifts:
    rounds: tuple[int, int]
    histograms: tuple[Drift, ...]

    @property
    def changed(self) -> tuple[Drift, ...]:
        return tuple(one for one in self.histograms if one.p * len(self.histograms) < CHANCE)

    @property
    def worse(self) -> bool:
        """Check whether there is more of what is trouble: answers of low probability, or corrections."""
        return any(one.histogram in TROUBLE and one.after[one.most] > one.before[one.most] for one in self.changed)

    def row(self) -> dict[str, Any]:
        rows = [asdict(one) for one in self.histograms]
        return {"rounds": list(self.rounds), "changed": bool(self.changed), "text": str(self), "histograms": rows}

    def __str__(self) -> str:
        what = "the answers have changed" if self.changed else "no change is shown"
        return f"{what} between rounds {self.rounds[0]} and {self.rounds[1]}\n" + "\n".join(map(str, self.histograms))


def compare(before: Observed, after: Observed) -> Drifts:
    """Compare the histograms that both rounds have. Raises ConfigError: they have none in common, their bins differ, or
    too few devices contributed."""
    old, new = before.histograms, after.histograms
    common = [name for name in old if name in new]
    if not common or before.labels != after.labels or any(old[name] != new[name] for name in common):
        reason = f"rounds {before.round} and {after.round} do not observe the same: observe again"
        raise ConfigError(reason, about="observation.histograms")
    return Drifts((before.round, after.round), tuple(_drift(name, before, after) for name in common))


def _drift(name: str, before: Observed, after: Observed) -> Drift:
    old, new = before.shares(name), after.shares(name)
    z = np.abs(new - old) / np.sqrt(before.variance(name) + after.variance(name))
    most = int(np.argmax(z))
    p = min(1.0, len(z) * 2 * NormalDist().cdf(-float(z[most])))
    return Drift(name, before.named(name), tuple(old.tolist()), tuple(new.tolist()), most, p)


def is_observation(manifest: VersionManifest) -> bool:
    return NOISE in manifest.metrics


def observations(versions: Iterable[VersionManifest]) -> tuple[Observed, Observed]:
    """Return the last two observations. Raises ConfigError: there are fewer."""
    last = [*filter(is_observation, versions)][-2:]
    if len(last) < 2:
        reason = f"there are {len(last)} rounds of observation, and two are compared"
        raise ConfigError(f"{reason}: add one with 'edgeadapt coordinator observe'", about="observation")
    return Observed.of(last[0], last[1]), Observed.of(last[1], last[0])


@dataclass(frozen=True, slots=True)
class JudgedDrift(Exact):
    """Holds two observations with what follows from them, as the log of a repository has it."""

    before: Observed
    after: Observed
    worse: bool

    def require(self) -> None:
        """Check that it is worse as stated. Raises DataError."""
        try:
            found = compare(self.before, self.after).worse
        except (ConfigError, KeyError, ValueError, IndexError, ZeroDivisionError) as error:
            raise DataError(f"no two observations have these figures: {error}", about="drift") from error
        if found != self.worse:
            raise DataError(f"the figures of round {self.after.round} do not give the stated drift", about="drift")
