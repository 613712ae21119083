"""On a sparse graph: name as dropped whoever stands between two parts of the circle, and open one part alone.

The sum that comes out is over fewer devices than anyone agreed to. The devices at the ends of the part stop it: half
of those that hold their shares are gone, and the other half must be too few.
"""

from collections.abc import Callable
from typing import Any

import pytest

from aggregation import graph
from aggregation.errors import ProtocolError
from aggregation.messages import Survivors, Unmask, UnmaskResponse
from tests.support import refused

DEGREE, PART = 4, 3


def cut(coordinator: Any) -> tuple[list[str], list[str], Survivors]:
    """Collect every input, and claim that two neighbouring pairs on the circle sent none."""
    coordinator.collect()
    order = list(graph.harary_order(coordinator.session.session.context, coordinator.fleet.devices))
    part, gone = order[:PART], [*order[PART : PART + 2], *order[-2:]]
    left = {name: digest for name, digest in coordinator.digests().items() if name not in gone}
    return part, gone, Survivors(coordinator.plan.digest(), left)


def test_the_ends_of_a_part_refuse_to_be_cut_off(circle: Callable[..., Any]) -> None:
    coordinator = circle(12, degree=DEGREE, threshold=4, minimum_survivors=8)
    part, _, lie = cut(coordinator)
    for end in part:
        with refused(ProtocolError, "survivors.neighbors"):
            coordinator.ask(end, "on_survivors", lie)


def test_a_threshold_that_half_a_neighbourhood_reaches_is_refused(circle: Callable[..., Any]) -> None:
    with refused(ProtocolError, "offer.graph"):
        circle(12, degree=DEGREE, threshold=3, minimum_survivors=8).collect()


def test_without_the_check_the_sum_over_three_devices_is_open(
    circle: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "is_secure", lambda *given: True)
    coordinator = circle(12, degree=DEGREE, threshold=3, minimum_survivors=8)
    part, gone, lie = cut(coordinator)
    signed = {name: coordinator.agreement(name, lie) for name in sorted(lie.vectors)}
    for name in sorted(lie.vectors):
        answer = coordinator.ask(name, "on_unmask", Unmask(lie, signed))
        coordinator.responses[name] = coordinator.open_verified(name, UnmaskResponse, answer)
    coordinator.assert_sum(part, coordinator.sum_over(part, gone))
