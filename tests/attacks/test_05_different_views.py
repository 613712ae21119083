"""Different plans, models or rosters for different devices never give a meaningful sum.

A coordinator that gives a victim another model than the rest can separate the victim's update from the sum (Pasquini et
al. 2022). Here the plan is bound into every mask, so masks of different plans do not cancel.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from aggregation import envelope, masks, ring
from aggregation.errors import DataError, ProtocolError
from aggregation.masks import Mask
from aggregation.messages import Assignment, Plan, Survivors, Unmask, UnmaskResponse
from aggregation.spec import Adversary
from tests.support import FleetOf, refused

VICTIM = "device-002"


def two_models(coordinator: Any) -> tuple[Plan, Plan]:
    """Send the victim another model; the uploads are in ``coordinator.uploads``."""
    fleet = coordinator.fleet
    coordinator.session = fleet.establish()
    coordinator.state, plans = fleet.begin(coordinator.session)
    honest = coordinator.plan = coordinator.state.plan
    other = dataclasses.replace(honest, adapter_digest="f" * 64)
    plans[VICTIM] = coordinator.resign(plans[VICTIM], Assignment, plan=other)
    coordinator.uploads = {name: fleet.contribute(name, plans[name]) for name in plans}
    return honest, other


def unmasked(coordinator: Any, honest: Plan, other: Plan) -> dict[str, Any]:
    """Ask each device for shares under the plan that it was shown; then unmask and add everything."""
    fleet = coordinator.fleet
    vectors = {
        name: envelope.open_vector(raw, packed_size(coordinator), fleet.devices[name].identity.public, name)
        for name, raw in coordinator.uploads.items()
    }
    digests = {name: header.vector for name, (header, _) in vectors.items()}
    found = {}
    for name in coordinator.uploads:
        message = Unmask(Survivors((other if name == VICTIM else honest).digest(), digests), {})
        found[name] = coordinator.open_verified(name, UnmaskResponse, coordinator.ask(name, "on_unmask", message))
    recovery = coordinator.recover({name: response.seeds for name, response in found.items()}, {})
    return total(coordinator, {name: recovery.seed(name) for name in found}, honest, other)


def packed_size(coordinator: Any) -> int:
    vector = coordinator.fleet.spec.vector
    return ring.packed_size(vector.size, vector.ring_bits)


def total(coordinator: Any, seeds: dict[str, Any], honest: Plan, other: Plan) -> dict[str, Any]:
    spec, context = coordinator.fleet.spec.vector, coordinator.session.session.context
    out = ring.zeros(spec.size, spec.ring_bits)
    for name, raw in coordinator.uploads.items():
        out += ring.unpack(raw[: packed_size(coordinator)], spec.size, spec.ring_bits)
        plan = (other if name == VICTIM else honest).digest()
        masks.apply(out, [Mask(masks.self_key(seeds[name], context, plan, name), add=False)])
    return spec.decode(out, len(seeds))  # type: ignore[no-any-return]


def test_the_sum_over_two_models_is_noise(malicious: Callable[..., Any]) -> None:
    coordinator = malicious()
    with refused(DataError, "vector.delta"):
        unmasked(coordinator, *two_models(coordinator))


def test_without_the_model_in_the_plans_digest_the_sum_is_unmasked(
    malicious: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = Plan.digest
    monkeypatch.setattr(Plan, "digest", lambda plan: genuine(dataclasses.replace(plan, adapter_digest="0" * 64)))
    coordinator = malicious()
    values = unmasked(coordinator, *two_models(coordinator))
    plain = np.sum([own["delta"] for own in coordinator.fleet.plain.values()], axis=0)
    assert np.abs(values["delta"] - plain).max() < 1e-4


def test_an_honest_coordinator_refuses_an_upload_for_another_model(malicious: Callable[..., Any]) -> None:
    coordinator = malicious()
    two_models(coordinator)
    with refused(ProtocolError, "masked-input.plan", peer="device-002"):
        coordinator.state.on_masked_input(VICTIM, coordinator.uploads[VICTIM])


def test_devices_shown_different_models_never_form_a_quorum(malicious: Callable[..., Any]) -> None:
    coordinator = malicious(Adversary.ACTIVE)
    honest, other = two_models(coordinator)
    fleet = coordinator.fleet
    digests = {
        name: envelope.open_vector(raw, packed_size(coordinator), fleet.devices[name].identity.public, name)[0].vector
        for name, raw in coordinator.uploads.items()
    }
    coordinator.ask(VICTIM, "on_survivors", Survivors(other.digest(), digests))
    signatures = {}
    for name in sorted(set(fleet.devices) - {VICTIM}):
        signatures[name] = envelope.signature(
            coordinator.ask(name, "on_survivors", Survivors(honest.digest(), digests))
        )
    with refused(ProtocolError, "signature", peer="coordinator", value="consistency-signature"):
        coordinator.ask(VICTIM, "on_unmask", Unmask(Survivors(other.digest(), digests), signatures))


def test_a_victim_with_its_own_roster_is_in_no_other_session(fleet_of: FleetOf) -> None:
    fleet = fleet_of(6)
    state, offer = fleet.offer()
    for name in sorted(fleet.devices):
        state = state.on_advert(name, fleet.join(name, offer))
    smaller = dataclasses.replace(state, adverts={name: state.adverts[name] for name in sorted(state.adverts)[:5]})
    (_, whole), (_, part) = state.close(), smaller.close()
    fleet.share(VICTIM, part)
    session_shares = {name: fleet.share(name, whole) for name in sorted(fleet.devices) if name != VICTIM}
    sharing, _ = state.close()
    for name, body in session_shares.items():
        sharing = sharing.on_shares(name, body)
    _, plans = fleet.begin(sharing.close())
    with refused(ProtocolError, "assignment.dealers", peer="coordinator", value="device-005"):
        fleet.states[VICTIM].on_plan(fleet.devices[VICTIM], next(iter(plans.values())))
