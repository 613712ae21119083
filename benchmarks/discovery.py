"""Whether 'coordinator discover' finds the hidden groups of a fleet, and what an adapter for each is worth.

    python -m benchmarks discovery --bundle e5/bundle --data households
    python -m benchmarks discovery --bundle minilm/bundle --data newsgroups

500 devices with 16 texts each are of six languages (households), or have posts of one of six topics (20 newsgroups).
The round's own task encodes what they contribute, with the noise of its default. A fifth of the devices take no part,
and are asked. The peers: k-means on the devices' means without noise; IFCA (Ghosh et al. 2020), in which each device
joins the head with the least loss on its texts, on plain sums; and the same devices with
their texts shuffled among all of them. Heads are ridge regressions on the bundle's embeddings.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from client.inference.session import ClassificationSession
from coordinator.settings import FederationSettings
from edgeadapt.formats.layout import Floats, Layout
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.rounds.discovery import Cells, DiscoveryTask, found, k_means
from edgeadapt.rounds.ridge import Matrix, moments_of, ridge, unit_rows
from edgeadapt.rounds.sums import noisy_vector
from simulations.data import newsgroups
from simulations.data.households import PopulationSettings, sample_population

LANGUAGES = ("de", "en", "es", "fr", "it", "nl")
DEVICES, TEXTS, ASKED, UNSEEN, AT_ONCE = 500, 16, 16, 100, 64
SEEDS = range(100, 103)
MOST, SMALLEST, CELLS, PUBLIC, DELTA = 6, 20, 24, 1500, 1e-5
STRENGTH, OWN, ROUNDS = 1e-3, 4.0, 10  # of a head for each text; texts that a shared head counts for; steps of IFCA
TOPICS = (("comp",), ("rec.autos", "rec.motorcycles"), ("rec.sport",), ("sci",), ("talk",), ("soc", "alt"))
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Device:
    """``hidden``: the number of its group. ``asked`` and ``right``: held-out texts and their labels."""

    hidden: int
    texts: Floats
    labels: Labels
    asked: Floats
    right: Labels


Sampled = tuple[list[tuple[int, list[tuple[str, int]]]], list[str], int]  # devices' texts, public texts, labels


def households(seed: int) -> Sampled:
    # A household has 40 phrases or more in its three parts.
    settings = PopulationSettings(households=DEVICES, languages=LANGUAGES, public_languages=("population",))
    population = sample_population(settings, seed)
    devices = [
        (LANGUAGES.index(one.language), [(text.text, text.label) for text in (*one.train, *one.validation, *one.test)])
        for one in population.clients
    ]
    return devices, [one.text for one in population.public], len(population.labels)


def posts(seed: int) -> Sampled:
    rng, rows = np.random.default_rng(seed), list(newsgroups.rows())
    names = sorted({row["label"] for row in rows})
    by_topic = [
        [(row["text"], names.index(row["label"])) for row in rows if row["label"].startswith(topic)] for topic in TOPICS
    ]
    public = []
    for texts in by_topic:
        rng.shuffle(texts)
        public += [text for text, _ in texts[: PUBLIC // len(TOPICS)]]
        del texts[: PUBLIC // len(TOPICS)]
    devices: list[tuple[int, list[tuple[str, int]]]] = []
    while len(devices) < DEVICES:
        topic = int(rng.integers(len(TOPICS)))
        if len(by_topic[topic]) >= TEXTS + ASKED:
            devices.append((topic, [by_topic[topic].pop() for _ in range(TEXTS + ASKED)]))
        elif max(map(len, by_topic)) < TEXTS + ASKED:
            break
    return devices, public, len(names)


def fleet(session: ClassificationSession, sampled: Sampled, seed: int) -> tuple[list[Device], Floats]:
    def embedded(texts: Sequence[str]) -> Floats:
        parts = [session.embed(texts[first : first + AT_ONCE]) for first in range(0, len(texts), AT_ONCE)]
        return np.concatenate(parts)

    rng, (drawn, public, _) = np.random.default_rng(seed), sampled
    devices = []
    for hidden, texts in drawn:
        own = [texts[place] for place in rng.permutation(len(texts))[: TEXTS + ASKED]]
        vectors, labels = embedded([text for text, _ in own]), np.array([label for _, label in own], np.int64)
        devices.append(Device(hidden, vectors[:TEXTS], labels[:TEXTS], vectors[TEXTS:], labels[TEXTS:]))
    return devices, embedded(public[:PUBLIC])


def discovered(devices: Sequence[Device], public: Floats, labels: int, seed: int) -> tuple[Matrix, Matrix, int, float]:
    """Run the round's task. Returns weight and bias of the router, the number of groups, and epsilon."""
    cells = Cells.of(public, CELLS)
    task = DiscoveryTask(PeftConfig.lora(), tuple(map(str, range(labels))), cells.encode(), CELLS)
    hidden = public.shape[1]
    layout = Layout.of(
        {"classifier.weight": np.zeros((labels, hidden), np.float32), "classifier.bias": np.zeros(labels, np.float32)}
    )
    table = {"rounds": 1, "discovery": {"rounds": 1, "cells": cells.encode(), "count": CELLS}}
    spec = FederationSettings.parse(table, "benchmark").session_spec(len(devices), layout, "0" * 64, 1, task)
    digest, total = bytes(32), np.zeros(spec.vector.size, np.uint64)
    for number, device in enumerate(devices):
        rng, key = np.random.default_rng([seed, number]), seed.to_bytes(16, "big") + number.to_bytes(16, "big")
        total += noisy_vector(cells.contributed(device.texts), spec, digest, rng, key).astype(np.uint64)
    sums = spec.vector.decode(spec.vector.to_ring(total.astype(np.int64)), len(devices))
    groups = found(task.metrics(spec, sums, len(devices), digest), MOST, SMALLEST)
    weight, bias = (part.astype(np.float64) for part in cells.router([one.center for one in groups]))
    return weight, bias, len(groups), spec.spent(len(devices)).epsilon(DELTA)


def joined(devices: Sequence[Device], mean: Matrix, labels: int, seed: int) -> list[int]:
    """Return the group of each device by IFCA, from random groups."""
    own = np.random.default_rng(seed).integers(0, MOST, len(devices))
    for _ in range(ROUNDS):
        heads = [
            _head([one for one, group in zip(devices, own, strict=True) if group == at], mean, labels)
            for at in range(MOST)
        ]
        own = np.array([np.argmin([_loss(one, head, mean) for head in heads]) for one in devices])
    return [int(one) for one in own]


def fitted(rows: Matrix, labels: Labels, count: int) -> Matrix:
    return ridge(moments_of(rows, labels, count), np.zeros((rows.shape[1], count)), STRENGTH * len(rows))


def _rows(texts: Floats, mean: Matrix) -> Matrix:
    return unit_rows(texts - mean)


def _head(devices: Sequence[Device], mean: Matrix, labels: int) -> Matrix:
    if not devices:
        return np.zeros((mean.size, labels))
    texts = _rows(np.concatenate([one.texts for one in devices]), mean)
    return fitted(texts, np.concatenate([one.labels for one in devices]), labels)


def _loss(device: Device, head: Matrix, mean: Matrix) -> float:
    wrong = _rows(device.texts, mean) @ head
    wrong[np.arange(len(wrong)), device.labels] -= 1
    return float(np.square(wrong).sum())


def rand(one: Sequence[int], other: Sequence[int]) -> float:
    """Return the adjusted Rand index of two partitions."""
    table = np.zeros((max(one) + 1, max(other) + 1))
    np.add.at(table, (list(one), list(other)), 1)
    pairs = [float((counts * (counts - 1) / 2).sum()) for counts in (table, table.sum(1), table.sum(0))]
    expected = pairs[1] * pairs[2] / (len(one) * (len(one) - 1) / 2)
    return (pairs[0] - expected) / ((pairs[1] + pairs[2]) / 2 - expected)


def measure(
    session: ClassificationSession, data: str, report: Callable[[str], object]
) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Return a row for each seed, of how well groups are found, and one for each device that is asked, of the shares of
    its texts that are answered right."""
    by_seed, by_device = [], []
    for seed in SEEDS:
        report(f"{data}, seed {seed}")
        sampled = (households if data == "households" else posts)(seed)
        devices, public = fleet(session, sampled, seed)
        labels, seen, others = sampled[2], devices[UNSEEN:], devices[:UNSEEN]
        mean = np.concatenate([one.texts for one in seen]).mean(axis=0)
        weight, bias, count, epsilon = discovered(seen, public, labels, seed)

        def group(device: Device, weight: Matrix = weight, bias: Matrix = bias) -> int:
            return int((device.texts @ weight.T + bias).mean(axis=0).argmax())

        texts = np.random.default_rng(seed).permutation(np.concatenate([one.texts for one in seen]))
        mixed = [replace(one, texts=own) for one, own in zip(seen, texts.reshape(len(seen), TEXTS, -1), strict=True)]
        hidden, own = [one.hidden for one in seen], [group(one) for one in seen]
        means = unit_rows(np.stack([one.texts.mean(axis=0) for one in seen]) - mean)
        plain = (means @ k_means(means, np.ones(len(means)), MOST).T).argmax(axis=1)
        ifca = joined(seen, mean, labels, seed)
        by_seed.append(
            {
                "devices": len(seen),
                "epsilon": epsilon,
                "groups": count,
                "groups, shuffled": discovered(mixed, public, labels, seed)[2],
                "discovered": rand(own, hidden),
                "k-means": rand([int(one) for one in plain], hidden),
                "IFCA": rand(ifca, hidden),
            }
        )
        one_head = _head(seen, mean, labels)
        heads = [
            _head([one for one, at in zip(seen, own, strict=True) if at == number], mean, labels)
            for number in range(count)
        ]
        true = [_head([one for one in seen if one.hidden == number], mean, labels) for number in range(6)]
        for device in others:
            asked, texts = _rows(device.asked, mean), _rows(device.texts, mean)

            def right(head: Matrix, asked: Matrix = asked, device: Device = device) -> float:
                return float(np.mean((asked @ head).argmax(axis=1) == device.right))

            def personal(head: Matrix, texts: Matrix = texts, device: Device = device) -> Matrix:
                return ridge(moments_of(texts, device.labels, head.shape[1]), head, OWN)

            its = heads[group(device)]
            by_device.append(
                {
                    "one for all": right(one_head),
                    "its group's": right(its),
                    "hidden group's": right(true[device.hidden]),
                    "one, personal": right(personal(one_head)),
                    "group's, personal": right(personal(its)),
                    "own alone": right(personal(np.zeros_like(one_head))),
                }
            )
    return by_seed, by_device


def table(by_seed: Sequence[dict[str, float]], by_device: Sequence[dict[str, float]]) -> str:
    """Format the median and the range over seeds, then means over devices with a bootstrap of 95 % of the gains."""
    lines = []
    for name in by_seed[0]:
        found = [row[name] for row in by_seed]
        lines.append(f"{name:<18}{np.median(found):>8.2f} ({min(found):.2f} to {max(found):.2f})")
    draws = np.random.default_rng(0).integers(0, len(by_device), (2000, len(by_device)))
    lines.append(f"{len(by_device)} devices{'':<7}accuracy")
    pairs = {"its group's": "one for all", "group's, personal": "one, personal"}
    for name in by_device[0]:
        values = np.array([row[name] for row in by_device])
        gained = ""
        if against := pairs.get(name):
            gains = values - np.array([row[against] for row in by_device])
            low, high = np.quantile(gains[draws].mean(axis=1), [0.025, 0.975])
            gained = f"  {gains.mean():+.3f} ({low:+.3f} to {high:+.3f}) over {against}"
        lines.append(f"{name:<18}{values.mean():>8.3f}{gained}")
    return "\n".join(lines)
