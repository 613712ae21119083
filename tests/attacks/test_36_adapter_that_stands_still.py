"""Two sums from adapters that hardly differ, with and without a device: their difference is that device's update.

The coordinator follows the protocol in every round, except that it withholds a plan from the victim. Its settings make
the adapter of the next round one with other bytes and the same gradients. Relatives: an adapter
that comes back near an old one, and rounds of second moments, for which the head makes no difference. The devices run
the real ClientApp; the coordinator does not keep the cohort, as an honest one does after such a round.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from aggregation import rotation
from client.node import sumhistory
from coordinator import lastsum, rounds
from tests.support import FleetOf
from tests.support.subtracting import VICTIM, Subtracting, fleet_without_proofs

Floats = NDArray[np.float64]
FINE = {
    "aggregation__ring_bits": 40,  # so that rounding hides nothing
    "training__batch_size": 64,  # one batch holds all examples of a device
    "training__optimizer": "sgd",
    "training__learning_rate": 0.05,
}
MOMENTS = {"analytic__rounds": 2, "aggregation__ring_bits": 32}


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices take every adapter for one that moved."""
    monkeypatch.setattr(sumhistory, "_separation", lambda *_: float("inf"))


def without_the_victim(
    app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch, count: int = 2, **more: Any
) -> tuple[Subtracting, Any, Any]:
    """So many rounds, of which the victim does not get the last plan."""
    monkeypatch.setattr(lastsum, "binding", lambda *_: None)
    settings = {"rounds": count, "aggregation__session_rounds": count, **FINE, **more}
    fleet = fleet_without_proofs(app_fleet_of, **settings)
    attack = Subtracting(monkeypatch, aborted=(), withheld={str(count)})
    return attack, fleet.federate(fleet.grid(app=attack)), fleet


def sum_of(attack: Subtracting, fleet: Any, number: int) -> Floats:
    """The updates in the sum of a round, counted from 0, rotated back."""
    return rotated_back(fleet, number, attack.deltas[number])


def rotated_back(fleet: Any, number: int, delta: Floats) -> Floats:
    digest = bytes.fromhex(fleet.registry().version(number).manifest.sha256)
    return rotation.rotate_back(delta, rotation.seed(digest))


def error(attack: Subtracting, fleet: Any) -> float:
    """L2 error of the victim's update in the difference of the first sum and the last, relative to that update."""
    true = rotated_back(fleet, 0, attack.signed(attack.vectors[VICTIM, 0])[attack.delta] * attack.steps[0])
    found = sum_of(attack, fleet, 0) - sum_of(attack, fleet, len(attack.deltas) - 1)
    return float(np.linalg.norm(found - true) / np.linalg.norm(true))


def refused_by_the_others(records: Any, step: str) -> bool:
    return records[-1].version is None and set(records[-1].dropped.values()) == {"plan", step}


TINY = pytest.mark.parametrize(
    ("tiny", "limit"),
    [
        ({"server__learning_rate": 1e-6}, 1e-3),
        ({"training__learning_rate": 1e-5}, 0.05),
        ({"aggregation__clip_norm": 1e-6}, 1e-3),
    ],
    ids=lambda tiny: next(iter(tiny)).replace("__", ".") if isinstance(tiny, dict) else "",
)


@TINY
def test_no_sum_from_an_adapter_that_stood_still_lacks_a_single_device(
    app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch, tiny: dict[str, float], limit: float
) -> None:
    attack, records, _ = without_the_victim(app_fleet_of, monkeypatch, **tiny)
    assert len(attack.sums) == 1
    assert refused_by_the_others(records, "survivors")


@TINY
@pytest.mark.usefixtures("unchecked")
def test_otherwise_the_difference_is_the_update(
    app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch, tiny: dict[str, float], limit: float
) -> None:
    attack, records, fleet = without_the_victim(app_fleet_of, monkeypatch, **tiny)
    assert [VICTIM in record.survivors for record in records] == [True, False]
    assert error(attack, fleet) < limit


def publishes(monkeypatch: pytest.MonkeyPatch, *steps: Callable[[Floats], Floats]) -> None:
    """The coordinator publishes what these make of the first adapter, one after each round."""
    made: list[Any] = []

    def step(rule: Any, state: Any, adapter: Any, mean: Any) -> tuple[Any, Any]:
        made.append(adapter)
        return state, steps[min(len(made), len(steps)) - 1](made[0].astype(float)).astype(np.float32)

    monkeypatch.setattr(rounds.optimizer, "step", step)


def far_and_back(app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch) -> tuple[Subtracting, Any, Any]:
    """Version 1 is far from version 0, and version 2 near it; round 3 is without the victim."""
    publishes(monkeypatch, lambda first: first + 0.1, lambda first: first + 1e-7)
    return without_the_victim(app_fleet_of, monkeypatch, 3)


def test_no_adapter_returns_near_an_old_one(app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch) -> None:
    attack, records, _ = far_and_back(app_fleet_of, monkeypatch)
    assert [record.version for record in records] == [1, 2, None]
    assert refused_by_the_others(records, "survivors")
    assert len(attack.sums) == 2


@pytest.mark.usefixtures("unchecked")
def test_otherwise_two_sums_of_three_give_the_update(app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch) -> None:
    attack, records, fleet = far_and_back(app_fleet_of, monkeypatch)
    assert [record.version for record in records] == [1, 2, 3]
    assert error(attack, fleet) < 1e-3


def test_no_second_sum_of_moments_lacks_a_single_device(app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch) -> None:
    attack, records, _ = without_the_victim(app_fleet_of, monkeypatch, **MOMENTS)
    assert len(attack.sums) == 1
    assert refused_by_the_others(records, "survivors")


@pytest.mark.usefixtures("unchecked")
def test_otherwise_their_difference_is_the_moments_of_the_device(
    app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    attack, _, _ = without_the_victim(app_fleet_of, monkeypatch, **MOMENTS)
    assert len(attack.sums) == 2
    true, found = attack.sent()[attack.delta], attack.found()[attack.delta]
    assert float(np.linalg.norm(found - true) / np.linalg.norm(true)) < 1e-3


def test_a_crafted_adapter_is_far_away_and_gives_the_same_update(
    app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What remains without noise: no distance tells that all logits have grown alike. An audit recomputes the step."""
    publishes(monkeypatch, lambda first: first + np.where(np.arange(first.size) < 3, 1.0, 0.0))  # the head's biases
    attack, records, fleet = without_the_victim(app_fleet_of, monkeypatch)
    assert [record.version for record in records] == [1, 2]
    assert error(attack, fleet) < 1e-3
