"""On a sparse graph: name as dropouts the devices between two parts of the ring order, and unmask one part alone.

The resulting sum is over fewer devices than any device signed for. The devices at the ends of the part prevent it: half
of the devices that hold their shares are missing, and the other half must be too few.
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
    """Collect every input, and claim that two pairs around a part of the order sent none."""
    coordinator.collect()
    order = list(graph.harary_order(coordinator.session.session.context, coordinator.fleet.devices))
    part, gone = order[:PART], [*order[PART : PART + 2], *order[-2:]]
    left = {name: digest for name, digest in coordinator.digests().items() if name not in gone}
    return part, gone, Survivors(coordinator.plan.digest(), left)


def test_the_ends_of_a_part_refuse_to_be_cut_off(sparse: Callable[..., Any]) -> None:
    coordinator = sparse(12, degree=DEGREE, threshold=4, minimum_survivors=8)
    part, _, lie = cut(coordinator)
    for end in part:
        with refused(ProtocolError, "survivors.neighbors", peer="coordinator", value=3):
            coordinator.ask(end, "on_survivors", lie)


def test_a_threshold_that_half_a_neighborhood_reaches_is_refused(sparse: Callable[..., Any]) -> None:
    with refused(ProtocolError, "offer.graph", peer="coordinator"):
        sparse(12, degree=DEGREE, threshold=3, minimum_survivors=8).collect()


def test_without_the_check_the_sum_over_three_devices_is_unmasked(
    sparse: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "is_secure", lambda *given: True)
    coordinator = sparse(12, degree=DEGREE, threshold=3, minimum_survivors=8)
    part, gone, lie = cut(coordinator)
    signed = {name: coordinator.consistency_signature(name, lie) for name in sorted(lie.vectors)}
    for name in sorted(lie.vectors):
        answer = coordinator.ask(name, "on_unmask", Unmask(lie, signed))
        coordinator.responses[name] = coordinator.open_verified(name, UnmaskResponse, answer)
    coordinator.assert_sum(part, coordinator.sum_over(part, gone))
