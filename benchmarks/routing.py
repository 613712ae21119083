"""How often a router finds the adapter of a text, and what the answers are worth: against one adapter for all.

    python -m benchmarks routing --bundle e5/bundle

Households of six languages share a head by a sum of all, a head for each language by a sum of its households, and a
router by a sum in which each text has its language as the label: ridge regressions on the centered embeddings of a
bundle's base. Unseen households ask.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from client.inference.session import SURE, ClassificationSession
from edgeadapt.formats.layout import Floats
from edgeadapt.rounds.ridge import Matrix, moments_of, ridge, unit_rows
from simulations.data.households import PopulationSettings, sample_population
from simulations.data.population import LabelledText

LANGUAGES = ("de", "en", "es", "fr", "it", "nl")
HOUSEHOLDS, UNSEEN, AT_ONCE = 60, 0.2, 64
SEEDS = range(100, 103)
STRENGTH, SCALE = 1e-3, 16.0  # for each example, and logit of a score of 1: those of ``[analytic]``
Labels = NDArray[np.int64]


def fitted(rows: Matrix, labels: Labels, count: int) -> Matrix:
    return ridge(moments_of(rows, labels, count), np.zeros((rows.shape[1], count)), STRENGTH * len(rows))


def shares(
    texts: Matrix, labels: Labels, own: int, heads: Sequence[Matrix], one: Matrix, router: Matrix
) -> dict[str, float]:
    """Measure the shares of a household's texts that are answered right by each way to choose a head. ``own``: the
    number of its language; ``one``: the head of all."""
    answers = np.stack([(texts @ head).argmax(axis=1) for head in (*heads, one)])
    odds = np.exp(SCALE * (texts @ router))
    odds /= odds.sum(axis=1, keepdims=True)
    chosen = odds.argmax(axis=1)
    sure = np.where(odds.max(axis=1) >= SURE, chosen, len(heads))
    by = {"one for all": np.full_like(sure, len(heads)), "its own": np.full_like(sure, own), "router": sure}
    right = {name: float(np.mean(answers[which, np.arange(len(labels))] == labels)) for name, which in by.items()}
    return {**right, "language found": float(np.mean(chosen == own)), "unsure": float(np.mean(sure == len(heads)))}


def measure(session: ClassificationSession, report: Callable[[str], object]) -> list[dict[str, float]]:
    """Measure ``shares`` of each unseen household of each seed."""

    def embedded(texts: Sequence[LabelledText]) -> tuple[Floats, Labels]:
        parts = [[one.text for one in texts[first : first + AT_ONCE]] for first in range(0, len(texts), AT_ONCE)]
        return np.concatenate(list(map(session.embed, parts))), np.array([one.label for one in texts], np.int64)

    rows = []
    for seed in SEEDS:
        report(f"seed {seed}")
        settings = PopulationSettings(households=HOUSEHOLDS, languages=LANGUAGES, unseen=UNSEEN)
        population = sample_population(settings, seed)
        seen = [(client, *embedded(client.train)) for client in population.clients if not client.unseen]
        mean = np.concatenate([texts for _, texts, _ in seen]).mean(axis=0)
        texts = unit_rows(np.concatenate([texts for _, texts, _ in seen]) - mean)
        labels = np.concatenate([labels for *_, labels in seen])
        spoken = np.concatenate([[LANGUAGES.index(client.language)] * len(own) for client, _, own in seen])
        one, router = (fitted(texts, *what) for what in ((labels, len(population.labels)), (spoken, len(LANGUAGES))))
        heads = [
            fitted(texts[spoken == number], labels[spoken == number], len(population.labels))
            for number in range(len(LANGUAGES))
        ]
        for client in population.clients:
            if client.unseen and client.test:
                asked, right = embedded(client.test)
                own = LANGUAGES.index(client.language)
                rows.append(shares(unit_rows(asked - mean), right, own, heads, one, router))
    return rows


def table(rows: Sequence[Mapping[str, float]]) -> str:
    """Format means over households, with what the router gains, and a bootstrap over households of 95 %."""
    draws = np.random.default_rng(0).integers(0, len(rows), (2000, len(rows)))
    lines = [f"{len(rows)} households{'':<4}mean   router gains"]
    for name in rows[0]:
        values = np.array([row[name] for row in rows])
        gains = np.array([row["router"] for row in rows]) - values
        low, high = np.quantile(gains[draws].mean(axis=1), [0.025, 0.975])
        gained = f"  {gains.mean():+.3f} ({low:+.3f} to {high:+.3f})" if name in ("one for all", "its own") else ""
        lines.append(f"{name:<16}{values.mean():>6.3f}{gained}")
    return "\n".join(lines)
