"""A cohort above 128 devices, on the graph that a coordinator chooses for it, gives the plain sum."""

from collections.abc import Callable
from typing import Any

import pytest

from aggregation.policy import Policy
from coordinator.settings import Aggregation
from edgeadapt.formats.layout import Layout, TensorSpec
from tests.support import FleetOf

DEVICES = 150
LAYOUT = Layout((TensorSpec("a", (10, 10)),))


@pytest.mark.slow
@pytest.mark.parametrize("adversary", ["active", pytest.param("honest-but-curious", marks=pytest.mark.exhaustive)])
def test_a_session_of_150_devices_gives_the_plain_sum_with_a_tenth_dropping_out_twice(
    fleet_of: FleetOf, spec_of: Callable[..., Any], adversary: Any
) -> None:
    settings = Aggregation(adversary=adversary)
    degree, threshold = settings.masking_graph(DEVICES)
    assert degree == 48
    offered = settings.spec(DEVICES, LAYOUT, "b" * 64, 1)
    spec = spec_of(
        DEVICES,
        rounds=1,
        degree=degree,
        threshold=threshold,
        minimum_survivors=offered.minimum_survivors,
        adversary=offered.adversary,
    )
    policy = Policy(known_bases=frozenset({spec.base_digest}), adversaries=frozenset({offered.adversary}))
    fleet = fleet_of(DEVICES, spec=spec, policy=policy)
    names = sorted(fleet.devices)
    session = fleet.establish({"advert": names[:8], "shares": names[8:15]})
    _, result = fleet.round(session, {"input": names[20:30], "unmask": names[40:45]})
    assert result.survivors == tuple(name for name in names[15:] if name not in names[20:30])
    assert {len(encrypted_shares) for encrypted_shares in session.encrypted_shares.values()} == {degree}
    fleet.assert_sum(result)
