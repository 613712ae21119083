"""On a sparse graph: show two stretches of the ring order different survivor sets, and unmask what both have in common.

Each set is large enough and correct near its own stretch; far away it includes devices that the other stretch is shown
as dropouts. Between the stretches are devices that sign one set or the other and reveal no shares. If a device required
only the signatures of the devices that hold its shares, the sum would be over fewer devices than any device signed for:

    stretch one              gap   stretch two              gap
    A A A A A x x A A A A A  A B   B B B B B x x B B B B B  B A     x: a dropout, as its own side is shown
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from aggregation import checks, graph
from aggregation.errors import ProtocolError
from aggregation.messages import Survivors, Unmask, UnmaskResponse
from tests.support import refused

STRETCH, MINIMUM = 12, 26
SIDES = "A" * STRETCH + "AB" + "B" * STRETCH + "BA"  # in ring order: the set that each device is shown
DROPOUTS = {5: "A", 6: "A", 19: "B", 20: "B"}  # place in the order → the side on which it is a dropout


def shown_sets(coordinator: Any) -> tuple[dict[str, Survivors], list[str], list[str]]:
    """Device → the set that it is shown; then the devices in the sum, and those that are not."""
    coordinator.collect()
    order = graph.harary_order(coordinator.session.session.context, coordinator.fleet.devices)
    gone = {side: {order[place] for place, says in DROPOUTS.items() if says == side} for side in "AB"}
    sets = {
        side: Survivors(
            coordinator.plan.digest(), {n: d for n, d in coordinator.digests().items() if n not in gone[side]}
        )
        for side in "AB"
    }
    dropped = sorted(gone["A"] | gone["B"])
    shown = {order[place]: sets[side] for place, side in enumerate(SIDES) if order[place] not in dropped}
    return shown, sorted(set(order) - set(dropped)), dropped


def asked(coordinator: Any, shown: dict[str, Survivors]) -> dict[str, Unmask]:
    """Collect signatures; device → a request for its own set, if a threshold of its neighborhood signed it."""
    signed = {name: coordinator.consistency_signature(name, survivors) for name, survivors in sorted(shown.items())}
    out = {}
    for name, survivors in sorted(shown.items()):
        same = {other: signed[other] for other in sorted(signed) if shown[other] == survivors}
        if len(coordinator.session.session.neighbors(name, same)) + 1 >= coordinator.fleet.spec.threshold:
            out[name] = Unmask(survivors, same)
    return out


def test_no_device_unmasks_a_set_that_only_its_stretch_signed(sparse: Callable[..., Any]) -> None:
    coordinator = sparse(len(SIDES), degree=6, threshold=5, minimum_survivors=MINIMUM)
    shown, _, _ = shown_sets(coordinator)
    assert {len(survivors.vectors) for survivors in shown.values()} == {MINIMUM}
    lies = asked(coordinator, shown)
    assert len(lies) == len(SIDES) - len(DROPOUTS) - 4  # all except the gaps
    for name, lie in lies.items():
        with refused(ProtocolError, "unmask.quorum", peer="coordinator", value=12):
            coordinator.ask(name, "on_unmask", lie)


def test_with_signatures_of_the_neighborhood_only_a_sum_below_the_minimum_is_unmasked(
    sparse: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "consistency_signatures", nearby(checks.consistency_signatures))
    coordinator = sparse(len(SIDES), degree=6, threshold=5, minimum_survivors=MINIMUM)
    shown, counted, dropped = shown_sets(coordinator)
    for name, lie in asked(coordinator, shown).items():
        coordinator.responses[name] = coordinator.open_verified(
            name, UnmaskResponse, coordinator.ask(name, "on_unmask", lie)
        )
    assert len(counted) < MINIMUM
    coordinator.assert_sum(counted, coordinator.sum_over(counted, dropped))


def nearby(strict: Callable[..., None]) -> Callable[..., None]:
    """The weakened check: ``threshold`` valid signatures, as many as reconstruct a secret."""

    def consistency_signatures(session: Any, plan: Any, message: Survivors, signatures: dict[str, bytes]) -> None:
        weak = dataclasses.replace(session.spec, minimum_survivors=session.spec.threshold)
        strict(dataclasses.replace(session, spec=weak), plan, message, signatures)

    return consistency_signatures
