"""Whether the answers of a fleet have changed between two observations (``edgeadapt.rounds.observation``).

Of each bin of a histogram, the two shares are compared. What they differ by without any change has a variance of three
parts: the noise that devices added; chance within a device, which has ``LEAST`` answers or more; and devices that took
part in one of the two only, whose habits may differ as much as answers can. So the test holds its level, and may find
less than there is. It does not know of devices that had enough answers on the days of one observation only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np

from aggregation.errors import ConfigError, ProtocolError
from edgeadapt.promotion.evaluations import find_plan
from edgeadapt.releases.lineage import Lineage
from edgeadapt.rounds.observation import DEVICES, LEAST, NOISE, PRESENT, ObservationTask, described
from edgeadapt.rounds.sums import Vector

CHANCE = 0.05  # of an alarm, over all histograms together, where nothing has changed
VISIBLE = 3.0  # standard deviations of its noise, which the number of contributing devices exceeds


@dataclass(frozen=True, slots=True)
class Observed:
    """Holds what a round observed. ``devices``: about how many contributed; ``sums``: by histogram and bin, in devices;
    ``noise``: the deviation of each sum."""

    round: int
    task: ObservationTask
    devices: float
    sums: dict[str, Vector]
    noise: float
    survivors: frozenset[str]

    def shares(self, histogram: str) -> Vector:
        """Return the share of each bin. Raises ConfigError: too few devices contributed to see them."""
        hidden = VISIBLE * self.noise / PRESENT
        if self.devices < hidden:
            reason = f"round {self.round} has about {max(0.0, self.devices):.0f} devices that count their answers, and"
            reason += f" its noise hides {hidden:.0f}: observe fewer histograms at once, or a larger fleet"
            raise ConfigError(reason, about="observation.histograms")
        return self.sums[histogram] / self.devices

    def variance(self, histogram: str, other: "Observed") -> Vector:
        """Return the variance of each share where nothing has changed."""
        p = np.clip(self.shares(histogram), 0.0, 1.0)
        noise = (self.noise / self.devices) ** 2 * (1 + (p / PRESENT) ** 2)
        alone = len(self.survivors - other.survivors) / len(self.survivors)
        chance: Vector = noise + p * (1 - p) / self.devices * (1 / LEAST + alone)
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
    def found(self) -> bool:
        return min(one.p for one in self.histograms) * len(self.histograms) < CHANCE

    def __str__(self) -> str:
        what = "the answers have changed" if self.found else "no change is shown"
        return f"{what} between rounds {self.rounds[0]} and {self.rounds[1]}\n" + "\n".join(map(str, self.histograms))


def compare(before: Observed, after: Observed) -> Drifts:
    """Compare the histograms that both rounds have. Raises ConfigError: they have none in common, their bins differ, or
    too few devices contributed."""
    common = [name for name in before.sums if name in after.sums]
    if not common or any(before.task.bins()[name] != after.task.bins()[name] for name in common):
        reason = f"rounds {before.round} and {after.round} do not observe the same: observe again"
        raise ConfigError(reason, about="observation.histograms")
    return Drifts((before.round, after.round), tuple(_drift(name, before, after) for name in common))


def _drift(name: str, before: Observed, after: Observed) -> Drift:
    old, new = before.shares(name), after.shares(name)
    z = np.abs(new - old) / np.sqrt(before.variance(name, after) + after.variance(name, before))
    most = int(np.argmax(z))
    p = min(1.0, len(z) * 2 * NormalDist().cdf(-float(z[most])))
    return Drift(name, bin_names(before.task, name), tuple(old.tolist()), tuple(new.tolist()), most, p)


def bin_names(task: ObservationTask, histogram: str) -> tuple[str, ...]:
    """Name the bins of a histogram, as a person reads them."""
    if histogram == "doubt":
        return ("probability below .5",)
    return tuple(described(next(iter(keys))) for keys in task.bins()[histogram])


def observations(state_dir: Path, trust: Path | None) -> Sequence[Observed]:
    """Read the observations of a coordinator from its signed versions, oldest first. Raises TrustError, DataError: the
    registry is damaged, or no log has the plan of one."""
    found = []
    for version in Lineage.read(state_dir, trust, None).versions:
        record, metrics = version.record, version.manifest.metrics
        if record is None or record.plan is None or NOISE not in metrics:
            continue
        try:
            task = ObservationTask.decode(find_plan(state_dir, record.plan).training)
        except ProtocolError:  # a version's metrics are signed, whatever kind of round they are of
            continue
        sums = {name: np.array([metrics[f"{name}.{i}"] for i in range(len(own))]) for name, own in task.bins().items()}
        seen = task, metrics[DEVICES], sums, metrics[NOISE], frozenset(version.manifest.survivors)
        found.append(Observed(record.round, *seen))
    return found
