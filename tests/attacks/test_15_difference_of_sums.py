"""Two sums from one adapter, with and without a device: their difference is that device's update.

The coordinator runs a round, keeps the sum, logs the round as aborted and repeats it without the victim. Or it goes
back to an adapter that it has a sum from, also under a new number; or it repeats the round over the same devices with a
weight cap that only the victim exceeds. It runs its own ServerApp, of which only the end of a round and the choice of
the adapter are changed; the devices run the real ClientApp, and most demand no proofs, so that nothing but the checks
under test stops the coordinator.
"""

from typing import Any

import numpy as np
import pytest

from aggregation.messages import Plan
from aggregation.spec import SessionSpec
from client.node import adapterstate
from client.node.adapterstate import AdapterState
from client.node.snapshot import Draw, Snapshot
from coordinator import rounds
from coordinator.registry import Registry, StoredAdapter
from tests.support import FleetOf
from tests.support.subtracting import DEVICES, VICTIM, Subtracting, any_set, fleet_without_proofs

pytestmark = pytest.mark.usefixtures("by_bytes_only")


def known_order(snapshot: Snapshot, plan: Plan, draw: Draw) -> np.random.Generator:
    """As it was: seeds that the coordinator knows, the same in every round from an adapter."""
    return np.random.default_rng([plan.adapter_version, list(Draw).index(draw)])


def no_check(known: AdapterState | None, plan: Plan, spec: SessionSpec, maximum_repeats: int) -> AdapterState:
    return AdapterState(plan.adapter_version, plan.adapter_digest, bytes(32))


# One batch holds all examples of a device, so that their order changes nothing, and an update has thousands of steps,
# so that rounding hides nothing.
BARE = {"training__batch_size": 64, "aggregation__ring_bits": 40}

SESSIONS = pytest.mark.parametrize("session_rounds", [2, 1], ids=["in one session", "in the next session"])


def without_the_victim(
    app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch, session_rounds: int, **more: Any
) -> tuple[Subtracting, Any]:
    """Round 1 is aborted after its sum, and repeated without the victim."""
    settings = {"aggregation__session_rounds": session_rounds, "training__batch_size": 2, **more}
    fleet = fleet_without_proofs(app_fleet_of, rounds=2, **settings)
    attack = Subtracting(monkeypatch, aborted={1}, withheld={"2"})
    return attack, fleet.federate(fleet.grid(app=attack))


@SESSIONS
def test_no_second_sum_from_an_adapter_lacks_a_single_device(
    app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch, session_rounds: int
) -> None:
    attack, records = without_the_victim(app_fleet_of, monkeypatch, session_rounds)
    assert len(attack.sums) == 1
    others = {f"device-{number:02d}": "survivors" for number in range(1, DEVICES)}
    assert records[1].dropped == {VICTIM: "plan", **others}


@SESSIONS
def test_with_known_seeds_the_difference_would_be_the_upload_bit_for_bit(
    app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch, session_rounds: int
) -> None:
    monkeypatch.setattr(adapterstate, "on_survivors", any_set)
    monkeypatch.setattr(Snapshot, "generator", known_order)
    attack, records = without_the_victim(app_fleet_of, monkeypatch, session_rounds)
    assert [VICTIM in record.survivors for record in records] == [False, False]
    assert np.array_equal(attack.found(), attack.sent())


def test_the_secret_order_of_the_others_is_an_error_in_the_difference(
    app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No guarantee: the error is as large as what another order changes in the updates of the others."""
    monkeypatch.setattr(adapterstate, "on_survivors", any_set)
    attack, _ = without_the_victim(app_fleet_of, monkeypatch, session_rounds=2)
    changed = [
        attack.signed(attack.vectors[name, 0] - attack.vectors[name, 1])
        for name in sorted({device for device, _ in attack.vectors} - {VICTIM})
    ]
    assert len(changed) == DEVICES - 1
    assert np.array_equal(attack.found() - attack.sent(), np.sum(changed, axis=0))
    assert attack.relative_error() > 0.5


def test_the_secret_order_hides_nothing_if_one_batch_holds_all_examples(
    app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A coordinator may choose such a batch, so that the order is no substitute for the limit on sums."""
    monkeypatch.setattr(adapterstate, "on_survivors", any_set)
    attack, _ = without_the_victim(app_fleet_of, monkeypatch, session_rounds=2, **BARE)
    assert attack.relative_error() < 1e-3


@pytest.mark.parametrize("repeats", [0, 1])
def test_no_adapter_gives_more_sums_than_the_owners_allow(
    app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch, repeats: int
) -> None:
    fleet = fleet_without_proofs(app_fleet_of, rounds=4, aggregation__session_rounds=2)
    for state_dir in (fleet.out / "devices").iterdir():
        with (state_dir / "device.toml").open("a") as file:
            file.write(f"maximum_repeats = {repeats}\n")
    attack = Subtracting(monkeypatch, aborted=range(9))
    records = fleet.federate(fleet.grid(app=attack))
    assert len(attack.sums) == 1 + repeats
    assert [len(record.dropped) for record in records] == [0] * (1 + repeats) + [DEVICES] * (3 - repeats)


def test_without_the_limit_every_round_gives_a_sum(app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapterstate, "on_plan", no_check)
    fleet = fleet_without_proofs(app_fleet_of, rounds=4, aggregation__session_rounds=2)
    attack = Subtracting(monkeypatch, aborted=range(9))
    fleet.federate(fleet.grid(app=attack))
    assert len(attack.sums) == 4


def going_back(app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch) -> tuple[Subtracting, Any]:
    """Rounds 1 and 2 follow the protocol; round 3 distributes the adapter of round 1, and not to the victim."""
    newest, asked = Registry.newest_adapter, [0]

    def older(registry: Registry) -> StoredAdapter:
        asked[0] += 1
        if asked[0] < 3:
            return newest(registry)
        return StoredAdapter(registry.version(0).manifest, registry.blob(0), registry.tensors(0))

    monkeypatch.setattr(Registry, "newest_adapter", older)
    fleet = fleet_without_proofs(app_fleet_of, rounds=3, **BARE)
    attack = Subtracting(monkeypatch, aborted={3}, withheld={"3"})
    return attack, fleet.federate(fleet.grid(app=attack))


def test_no_device_trains_from_an_old_adapter(app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch) -> None:
    attack, records = going_back(app_fleet_of, monkeypatch)
    assert [record.version for record in records] == [1, 2, None]
    assert len(attack.sums) == 2
    assert set(records[2].dropped.values()) == {"plan"}


def test_a_second_sum_from_an_old_adapter_would_give_the_update(
    app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapterstate, "on_plan", no_check)
    attack, _ = going_back(app_fleet_of, monkeypatch)
    assert len(attack.sums) == 3
    assert attack.relative_error() < 1e-3


def there_and_back(app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch) -> tuple[Subtracting, Any]:
    """Version 1 differs from version 0 in one bit, and version 2 is version 0 again; round 3 is without the victim.

    The log names each as the result of its round, and the devices demand its proofs.
    """
    made: list[Any] = []

    def step(rule: Any, state: Any, adapter: Any, mean: Any) -> tuple[Any, Any]:
        made.append(adapter.copy())
        if len(made) > 1:
            return state, made[0]
        adapter[-1] = np.nextafter(adapter[-1], np.float32(1))
        return state, adapter

    monkeypatch.setattr(rounds.optimizer, "step", step)
    fleet = app_fleet_of(8, rounds=3, aggregation__session_rounds=3, **BARE)
    attack = Subtracting(monkeypatch, aborted=(), withheld={"3"})
    records = fleet.federate(fleet.grid(app=attack))
    published = [fleet.registry().version(number).manifest.sha256 for number in range(3)]
    assert published[0] == published[2] != published[1]
    return attack, records


def test_no_device_returns_to_an_adapter_under_a_new_number(
    app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    attack, records = there_and_back(app_fleet_of, monkeypatch)
    assert [record.version for record in records] == [1, 2, None]
    assert len(attack.sums) == 2
    assert set(records[2].dropped.values()) == {"plan"}


def test_otherwise_two_sums_of_three_give_the_update(app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapterstate, "earlier", lambda known: ())
    attack, _ = there_and_back(app_fleet_of, monkeypatch)
    assert len(attack.sums) == 3
    assert attack.relative_error() < 1e-3


HEAVY = "device-04"  # has 8 training examples; nobody has more than 7 besides


def with_a_lower_cap(app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch) -> tuple[Subtracting, Any]:
    """Two rounds over all devices; in the second, a device counts with at most 7 examples."""
    fleet = fleet_without_proofs(app_fleet_of, rounds=1, aggregation__session_rounds=1, aggregation__ring_bits=40)
    attack = Subtracting(monkeypatch, aborted={1})
    fleet.federate(fleet.grid(app=attack))
    fleet.configure({"rounds": 2, "aggregation.weight_cap": 7})
    monkeypatch.setattr("coordinator.rounds._require_same_terms", lambda *_: None)  # an honest one refuses to start
    return attack, fleet.federate(fleet.grid(app=attack))


def test_a_repeat_with_other_bounds_is_refused(app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch) -> None:
    attack, records = with_a_lower_cap(app_fleet_of, monkeypatch)
    assert len(attack.sums) == 1
    assert set(records[1].dropped.values()) == {"plan"}


def test_a_repeat_with_other_bounds_would_give_the_update_of_the_one_device_that_they_bind(
    app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapterstate, "terms", lambda plan, spec: bytes(32))
    attack, records = with_a_lower_cap(app_fleet_of, monkeypatch)
    assert records[1].dropped == {}
    found, sent = attack.deltas[0] - attack.deltas[1], attack.signed(attack.vectors[HEAVY, 0])[attack.delta]
    cosine = float(found @ sent / np.linalg.norm(found) / np.linalg.norm(sent))
    assert cosine > 0.999
