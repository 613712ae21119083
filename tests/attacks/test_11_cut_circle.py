"""On a sparse graph: name as dropped whoever stands between two parts of the circle, and open one part alone.

The sum that comes out is over fewer devices than anyone agreed to. The devices at the ends of the part stop it: half
of those that hold their shares are gone, and the other half must be too few.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from aggregation import envelope, graph, masks, ring
from aggregation.errors import ProtocolError
from aggregation.masks import Mask
from aggregation.messages import Agreement, Opening, Plan, Survivors, Unmask
from aggregation.policy import Policy
from aggregation.recovery import Recovery

DEGREE, PART = 4, 3


def circle_fleet(fleet_of: Callable[..., Any], spec_of: Callable[..., Any], threshold: int) -> Any:
    spec = spec_of(12, degree=DEGREE, threshold=threshold, minimum_survivors=8)
    policy = Policy(known_bases=frozenset({spec.base_digest}), corrupt_fraction=0, complete_up_to=3)
    return fleet_of(12, spec=spec, policy=policy)


def cut(fleet: Any) -> tuple[Any, Plan, list[str], list[str], dict[str, bytes], bytes]:
    """Collect every input, and claim that two neighbouring pairs on the circle sent none."""
    session = fleet.establish()
    collecting, plans = fleet.begin(session)
    uploads = {name: fleet.contribute(name, plans[name]) for name in sorted(plans)}
    for name, upload in uploads.items():
        collecting = collecting.on_masked_input(name, upload)
    order = list(graph.circle(session.session.context, fleet.devices))
    part, gone = order[:PART], [*order[PART : PART + 2], *order[-2:]]
    left = {name: digest for name, digest in sorted(collecting.vectors.items()) if name not in gone}
    lie = envelope.seal(fleet.key, Survivors(collecting.plan.digest(), left))
    return session, collecting.plan, part, gone, uploads, lie


def test_the_ends_of_a_part_refuse_to_be_cut_off(fleet_of: Callable[..., Any], spec_of: Callable[..., Any]) -> None:
    fleet = circle_fleet(fleet_of, spec_of, threshold=4)
    _, _, part, _, _, lie = cut(fleet)
    for end in part:
        with pytest.raises(ProtocolError, match="3 devices near this device survived, 4 are needed"):
            fleet.answer("on_survivors", end, lie)


def test_a_threshold_that_half_a_neighbourhood_reaches_is_refused(
    fleet_of: Callable[..., Any], spec_of: Callable[..., Any]
) -> None:
    with pytest.raises(ProtocolError, match="degree 4 and threshold 3 of 12 devices do not withstand"):
        circle_fleet(fleet_of, spec_of, threshold=3).establish()


def test_without_the_check_the_sum_over_three_devices_is_open(
    fleet_of: Callable[..., Any], spec_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "withstands", lambda *given: True)
    fleet = circle_fleet(fleet_of, spec_of, threshold=3)
    session, plan, part, gone, uploads, lie = cut(fleet)
    alive = sorted(set(fleet.devices) - set(gone))
    openings = {name: open_fully(fleet, session.session, name, alive, lie) for name in alive}
    recovery = Recovery(session.session, plan, session.dealt, openings)
    values = sum_over(fleet, session.session, plan, part, gone, uploads, recovery)
    for segment in fleet.spec.vector.segments:
        plain = np.sum([fleet.plain[name][segment.name] for name in part], axis=0)
        assert np.abs(values[segment.name] - plain).max() < PART * fleet.spec.vector.step(segment)


def open_fully(fleet: Any, session: Any, name: str, alive: list[str], lie: bytes) -> Opening:
    """An honest device agrees to the lie and opens it, shown the agreements of its neighbourhood."""
    survivors = envelope.open_as(Survivors, lie, fleet.key.public, "coordinator")
    device, state = fleet.devices[name], fleet.states[name]
    confirmed, _ = state.on_survivors(device, lie)
    near = sorted((name, *session.neighbours(name, alive)))[: fleet.spec.threshold]
    signed = {other: agreement(fleet, other, survivors) for other in near}
    _, answer = confirmed.on_unmask(device, envelope.seal(fleet.key, Unmask(survivors, signed)))
    return envelope.open_as(Opening, answer, device.identity.public, name)


def agreement(fleet: Any, name: str, survivors: Survivors) -> bytes:
    message = Agreement(survivors.digest(), name)
    return fleet.devices[name].identity.sign(message.TAG, message.encode())  # type: ignore[no-any-return]


def sum_over(
    fleet: Any,
    session: Any,
    plan: Plan,
    part: list[str],
    gone: list[str],
    uploads: dict[str, bytes],
    recovery: Recovery,
) -> Any:
    spec, digest = fleet.spec.vector, plan.digest()
    total = ring.zeros(spec.size, spec.ring_bits)
    found = []
    for name in part:
        packed = uploads[name][-ring.packed_size(spec.size, spec.ring_bits) :]
        total += ring.unpack(packed, spec.size, spec.ring_bits)
        seed = recovery.seed(name)
        assert seed is not None
        found.append(Mask(masks.self_key(seed, session.context, digest, name), add=False))
        for other in session.neighbours(name, gone):
            private = recovery.mask_key(other)
            assert private is not None
            public = session.peers[name].mask_keys[plan.round - 1]
            key = masks.pair_key(private, public, session.context, digest, (name, other))
            found.append(Mask(key, add=not name < other))
    masks.apply(total, found)
    return spec.decode(total, len(part))
