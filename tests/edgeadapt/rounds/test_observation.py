"""What devices answered, as shares: what a device contributes, and what is published of the sum."""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation.errors import ConfigError, DataError, ProtocolError
from aggregation.privacy.accounting import Mechanism
from aggregation.spec import Privacy, SessionSpec
from edgeadapt.formats.layout import Layout, Tensors
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.rounds.observation import (
    DAYS,
    DEVICES,
    LATENCY,
    LEAST,
    LONGEST,
    NOISE,
    PRESENT,
    SINCE,
    UNKNOWN,
    ObservationRounds,
    ObservationTask,
    keys,
)
from edgeadapt.rounds.roundtask import RoundOf
from edgeadapt.rounds.sums import Bounds, noisy_vector
from tests.support import refused
from tests.support.fleet import session_spec

CONFIG, LABELS, RELEASE = PeftConfig("LORA", 2, 4, ("query",)), ("on", "off"), "a" * 64
ALL = ("labels", "probability", "doubt", "unknown", "latency", "adapter", "lessons")
TASK = ObservationTask(CONFIG, LABELS, ALL, 20_000, 7, (RELEASE,))
FLEET, DIGEST = 60, b"d" * 32
HEAD: Tensors = {
    "classifier.weight": np.zeros((2, 5), np.float32),
    "classifier.bias": np.zeros(2, np.float32),
    "query.lora_A.weight": np.ones((2, 5), np.float32),
}


def bound_of(task: ObservationTask) -> float:
    return ObservationRounds(histograms=task.histograms, releases=task.releases).bound(1.0, False)


def spec_of(task: ObservationTask, noise: float, ring_bits: int | None = None) -> SessionSpec:
    layout, bounds = Layout.of(HEAD), Bounds(bound_of(task), 1, 32, FLEET, noise)
    vector = task.vector(layout, replace(bounds, ring_bits=ring_bits or task.ring_bits(layout, bounds)))
    privacy = Privacy(Mechanism.SKELLAM, 20, 1e-6)
    return session_spec(FLEET, **{"vector": vector, "clip_norm": bound_of(task), "weight_cap": 1, "privacy": privacy})


def counts_of(*answers: tuple[Any, ...]) -> Counter[str]:
    """Counts of (label, probability, unknown, seconds, adapter), each so many times."""
    return Counter(key for *answer, times in answers for key in keys(*answer) * times)


def test_each_answer_counts_once_in_each_histogram() -> None:
    found = keys("on", 0.73, 0.2, 0.012, RELEASE)
    assert found == ["labels/on", "unknown/2", "latency/2", f"adapter/{RELEASE}", "lessons/answered", "probability/7"]
    assert keys("on", 1.0, 0.0, 0.0, RELEASE)[-1] == "probability/9"
    assert keys(None, 0.0, 1.0, 9.0, RELEASE)[:3] == ["labels/", f"unknown/{len(UNKNOWN)}", f"latency/{len(LATENCY)}"]


def test_a_contribution_has_the_shares_of_all_answers_whatever_their_number() -> None:
    counts = counts_of(("on", 0.95, 0.0, 0.001, RELEASE, 90), ("gone", 0.31, 0.3, 0.03, "b" * 64, 10))
    counts["lessons/corrected"] = 5
    shares = dict(
        zip(ALL, np.split(TASK.shares(counts)[1:], np.cumsum([len(b) for b in TASK.bins().values()])[:-1]), strict=True)
    )
    assert TASK.shares(counts)[0] == PRESENT
    assert shares["doubt"].tolist() == [0.1]
    assert shares["probability"].tolist() == [0.0, 0.0, 0.0, 0.1, *[0.0] * 5]  # the usual bin, the last, is the rest
    assert shares["unknown"].tolist() == [0.0, 0.0, 0.1, 0.0]
    assert shares["lessons"].tolist() == [0.05, 0.0]
    assert shares["labels"] == pytest.approx(LONGEST * np.array([0.9, 0.0, 0.1]) / np.hypot(0.9, 0.1))  # shortened
    assert shares["adapter"] == pytest.approx([LONGEST])
    many = Counter({key: 7 * count for key, count in counts.items()})
    np.testing.assert_allclose(TASK.shares(many), TASK.shares(counts))


@given(
    st.dictionaries(
        st.sampled_from(sorted({k for bins in TASK.bins().values() for b in bins for k in b})), st.integers(0, 10**6)
    )
)
def test_no_contribution_is_longer_than_the_bound(counts: dict[str, int]) -> None:
    counts["lessons/answered"] = max(LEAST, *(counts.values() or [0]))
    assert np.linalg.norm(TASK.shares(counts)) <= bound_of(TASK) * (1 + 1e-12)


def test_a_device_with_few_answers_contributes_zeros() -> None:
    counts = counts_of(("on", 0.95, 0.0, 0.001, RELEASE, LEAST - 1))
    assert not TASK.shares(counts).any()
    assert TASK.shares({}).shape == (TASK.noisy_size(Layout.of(HEAD)),)


def test_nothing_is_observed_without_noise() -> None:
    with refused(ConfigError, "noise"):
        spec_of(TASK, noise=0.0, ring_bits=32)
    with refused(DataError, "vector.observed"):
        TASK.check_exact(spec_of(TASK, 1.0), {}, 3)


def test_a_task_names_each_histogram_and_release_once() -> None:
    for change in ({"histograms": ("doubt", "doubt")}, {"releases": (RELEASE, RELEASE)}, {"releases": ()}):
        with refused(ProtocolError, "task.histograms"):
            replace(TASK, **change).check()
    made = ObservationRounds(rounds=1, histograms=("doubt",), since=3, days=2)
    assert made.task(RoundOf(CONFIG, LABELS, 0, None, False)).since == 3  # type: ignore[arg-type]


def test_with_noise_the_sums_have_the_deviation_that_is_published_and_no_other() -> None:
    task, noise = replace(TASK, histograms=("doubt", "labels")), 0.2
    spec, counts = (
        spec_of(task, noise),
        counts_of(("on", 0.95, 0.0, 0.001, RELEASE, 90), ("off", 0.31, 0.0, 0.03, RELEASE, 10)),
    )
    found = []
    for seed in range(150):
        total = np.zeros(task.noisy_size(Layout.of(HEAD)), np.uint64)
        for device in range(FLEET):
            rng, key = np.random.default_rng([seed, device]), bytes([seed, device]) * 16
            total += noisy_vector(task.shares(counts), spec, DIGEST, rng, key).astype(np.uint64)
        width = spec.vector.to_ring(np.zeros(1, np.int64)).dtype
        found.append(task.metrics(spec, spec.vector.decode(total.astype(width), FLEET), FLEET, DIGEST))
    stated = found[0][NOISE]
    assert stated == pytest.approx(noise * FLEET**0.5)
    errors = np.array([each["doubt.0"] - 0.1 * FLEET for each in found])
    assert 0.75 * stated < np.sqrt((errors**2).mean()) < 1.25 * stated  # 150 draws: beyond it with chances below 1e-5
    assert np.mean([each[DEVICES] for each in found]) == pytest.approx(FLEET, abs=5 * stated / PRESENT / 150**0.5)
    assert (found[0][SINCE], found[0][DAYS]) == (TASK.since, TASK.days)
    assert found[0].keys() == {DEVICES, NOISE, SINCE, DAYS, "doubt.0", "labels.0", "labels.1", "labels.2"}
