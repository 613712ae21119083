"""The counts of an evaluation: what a sum may be, and what of it is published."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from aggregation import rotation
from aggregation.errors import ConfigError, DataError
from aggregation.privacy.accounting import Mechanism
from aggregation.spec import COUNTS, Privacy, SessionSpec
from edgeadapt.formats.layout import Layout, Tensors
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.rounds.evaluation import RENEWAL, SIZE, EvaluationTask, evaluated, renewed
from edgeadapt.rounds.sums import UNIFORMS, Bounds, noisy_vector
from tests.support import refused
from tests.support.fleet import session_spec

TASK = EvaluationTask(PeftConfig("LORA", 2, 4, ("query",)), ("on", "off"), "a" * 64, "b" * 64, 32)
DEVICES, DIGEST, NORM = 60, b"d" * 32, 32 * 2**0.5
HEAD: Tensors = {
    "classifier.weight": np.zeros((2, 5), np.float32),
    "classifier.bias": np.zeros(2, np.float32),
    "query.lora_A.weight": np.ones((2, 5), np.float32),
}


def spec_of(noise: float = 5.0, ring_bits: int | None = None) -> SessionSpec:
    layout, bounds = Layout.of(HEAD), Bounds(NORM, 1, 32, DEVICES, noise)
    vector = TASK.vector(layout, replace(bounds, ring_bits=ring_bits or TASK.ring_bits(layout, bounds)))
    privacy = Privacy(Mechanism.SKELLAM, 20, 1e-6)
    own = {"vector": vector, "clip_norm": NORM, "weight_cap": 1, "privacy": privacy}
    return session_spec(DEVICES, **own)


def counts_of(device: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Of one device: a third of them has the newest release, which is right in a half, and the others in 3 of 4."""
    return np.array([16.0, 32.0, 0, 0]) if device % 3 == 0 else np.array([0, 0, 24.0, 32.0])


def test_a_sum_without_noise_or_beyond_its_ring_is_refused() -> None:
    """Nobody can tell a device how many others have its release: an exact sum could be its own counts."""
    with refused(ConfigError, "noise"):
        spec_of(noise=0.0, ring_bits=32)
    with refused(ConfigError, "ring.bits"):
        spec_of(ring_bits=65)


def rotated(*counts: float) -> dict[str, Any]:
    return {COUNTS: rotation.rotate(np.array(counts, np.float64), rotation.seed(DIGEST))}


def test_a_release_with_few_examples_is_not_published() -> None:
    spec = spec_of()
    deviation = {"deviation": pytest.approx(5.0 * DEVICES**0.5)}
    assert evaluated(spec, rotated(98.4, 99.4, 0, 0), DEVICES, DIGEST) == deviation
    found = evaluated(spec, rotated(0, 0, 75.4, 100.4), DEVICES, DIGEST)
    assert found == deviation | {"accuracy_previous": 0.75, "examples_previous": 100.0}


def noisy_metrics(seed: int, noise: float) -> dict[str, float]:
    spec = spec_of(noise)
    total = np.zeros(SIZE, np.uint64)
    for device in range(DEVICES):
        rng, key = np.random.default_rng([seed, device]), bytes([seed, device]) * 16
        total += noisy_vector(counts_of(device), spec, DIGEST, rng, key).astype(np.uint64)
    width = spec.vector.to_ring(np.zeros(1, np.int64)).dtype
    return evaluated(spec, spec.vector.decode(total.astype(width), DEVICES), DEVICES, DIGEST)


def test_with_noise_the_counts_have_the_deviation_that_is_published_and_no_other() -> None:
    noise = 5.0
    found = [noisy_metrics(seed, noise) for seed in range(150)]
    stated = found[0]["deviation"]
    assert stated == pytest.approx(noise * DEVICES**0.5)
    errors = np.array(
        [each["examples_newest"] - 640 for each in found] + [e["examples_previous"] - 1280 for e in found]
    )
    # 300 draws: the root mean square is within 20 % of the deviation, except with chances below 1e-5.
    assert 0.8 * stated < np.sqrt((errors**2).mean()) < 1.2 * stated
    assert np.mean([each["accuracy_previous"] for each in found]) == pytest.approx(0.75, abs=0.02)


def test_the_next_adapter_has_other_bytes_the_same_for_all_sums_and_hardly_moves() -> None:
    made, again = renewed(HEAD, DIGEST), renewed(HEAD, DIGEST)
    assert made["classifier.weight"].tobytes() == again["classifier.weight"].tobytes()
    assert made["classifier.weight"].tobytes() != HEAD["classifier.weight"].tobytes()
    assert np.abs(made["classifier.weight"]).max() <= RENEWAL * UNIFORMS / 2
    assert all(made[name] is HEAD[name] for name in HEAD if name != "classifier.weight")
    assert renewed(HEAD, b"e" * 32)["classifier.weight"].tobytes() != made["classifier.weight"].tobytes()
    with refused(DataError, "task.head"):
        renewed({"query.lora_A.weight": HEAD["query.lora_A.weight"]}, DIGEST)
