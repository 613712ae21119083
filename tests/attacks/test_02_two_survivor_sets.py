"""Two unmask requests in one round: in one the victim survived, in the other it dropped out."""

from collections.abc import Callable
from typing import Any

import pytest

from aggregation.errors import ProtocolError
from aggregation.messages import Survivors, Unmask, UnmaskResponse
from aggregation.singleuse import SingleUse
from aggregation.spec import Adversary
from tests.support import refused

VICTIM = "device-002"


def two_sets(coordinator: Any) -> tuple[Survivors, Survivors]:
    digests, plan = coordinator.digests(), coordinator.plan.digest()
    return Survivors(plan, digests), Survivors(plan, {name: digests[name] for name in digests if name != VICTIM})


def asked_twice(coordinator: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Send every device except the victim both requests, each from its state before the first."""
    fleet = coordinator.fleet
    with_victim, without = two_sets(coordinator)
    seeds, keys = {}, {}
    for name in sorted(set(coordinator.uploads) - {VICTIM}):
        before = fleet.states[name]
        seeds[name] = coordinator.open_verified(
            name, UnmaskResponse, coordinator.ask(name, "on_unmask", Unmask(with_victim, {}))
        ).seeds
        fleet.states[name] = before
        keys[name] = coordinator.open_verified(
            name, UnmaskResponse, coordinator.ask(name, "on_unmask", Unmask(without, {}))
        ).keys
    return seeds, keys


def test_a_device_reveals_shares_for_one_survivor_set_in_a_round(malicious: Callable[..., Any]) -> None:
    coordinator = malicious()
    coordinator.collect()
    with refused(ProtocolError, "single-use", value="unmask-response"):
        asked_twice(coordinator)


def test_a_device_signs_one_survivor_set_in_a_round(malicious: Callable[..., Any]) -> None:
    coordinator = malicious(Adversary.ACTIVE)
    coordinator.collect()
    first, second = two_sets(coordinator)
    masked = coordinator.fleet.states["device-000"]
    coordinator.ask("device-000", "on_survivors", first)
    coordinator.fleet.states["device-000"] = masked
    with refused(ProtocolError, "single-use", value="consistency-signature"):
        coordinator.ask("device-000", "on_survivors", second)


def test_a_device_reveals_shares_only_for_the_survivor_set_that_it_signed(malicious: Callable[..., Any]) -> None:
    coordinator = malicious(Adversary.ACTIVE)
    coordinator.collect()
    first, second = two_sets(coordinator)
    coordinator.ask("device-000", "on_survivors", first)
    with refused(ProtocolError, "unmask.survivors", peer="coordinator"):
        coordinator.ask("device-000", "on_unmask", Unmask(second, {}))


def test_the_threshold_lets_no_two_groups_answer_differently(malicious: Callable[..., Any]) -> None:
    # One request for each device: with t of n on either side of the lie, some device would have to answer both.
    coordinator = malicious()
    coordinator.collect()
    with_victim, without = two_sets(coordinator)
    seeds, keys = {}, {}
    for number, name in enumerate(sorted(set(coordinator.uploads) - {VICTIM})):
        request = with_victim if number < 2 else without
        response = coordinator.open_verified(
            name, UnmaskResponse, coordinator.ask(name, "on_unmask", Unmask(request, {}))
        )
        seeds[name], keys[name] = response.seeds, response.keys
    recovery = coordinator.recover(seeds, keys)
    assert recovery.seed(VICTIM) is None or recovery.mask_key(VICTIM) is None


def test_without_single_use_the_victim_is_exposed(
    malicious: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    coordinator = malicious()
    coordinator.collect()
    monkeypatch.setattr(SingleUse, "take", lambda self, what: None)
    recovery = coordinator.recover(*asked_twice(coordinator))
    seed, key = recovery.seed(VICTIM), recovery.mask_key(VICTIM)
    coordinator.assert_exposed(VICTIM, coordinator.unmask_upload(VICTIM, seed, {VICTIM: key}))
