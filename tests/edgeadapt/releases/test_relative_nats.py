"""Two releases of a language model are compared through the noise of devices: an adapter that needs 5 % more nats per
byte is found worse, an equal one is not. Only the texts are drawn; what contributes, adds up and decides is real."""

import hashlib
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest

from aggregation.errors import DataError
from aggregation.spec import SessionSpec
from coordinator.settings import FederationSettings
from edgeadapt.formats.layout import Layout, TensorSpec
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.promotion.gates import GateSettings
from edgeadapt.releases.verdict import Verdict, verdict
from edgeadapt.rounds.evaluation import EvaluationTask, relative
from edgeadapt.rounds.sums import noisy_vector
from tests.support import refused

MARGIN, DEVICES, SEEDS = GateSettings().accuracy.margin, 200, 20
TASK = EvaluationTask(PeftConfig.lora(2, 4), (), "a" * 64, "b" * 64, 32)
LAYOUT = Layout((TensorSpec("q.lora_A.weight", (2, 5)),))
TABLE: dict[str, Any] = {"rounds": 1, "newest": TASK.newest, "previous": TASK.previous}
SPEC: SessionSpec = FederationSettings.parse({"rounds": 1, "evaluation": TABLE}, "").session_spec(
    DEVICES, LAYOUT, "0" * 64, 1, TASK
)


@cache
def found(seed: int, more: float, *, offered: float = 0.97, own: float = 0.03, devices: int = DEVICES) -> Any:
    """The metrics of an evaluation with the noise of the default settings. The newest release needs ``more`` times the
    nats of the previous one, and the adapter on offer ``offered`` times, give or take a share ``own`` on a device."""
    rng, digest = np.random.default_rng(seed), hashlib.sha256(bytes([seed])).digest()
    total = np.zeros(SPEC.vector.size, SPEC.vector.to_ring(np.zeros(1, np.int64)).dtype)
    unit = SPEC.clip_norm / 3**0.5
    for device in range(devices):
        previous, newest = rng.lognormal(0.3, 0.4), bool(device % 2)  # one author's texts are harder than another's
        nats = previous * (more if newest else 1.0) * rng.lognormal(0.0, own)
        vector = unit * relative(newest, nats, offered * previous)
        total += noisy_vector(vector, SPEC, digest, rng, rng.bytes(32))
    return TASK.metrics(SPEC, SPEC.vector.decode(total, devices), devices, digest)


def worse(judge: Callable[[Any], Verdict | None], **given: Any) -> int:
    return sum(bool(one and one.worse) for one in (judge(found(seed, **given)) for seed in range(SEEDS)))


def test_an_adapter_that_is_5_percent_worse_is_found_and_an_equal_one_is_not() -> None:
    def judge(metrics: Any) -> Verdict | None:
        return verdict(metrics, MARGIN)

    assert worse(judge, more=1.05) >= 19
    assert worse(judge, more=1.0) <= 1
    assert worse(judge, more=0.95) == 0


def test_at_the_margin_itself_the_level_is_held_and_without_the_noise_in_it_it_would_not_be() -> None:
    def judge(metrics: Any) -> Verdict | None:
        return verdict(metrics, 0.0)

    def careless(metrics: Any) -> Verdict | None:
        return verdict(metrics | {"deviation": metrics["deviation"] / 8}, 0.0)

    assert worse(judge, more=1.0) <= 1
    assert worse(careless, more=1.0) > 1


def test_where_devices_differ_much_or_are_few_or_are_cut_off_nothing_is_found() -> None:
    wide = verdict(found(1, 1.05, own=0.4), MARGIN)
    assert wide is not None
    assert not wide.worse
    assert verdict(found(1, 1.05, devices=12), MARGIN) is None
    assert verdict(found(1, 1.05, offered=0.5), MARGIN) is None  # both releases are beyond what counts


def test_figures_of_no_evaluation_are_refused() -> None:
    metrics = found(1, 1.05)
    for name, value in {"relative_nats_newest": -1.1, "relative_square": 1.5, "devices_previous": 0.0}.items():
        with refused(DataError, "metrics"):
            verdict(metrics | {name: value}, MARGIN)
    assert verdict({name: value for name, value in metrics.items() if name != "relative_square"}, MARGIN) is None


def test_a_device_counts_within_bounds_whatever_its_losses_are() -> None:
    for release, reference in ((0.0, 5.0), (20.0, 0.0), (0.0, 0.0), (1e-30, 20.0)):
        assert np.linalg.norm(relative(False, release, reference)) <= 3**0.5
    assert relative(True, 1.0, 1.0).tolist() == [0, 1, 0, 0, 0]
    assert relative(False, 2.0, 1.0).tolist() == [0, 0, 1, 1, 1]
    assert relative(False, 1.0, 1.05)[2] == pytest.approx(-np.log(1.05) / 0.15)
