"""On a sparse graph: show two stretches of the circle different survivor sets, and open what both leave over.

Each set is large enough and says the truth near its own stretch; far off it counts devices that the other stretch is
told were lost. Between the stretches stand devices that sign one way each and open nothing. If a device asked only for
the agreements of those that hold its shares, the sum would be over fewer devices than anyone had agreed to:

    stretch one              gap   stretch two              gap
    A A A A A x x A A A A A  A B   B B B B B x x B B B B B  B A     x: dropped, as its own side is told
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
SIDES = "A" * STRETCH + "AB" + "B" * STRETCH + "BA"  # along the circle: which set each device is shown
LOST = {5: "A", 6: "A", 19: "B", 20: "B"}  # place on the circle → the side that says so


def told(coordinator: Any) -> tuple[dict[str, Survivors], list[str], list[str]]:
    """Device → the set that it is shown; then who is in the sum and who is not."""
    coordinator.collect()
    order = graph.harary_order(coordinator.session.session.context, coordinator.fleet.devices)
    gone = {side: {order[place] for place, says in LOST.items() if says == side} for side in "AB"}
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
    """Gather agreements on both sets; device → its own set, wherever its neighbourhood would settle for it."""
    signed = {name: coordinator.agreement(name, survivors) for name, survivors in sorted(shown.items())}
    out = {}
    for name, survivors in sorted(shown.items()):
        same = {other: signed[other] for other in sorted(signed) if shown[other] == survivors}
        if len(coordinator.session.session.neighbors(name, same)) + 1 >= coordinator.fleet.spec.threshold:
            out[name] = Unmask(survivors, same)
    return out


def test_no_device_opens_a_set_on_which_its_stretch_alone_agrees(circle: Callable[..., Any]) -> None:
    coordinator = circle(len(SIDES), degree=6, threshold=5, minimum_survivors=MINIMUM)
    shown, _, _ = told(coordinator)
    assert {len(survivors.vectors) for survivors in shown.values()} == {MINIMUM}
    lies = asked(coordinator, shown)
    assert len(lies) == len(SIDES) - len(LOST) - 4  # all but the gaps
    for name, lie in lies.items():
        with refused(ProtocolError, "unmask.quorum"):
            coordinator.ask(name, "on_unmask", lie)


def test_with_agreements_of_the_neighbourhood_only_a_sum_below_the_minimum_is_open(
    circle: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "consistency_signatures", nearby(checks.consistency_signatures))
    coordinator = circle(len(SIDES), degree=6, threshold=5, minimum_survivors=MINIMUM)
    shown, counted, dropped = told(coordinator)
    for name, lie in asked(coordinator, shown).items():
        coordinator.responses[name] = coordinator.open_verified(
            name, UnmaskResponse, coordinator.ask(name, "on_unmask", lie)
        )
    assert len(counted) < MINIMUM
    coordinator.assert_sum(counted, coordinator.sum_over(counted, dropped))


def nearby(strict: Callable[..., None]) -> Callable[..., None]:
    """The weakened check: ``threshold`` valid agreements, as open one secret."""

    def consistency_signatures(session: Any, message: Survivors, signatures: dict[str, bytes]) -> None:
        weak = dataclasses.replace(session.spec, minimum_survivors=session.spec.threshold)
        strict(dataclasses.replace(session, spec=weak), message, signatures)

    return consistency_signatures
