"""A round of discovery: which groups of devices have texts of a kind of their own, from one sum that always has noise.

Devices train nothing. The task has ``Cells``, which divide the embeddings of public texts. A device whose owner allows
it contributes, in the cell nearest to the mean of its texts, a count and where in the span of the cells that mean is.
There are more cells than groups, so k-means on the means of the cells (``found``) finds groups that no cell foresaw,
and no device's cell or group leaves it but in the sum. The sums are published, as they are private already; the adapter
stays what it was, as in an evaluation."""

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from aggregation import rotation
from aggregation.errors import ConfigError, DataError, ProtocolError
from aggregation.ring import Ring
from aggregation.session import COORDINATOR
from aggregation.spec import CELLS, SessionSpec
from edgeadapt.formats.layout import Floats, Layout
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.rounds import optimizer
from edgeadapt.rounds.analytic import ClassifierHead
from edgeadapt.rounds.evaluation import CountingTask
from edgeadapt.rounds.ridge import Matrix, unit_rows
from edgeadapt.rounds.roundtask import DeviceRound, KindSettings, RoundOf, RoundTask, noisy
from edgeadapt.rounds.sums import Sums, Vector

NOISE, ASKED = "discovery_noise", "discovery_cells"  # metrics: deviation of each number; which cells were asked for
LEAST = 8  # texts of a device that contributes; not the coordinator's choice
PRESENT = 0.5  # what a device adds to the count of its cell; its place there has the rest of a norm of 1
PLACE = math.sqrt(1 - PRESENT**2)
MOST_CELLS = 32
STARTS, STEPS = 20, 50  # of k-means
SEEN = 2.0  # deviations of the noise which the count of a cell has at least, to say anything
GROUPED = 0.7  # least cohesion of groups; devices with texts of all kinds have .55 or less
ENOUGH = 0.03  # of cohesion: fewer groups that are as much alike are preferred
DECIMALS = 3  # of a sum
SCALE = 16.0  # logit of a cosine of 1 to a group's center
_APART = 2.0**-20  # added to the squares of the cells, so that they are never dependent

Encoded = Annotated[str, Field(max_length=2**19)]
Count = Annotated[int, Field(ge=2, le=MOST_CELLS)]


@dataclass(frozen=True)
class Cells:
    """Divide embeddings by the nearest of ``rows``, of L2 norm 1 and shape ``(cells, hidden)``, once they are centered
    at ``mean``, shape ``(hidden,)``."""

    mean: Vector
    rows: Matrix

    @classmethod
    def of(cls, public: Floats, count: int) -> Self:
        """Divide the embeddings of public texts by k-means. Raises DataError: the texts are too few."""
        if len(public) < 4 * count:
            text = f"{len(public)} public texts cannot make {count} cells: give {4 * count} or more"
            raise DataError(text, about="--texts")
        rows = unit_rows(public)
        mean = rows.mean(axis=0)
        centers = k_means(unit_rows(rows - mean), np.ones(len(rows)), count)
        return cls.decode(cls(mean, centers).encode(), count)

    def encode(self) -> str:
        """Encode rows of little-endian float16 in base64, the mean first."""
        return base64.b64encode(np.vstack([self.mean, self.rows]).astype("<f2").tobytes()).decode()

    @classmethod
    def decode(cls, text: str, count: int) -> Self:
        """Read what ``encode`` made of ``count`` cells. Raises ValueError: it is not that."""
        raw = base64.b64decode(text, validate=True)
        if not raw or len(raw) % (2 * (count + 1)):
            raise ValueError(f"{len(raw)} bytes are not {count} cells and a mean")
        rows = np.frombuffer(raw, "<f2").reshape(count + 1, -1)
        if not (np.isfinite(rows).all() and rows[1:].any(axis=1).all()):
            raise ValueError("a cell is not finite, or zero")
        return cls(rows[0].astype(np.float64), unit_rows(rows[1:]))

    @cached_property
    def _lower(self) -> Matrix:
        square = self.rows @ self.rows.T + _APART * np.eye(len(self.rows))
        return np.linalg.cholesky(square).astype(np.float64)

    @cached_property
    def digest(self) -> float:
        """The first 48 bits of the SHA-256 of ``encode``, a number that a metric can hold."""
        return float(int.from_bytes(hashlib.sha256(self.encode().encode()).digest()[:6], "big"))

    def placed(self, centered: Matrix) -> Matrix:
        """Return where rows of shape ``(n, hidden)`` are in the span of the cells: shape ``(n, cells)``, of L2 norm 1.
        Coordinates are by an orthonormal basis that follows from the cells in their order."""
        return unit_rows(np.linalg.solve(self._lower, self.rows @ centered.T).T)

    def router(self, centers: Sequence[Vector]) -> tuple[Floats, Floats]:
        """Return weight and bias of a head on unit embeddings whose labels are groups with these ``centers``."""
        weight = SCALE * unit_rows((self.rows.T @ np.linalg.solve(self._lower.T, np.stack(centers).T)).T)
        return weight.astype(np.float32), (-weight @ self.mean).astype(np.float32)

    def centered(self, embeddings: Floats) -> Matrix:
        return unit_rows(unit_rows(embeddings) - self.mean)

    def contributed(self, embeddings: Floats) -> Vector:
        """Return what a device with these texts contributes: shape ``(cells · (cells + 1),)`` and L2 norm 1, or zeros
        of one with fewer than ``LEAST`` texts."""
        blocks = np.zeros((len(self.rows), len(self.rows) + 1))
        if len(embeddings) >= LEAST:
            mean = self.centered(embeddings).mean(axis=0, keepdims=True)
            blocks[int((self.rows @ mean[0]).argmax())] = [PRESENT, *(PLACE * self.placed(mean)[0])]
        return blocks.ravel()


@dataclass(frozen=True, slots=True)
class DiscoveryTask(CountingTask):
    """Asks in which of ``count`` cells (``Cells.encode``) a device's texts are, and where there."""

    RULE: ClassVar[optimizer.ServerOptimizer | None] = optimizer.Observation()
    SEGMENT: ClassVar[str] = CELLS
    NO_NOISE: ClassVar[str] = "where texts are is not summed without noise: set discovery.noise_multiplier"
    CONSENT: ClassVar[str] = "observations"
    NEED_NO_LIMIT: ClassVar[dict[str, str]] = {"count": "2 to 32: the noise of each sum is accounted for"}

    peft_config: PeftConfig
    labels: tuple[str, ...]
    cells: Encoded
    count: Count

    def check(self) -> None:
        RoundTask.check(self)
        try:
            self.divided()
        except ValueError as error:
            raise ProtocolError(f"the cells are none: {error}", COORDINATOR, about="task.cells") from None

    def divided(self) -> Cells:
        return Cells.decode(self.cells, self.count)

    def terms(self) -> dict[str, float | str]:
        return {"discovery.cells": self.divided().digest}

    def noisy_size(self, layout: Layout) -> int:
        if (hidden := ClassifierHead.of(layout).hidden) != (size := len(self.divided().mean)):
            text = f"the cells divide embeddings of {size} numbers, and those of the adapter have {hidden}"
            raise DataError(text, about="task.cells")
        return self.count * (self.count + 1)

    def contribute(self, device: DeviceRound) -> Ring:
        nothing = np.zeros(device.spec.vector.size)
        return noisy(device, lambda: self.divided().contributed(device.embedded()), lambda: nothing)

    def metrics(self, spec: SessionSpec, values: Sums, survivors: int, digest: bytes) -> dict[str, float]:
        """Return the sum by cell: of ``cell.N.0`` in devices, of the others in devices at a place of 1; and ``NOISE``,
        the deviation of each of the others."""
        sums = rotation.rotate_back(values[CELLS], rotation.seed(digest)).reshape(self.count, -1)
        sums /= np.array([PRESENT] + [PLACE] * self.count)
        table = {f"cell.{i}.{j}": round(float(one), DECIMALS) for (i, j), one in np.ndenumerate(sums)}
        noise = spec.vector.segment(CELLS).noise * math.sqrt(survivors) / PLACE
        return table | {NOISE: noise, ASKED: self.divided().digest}


class DiscoveryRounds(KindSettings):
    """Rounds that sum where the texts of devices are, after all others."""

    KIND: ClassVar[type[RoundTask]] = DiscoveryTask

    rounds: int = Field(default=0, ge=0)
    """how many of the rounds, the last ones, discover groups and do not train"""
    cells: Encoded = ""
    """what divides the embeddings, as edgeadapt coordinator discover writes it"""
    count: Count = 24
    """number of cells, several for each group that may be found"""
    noise_multiplier: float = Field(default=1.6, gt=0, le=1000)
    """standard deviation of the noise, as privacy.noise_multiplier, also in a federation without noise; in one that has
    more, that"""

    @model_validator(mode="after")
    def _has_cells(self) -> Self:
        if self.rounds:
            Cells.decode(self.cells, self.count)
        return self

    def task(self, of: RoundOf) -> DiscoveryTask:
        return DiscoveryTask(of.peft_config, of.labels, self.cells, self.count)

    def bound(self, clip_norm: float, noisy: bool) -> float:
        return 1.0

    def multiplier(self, federation: float) -> float:
        return max(federation, self.noise_multiplier)


@dataclass(frozen=True)
class Group:
    """``center``: of its devices' places, L2 norm 1 and shape ``(cells,)``. ``devices``: about how many it has."""

    center: Vector
    devices: float


def found(metrics: Mapping[str, float], most: int, smallest: int) -> list[Group]:
    """Find the groups in the metrics of a round, the largest first: at most ``most``, and each of ``smallest`` devices
    or more, as far as the noise lets see. Of numbers of groups which the noise does not tell apart, it is the fewest;
    one, if devices are not alike in any. What is smaller belongs to the nearest group. Raises ConfigError: the noise
    hides as many devices."""
    count = math.isqrt(sum(name.startswith("cell.") for name in metrics))
    sums = np.array([[metrics[f"cell.{i}.{j}"] for j in range(count + 1)] for i in range(count)])
    hidden = metrics[NOISE] * PLACE / PRESENT  # deviation of a count
    if (seen := float(sums[:, 0].sum())) < max(smallest, 3 * hidden * math.sqrt(count)):
        text = f"about {max(seen, 0):.0f} devices contributed, and the noise hides {3 * hidden * math.sqrt(count):.0f}"
        raise ConfigError(f"{text}: a larger fleet is needed, or fewer cells", about="discovery")
    sums = sums[sums[:, 0] > SEEN * hidden]  # the others show noise
    places, weights = sums[:, 1:] / sums[:, :1], sums[:, 0]
    places /= np.maximum(np.linalg.norm(places, axis=1, keepdims=True), 1.0)
    by_number = [k_means(places, weights, number) for number in range(1, min(most, len(sums)) + 1)]
    alike = [_cohesion(sums, (places @ centers.T).argmax(axis=1), metrics[NOISE]) for centers in by_number]
    visible = max(ENOUGH, metrics[NOISE] * math.sqrt(len(sums)) / seen)
    fewest = next(number for number, one in enumerate(alike) if one >= max(alike) - visible)
    centers = by_number[fewest if max(alike) >= GROUPED else 0]
    while True:
        nearest = (places @ centers.T).argmax(axis=1)
        sizes = np.bincount(nearest, sums[:, 0], len(centers))
        if sizes.min() >= smallest or len(centers) == 1:
            break
        centers = np.delete(centers, sizes.argmin(), axis=0)
    return sorted(map(Group, centers, sizes.tolist()), key=lambda one: -one.devices)


def _cohesion(sums: Matrix, own: NDArray[np.intp], noise: float) -> float:
    """Measure how much alike the devices of a group are: the length of the mean of their places, without what noise
    adds, over all groups. ``own``: the group of each cell. About 1 where all devices of a group are at one place."""
    longest = 0.0
    for group in range(own.max() + 1):
        cells = sums[own == group]
        square = float(np.square(cells[:, 1:].sum(axis=0)).sum()) - cells[:, 1:].size * noise**2
        longest += math.sqrt(max(square, 0.0))
    return longest / float(sums[:, 0].sum())


def k_means(rows: Matrix, weights: Vector, count: int) -> Matrix:
    """Return ``count`` centers of rows of shape ``(n, d)``, scaled to L2 norm 1: spherical k-means, the best of
    ``STARTS`` from k-means++ with a fixed seed."""
    rng, best, least = np.random.default_rng(0), rows[:1], math.inf
    weights, lengths = np.maximum(weights, 1e-9), np.linalg.norm(rows, axis=1)
    for _ in range(STARTS):
        centers, far = np.empty((0, rows.shape[1])), weights
        while len(centers) < count:
            centers = np.vstack([centers, unit_rows(rows[rng.choice(len(rows), 1, p=far / far.sum())])])
            far = weights * np.maximum(lengths - (rows @ centers.T).max(axis=1), 1e-12)
        for _ in range(STEPS):
            own = (rows @ centers.T).argmax(axis=1)
            sums = np.stack([(weights[own == one, None] * rows[own == one]).sum(axis=0) for one in range(count)])
            centers, before = np.where(sums.any(axis=1, keepdims=True), unit_rows(sums), centers), centers
            if np.array_equal(before, centers):
                break
        if (cost := -float(weights @ (rows @ centers.T).max(axis=1))) < least:
            best, least = centers, cost
    return best
