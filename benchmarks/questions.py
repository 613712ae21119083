"""What labels are worth that a device asks for, against as many or more of texts at random and of the newest ones.

    python -m benchmarks questions --bundle phone/bundle --data households

Devices that took part in nothing answer with a head that all others' texts made, embedded by the bundle's base. Each
asks three questions at a time and fits its own head after them ("logistic" of the personal step). Test texts of other
templates, or no near-duplicates, are what is measured.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from client.inference.session import ClassificationSession
from client.learning.questions import worth_asking
from client.training.logistic import Matrix, logistic_head, with_constant
from client.training.personal import PENALTY
from edgeadapt.formats.layout import Floats
from simulations.data import populate
from simulations.data.households import PopulationSettings
from simulations.data.population import LabelledText, Population
from simulations.data.tables import DataSettings

SEEDS = range(100, 105)
AT_ONCE, FEW, MANY, DRAWS = 3, 24, 40, 10  # questions, labels, and draws at random
UNSEEN = 0.2  # of 15 clients
POPULATIONS = {
    "households": (
        DataSettings(),
        PopulationSettings(
            languages=("en", "de", "fr"), unseen=UNSEEN, utterances_min=200, utterances_max=200, test_utterances=80
        ),
    ),
    "reuters": (
        DataSettings(
            function="simulations.data.newsgroups:reuters",
            partition="dirichlet",
            clients=15,
            concentration=0.3,
            unseen=UNSEEN,
            holdout_fraction=0.4,
        ),
        PopulationSettings(),
    ),
}
Embedded = tuple[Floats, NDArray[np.int64]]  # texts and their labels
ASKED = f"asked {FEW}"


def shares(head: Matrix, pool: Embedded, test: Embedded, rng: np.random.Generator) -> dict[str, float]:
    """Measure the shares of right answers to a device's test texts, by what it was taught of its pool, oldest first."""
    texts, labels = pool

    def fitted(rows: Sequence[int]) -> Matrix:
        some = list(rows)
        x, ones = with_constant(texts[some]), np.ones(len(some))
        return logistic_head(x, labels[some], ones, head.shape[1], PENALTY, prior=head) if some else head

    def right(rows: Sequence[int]) -> float:
        return float(np.mean((with_constant(test[0]) @ fitted(rows)).argmax(axis=1) == test[1]))

    def random(count: int) -> float:
        rows = (rng.permutation(len(labels))[:count].tolist() for _ in range(DRAWS))
        return float(np.mean([right(some) for some in rows]))

    asked, every = list[int](), range(len(labels))
    while len(asked) < min(FEW, len(labels)):
        left = [row for row in every if row not in asked]
        outputs = with_constant(texts[left]) @ fitted(asked)
        odds = np.exp(outputs - outputs.max(axis=1, keepdims=True))
        best = np.sort(odds / odds.sum(axis=1, keepdims=True))[:, -2:]
        doubts = 1 - (best[:, 1] - best[:, 0])
        asked += [left[row] for row in worth_asking(doubts, texts[left], texts[asked], AT_ONCE)]
    return {
        "none": right(()),
        ASKED: right(asked),
        f"random {FEW}": random(FEW),
        f"random {MANY}": random(MANY),
        f"newest {MANY}": right(every[-MANY:]),
        "all": right(every),
    }


def embedding(session: ClassificationSession) -> Callable[[Sequence[LabelledText]], Embedded]:
    """Embed texts by the base of a bundle, each once, with their labels."""
    vector: Callable[[str], Floats] = cache(lambda text: session.embed([text])[0])
    return lambda texts: (
        np.stack([vector(one.text) for one in texts]),
        np.array([one.label for one in texts], np.int64),
    )


def shared_head(population: Population, embedded: Callable[[Sequence[LabelledText]], Embedded]) -> Matrix:
    """Fit a head to the public texts and those of the clients that take part."""
    shared = [one for client in population.clients if not client.unseen for one in client.train]
    x, labels = embedded([*population.public, *shared])
    return logistic_head(with_constant(x), labels, np.ones(len(x)), len(population.labels), PENALTY)


def measure(session: ClassificationSession, data: str, report: Callable[[str], object]) -> list[dict[str, float]]:
    """Measure ``shares`` of each unseen client of each seed."""
    embedded, rows = embedding(session), []
    for seed in SEEDS:
        report(f"seed {seed}")
        population = populate(*POPULATIONS[data], seed).population
        head, rng = shared_head(population, embedded), np.random.default_rng(seed)
        rows += [
            shares(head, embedded(client.train), embedded(client.test), rng)
            for client in population.clients
            if client.unseen and client.test
        ]
    return rows


def table(rows: Sequence[Mapping[str, float]], ours: str) -> str:
    """Format medians over devices, and what ``ours`` gains on average, with a bootstrap over devices of 95 %."""
    draws = np.random.default_rng(0).integers(0, len(rows), (2000, len(rows)))
    lines = [f"{len(rows)} devices{'':<6}median  {ours} gains"]
    for name in rows[0]:
        gains = np.array([row[ours] - row[name] for row in rows])
        low, high = np.quantile(gains[draws].mean(axis=1), [0.025, 0.975])
        median = np.median([row[name] for row in rows])
        lines.append(f"{name:<16}{median:>7.3f}  {gains.mean():+.3f} ({low:+.3f} to {high:+.3f})")
    return "\n".join(lines)
