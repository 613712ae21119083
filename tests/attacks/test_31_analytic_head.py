"""The head of a round of moments shows a reader neither how many examples there are, nor single ones of a few. And one
device that lies about its moments does not make the head what it likes, unless others could have made it so.

A reader has no device in the rounds. It knows the task, the head before and the next head, and here even the second
moments over the total, as if all embeddings were public in this form.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from edgeadapt.formats.layout import Layout, Tensors
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.methods.classifier import LexicalFeatures
from edgeadapt.rounds import analytic
from edgeadapt.rounds.analytic import (
    BIAS,
    WEIGHT,
    AnalyticTask,
    ClassifierHead,
    moment_contribution,
    moment_spec,
    solved,
)
from edgeadapt.rounds.ridge import EmbeddingMoments, Matrix, moments_of, pack, ridge
from edgeadapt.rounds.sums import UNIFORMS, Bounds
from tests.support.fleet import session_spec
from tests.support.hostile import audit_failures

D, LABELS, DEVICES, SCALE, CLIP = 24, 6, 12, analytic.Analytic().scale, analytic.Analytic().clip_norm
TASK = AnalyticTask(PeftConfig("LORA", 2, 4, ("query",)), tuple("abcdef"), 2e-4, SCALE)
BEFORE: Tensors = {WEIGHT: np.ones((LABELS, D), np.float32), BIAS: np.zeros(LABELS, np.float32)}


def draw(count: int, seed: int = 0) -> tuple[Matrix, Any]:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(count, D))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True), rng.integers(0, LABELS, count)


def published(rows: Matrix, labels: Any) -> Matrix:
    """The scores' weights of the next head, shape ``(D, LABELS)``."""
    vector = moment_spec(
        ClassifierHead.of(Layout.of(BEFORE)), Bounds(clip_norm=1.0, weight_cap=128, ring_bits=32, max_clients=DEVICES)
    )
    spec, found = session_spec(DEVICES, vector=vector, weight_cap=128), moments_of(rows, labels, LABELS)
    total = {"xx": pack(found.xx), "xy": found.xy.ravel(), "weight": np.array([found.weight])}
    total |= {name: np.zeros(1) for name in ("correct", "loss", "held_out")}
    return solved(spec, TASK, BEFORE, total, DEVICES, bytes(32))[WEIGHT].T.astype(np.float64) / SCALE


def means(head: Matrix, second: Matrix) -> Matrix:
    """Σ x yᵀ / W, from the head and Σ x xᵀ / W."""
    return (second + TASK.ridge * np.eye(len(second))) @ head - TASK.ridge / SCALE


def agreement(numbers: Matrix, weight: int) -> float:
    """How strongly 1 / weight shows as a period: 1 if all numbers are multiples of it, near 0 if none are."""
    return float(abs(np.mean(np.exp(2j * np.pi * numbers * weight))))


@pytest.mark.parametrize("count", [211, 337])
def test_the_products_with_a_constant_feature_would_show_the_total(count: int) -> None:
    rows, labels = draw(count)
    with_constant = np.hstack([rows, np.ones((count, 1))])
    targets = np.eye(LABELS)[labels]
    found = EmbeddingMoments(with_constant.T @ with_constant, with_constant.T @ targets, float(count))
    head = ridge(found, np.full((D + 1, LABELS), 1 / SCALE), TASK.ridge * count)
    shares = means(head, found.xx / count)[-1]  # of the labels
    shown = [agreement(shares, weight) for weight in range(2, 2 * count)]
    assert int(np.argmax(shown)) + 2 == count
    assert max(shown) > 0.999


@pytest.mark.parametrize("count", [211, 337])
def test_the_published_head_shows_no_total(count: int) -> None:
    rows, labels = draw(count)
    numbers = means(published(rows, labels), rows.T @ rows / count)
    assert np.allclose(numbers, rows.T @ np.eye(LABELS)[labels] / count, atol=0.01)
    assert agreement(numbers, count) < 4.5 / np.sqrt(numbers.size)


def directions(head: Matrix) -> int:
    """Directions of the next head that the one before lacks, beyond the noise."""
    largest_of_noise = 2 * analytic.NOISE * (np.sqrt(D) + np.sqrt(LABELS))
    return int((np.linalg.svd(head - 1 / SCALE, compute_uv=False) > largest_of_noise).sum())


@pytest.mark.parametrize("count", [1, 3])
def test_a_head_that_is_fitted_to_a_few_examples_shows_their_number_and_their_embeddings(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, labels = draw(count)[0], np.arange(count)
    assert directions(published(rows, labels)) == 0
    monkeypatch.setattr(analytic, "fewest_examples", lambda labels: 0)
    head = published(rows, labels)
    assert directions(head) == count
    left = np.linalg.svd(head - 1 / SCALE)[0][:, :count]
    assert np.allclose(np.linalg.norm(left.T @ rows.T, axis=0), 1, atol=0.01)  # the examples span these directions


# Lexical features: whoever has the sum itself, the coordinator, tests which tokens are in it.

TOKENS, SIZE, TEXTS = 3000, 384, 60  # of the fleet's languages; of an embedding's lexical part; of a device


def spoken(rng: np.random.Generator) -> tuple[set[int], Matrix]:
    """Which tokens a device's texts have, by Zipf's law with its own favourites, and the texts' lexical features."""
    order = rng.permutation(TOKENS)
    ids = np.minimum(rng.zipf(1.3, (TEXTS, 8)), TOKENS) - 1
    ids = np.where(rng.random(ids.shape) < 0.5, ids, order[ids])
    rows = LexicalFeatures(SIZE, ())(torch.from_numpy(ids), torch.ones(ids.shape)).numpy().astype(np.float64)
    return set(ids.ravel().tolist()), rows


def told_apart(second: Matrix, present: set[int]) -> float:
    """The area under the curve of a test for each token: is its row near the space that the moments span?"""
    signs = LexicalFeatures(SIZE, ()).signs[:TOKENS].numpy().astype(np.float64)
    values, vectors = np.linalg.eigh(second)
    far = ((signs @ vectors) ** 2 / (np.clip(values, 0, None) + 1e-3)).sum(1)
    ranks = np.argsort(np.argsort(-far)) + 1.0
    inside = np.isin(np.arange(TOKENS), list(present))
    count = int(inside.sum())
    return float((ranks[inside].sum() - count * (count + 1) / 2) / (count * (TOKENS - count)))


def test_exact_sums_of_lexical_features_show_tokens() -> None:
    rng = np.random.default_rng(0)
    devices = [spoken(rng) for _ in range(10)]
    said, alone = devices[0]
    assert told_apart(alone.T @ alone, said) > 0.99
    everything = set.union(*(tokens for tokens, _ in devices))
    assert told_apart(sum(rows.T @ rows for _, rows in devices), everything) > 0.8
    only_here = said - set.union(*(tokens for tokens, _ in devices[1:]))
    assert told_apart(sum(rows.T @ rows for _, rows in devices), only_here) > 0.7


# A multiplier of 1 is an epsilon above 4.
@pytest.mark.parametrize(("multiplier", "least", "most"), [(0.0, 0.65, 1.0), (1.0, 0.0, 0.6)])
def test_of_sums_that_correct_a_head_those_without_noise_show_tokens_and_those_with_noise_do_not(
    multiplier: float, least: float, most: float
) -> None:
    rng = np.random.default_rng(0)
    devices = [spoken(rng) for _ in range(10)]
    head: Tensors = {WEIGHT: rng.normal(size=(60, SIZE)).astype(np.float32), BIAS: np.zeros(60, np.float32)}
    found = [analytic.contributed(rows, rng.integers(0, 60, TEXTS), head) for _, rows in devices]
    clipped = sum(each * min(1.0, CLIP / float(np.linalg.norm(each))) for each in found)
    noisy = clipped + rng.normal(0, multiplier * CLIP, clipped.shape)
    corrected = analytic.whitening(analytic.spread(head[WEIGHT])) @ noisy.reshape(SIZE, 60)
    assert least < told_apart(corrected @ corrected.T, set.union(*(tokens for tokens, _ in devices))) < most


# One device that lies.

LIES = {
    "every second moment at its bound": lambda found, cap: replace(found, xx=np.full_like(found.xx, cap), weight=1.0),
    "a negative direction": lambda found, cap: replace(found, xx=-cap * np.eye(len(found.xx)), weight=cap),
    "labels at their bound": lambda found, cap: replace(found, xy=np.full_like(found.xy, cap), weight=1.0),
    "fewer examples than none": lambda found, cap: replace(found, weight=-cap),
}


def federate_with_a_liar(app_fleet_of: Any, monkeypatch: pytest.MonkeyPatch, lie: str) -> tuple[Any, Any]:
    """A round of an analytic head in which the first device that contributes lies."""
    liars = [LIES[lie]]

    def sent(found: Any, held_out: Any, spec: Any, rng: Any) -> Any:
        if not liars:
            return moment_contribution(found, held_out, spec, rng)
        lied = liars.pop()(found, float(spec.weight_cap))
        values = {name: np.zeros(1) for name in ("correct", "loss", "held_out")}
        values |= {"xx": pack(lied.xx), "xy": lied.xy.ravel(), "weight": np.array([lied.weight])}
        return spec.vector.encode(values, rng)

    monkeypatch.setattr("edgeadapt.rounds.analytic.moment_contribution", sent)
    settings = {"rounds": 1, "analytic__rounds": 1, "aggregation__keep_masked_inputs": True}
    fleet = app_fleet_of(8, **settings, aggregation__ring_bits=32)
    (record,) = fleet.federate(fleet.grid())
    return fleet, record


def moved(fleet: Any) -> float:
    before, after = fleet.registry().tensors(0), fleet.registry().tensors(1)
    return float(max(np.abs(after[name] - before[name]).max() for name in before))


@pytest.mark.parametrize("lie", LIES)
def test_moments_that_no_embeddings_have_count_as_zero(
    app_fleet_of: Any, monkeypatch: pytest.MonkeyPatch, lie: str
) -> None:
    fleet, record = federate_with_a_liar(app_fleet_of, monkeypatch, lie)
    assert (record.version, record.metrics) == (1, {})
    assert record.spoiled
    assert moved(fleet) <= SCALE * analytic.NOISE * UNIFORMS / 2 + 1e-5
    assert audit_failures(fleet.out / "coordinator") == set()


def test_without_the_check_they_make_the_head(app_fleet_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(analytic, "require_moments", lambda *given: None)
    monkeypatch.setattr(analytic, "fewest_examples", lambda labels: 0)
    fleet, record = federate_with_a_liar(app_fleet_of, monkeypatch, "labels at their bound")
    assert (record.version, record.spoiled) == (1, None)
    assert moved(fleet) > 2.5 * SCALE
