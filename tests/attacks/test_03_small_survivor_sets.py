"""Survivor sets that isolate a victim: too small, empty, or without the receiving device."""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import pytest

from aggregation import checks, envelope
from aggregation.errors import ProtocolError
from aggregation.messages import Assignment, Survivors, Unmask, UnmaskResponse
from aggregation.spec import Adversary
from tests.support import refused

VICTIM = "device-002"
SETS: dict[str, Collection[str]] = {
    "the victim alone": (VICTIM,),
    "nobody": (),
    "below the threshold": ("device-000", "device-001", VICTIM),
}


def isolating(coordinator: Any, survivors: Collection[str]) -> Survivors:
    digests = coordinator.digests()
    return Survivors(coordinator.plan.digest(), {name: digests[name] for name in survivors})


@pytest.mark.parametrize("survivors", SETS.values(), ids=SETS)
@pytest.mark.parametrize("adversary", Adversary)
def test_no_device_unmasks_a_survivor_set_that_isolates_the_victim(
    malicious: Callable[..., Any], adversary: Adversary, survivors: Collection[str]
) -> None:
    coordinator = malicious(adversary)
    coordinator.collect()
    message = isolating(coordinator, survivors)
    active = adversary is Adversary.ACTIVE
    for name in coordinator.uploads:
        with refused(ProtocolError, "survivors.size" if name in survivors else "survivors.self"):
            coordinator.ask(name, "on_survivors" if active else "on_unmask", message if active else Unmask(message, {}))


def test_no_device_unmasks_a_survivor_set_without_itself(malicious: Callable[..., Any]) -> None:
    coordinator = malicious()
    coordinator.collect()
    message = isolating(coordinator, sorted(set(coordinator.uploads) - {"device-000"}))
    with refused(ProtocolError, "survivors.self", peer="coordinator"):
        coordinator.ask("device-000", "on_unmask", Unmask(message, {}))


def test_without_the_check_the_victim_is_exposed(
    malicious: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    coordinator = malicious()
    coordinator.collect()
    monkeypatch.setattr(checks, "survivors", lambda *given: None)
    message = Unmask(isolating(coordinator, (VICTIM,)), {})
    found = {
        name: coordinator.open_verified(name, UnmaskResponse, coordinator.ask(name, "on_unmask", message))
        for name in coordinator.uploads
    }
    recovery = coordinator.recover({n: o.seeds for n, o in found.items()}, {n: o.keys for n, o in found.items()})
    keys = {name: recovery.mask_key(name) for name in coordinator.uploads if name != VICTIM}
    coordinator.assert_exposed(VICTIM, coordinator.unmask_upload(VICTIM, recovery.seed(VICTIM), keys))


def test_invented_members_do_not_make_a_plan_large_enough(sparse: Callable[..., Any]) -> None:
    """On a sparse graph a device has no shares of most others, so the coordinator invents members."""
    fleet = sparse(12, degree=4, threshold=4, minimum_survivors=10).fleet
    session = fleet.establish()
    _, plans = fleet.begin(session)
    neighborhood = {VICTIM, *session.session.neighbors(VICTIM, session.devices)}
    message = envelope.open_verified(Assignment, plans[VICTIM], fleet.key.public, "coordinator")
    for invented, about, value in ((["ghost-1", "zed"], "plan.members", "ghost-1"), ([], "plan.size", 8)):
        members = tuple(sorted([*neighborhood, *invented, *sorted(set(session.devices) - neighborhood)[:3]]))
        lie = envelope.sign(
            fleet.key, dataclasses.replace(message, plan=dataclasses.replace(message.plan, members=members))
        )
        with refused(ProtocolError, about, value=value):
            fleet.states[VICTIM].on_plan(fleet.devices[VICTIM], lie)
