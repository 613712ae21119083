"""One unmask request that names a victim both as a survivor and as a dropout.

With both kinds of shares a coordinator removes the victim's self mask *and* its pair masks: its update is exposed.
"""

from collections.abc import Callable
from typing import Any

import pytest

from aggregation import checks
from aggregation.errors import ProtocolError
from aggregation.messages import Survivors, Unmask, UnmaskResponse
from aggregation.spec import Adversary
from tests.support import refused

VICTIM = "device-002"


def request(coordinator: Any) -> Unmask:
    return Unmask(Survivors(coordinator.plan.digest(), coordinator.digests()), {})


def responses(coordinator: Any) -> dict[str, UnmaskResponse]:
    message = request(coordinator)
    answers = {name: coordinator.ask(name, "on_unmask", message) for name in coordinator.uploads}
    return {name: coordinator.open_verified(name, UnmaskResponse, raw) for name, raw in answers.items()}


def test_a_device_reveals_one_kind_of_share_of_each_device(malicious: Callable[..., Any]) -> None:
    coordinator = malicious()
    coordinator.collect(dropouts=("device-004",))
    for response in responses(coordinator).values():
        assert set(response.seeds) == set(coordinator.uploads)
        assert set(response.keys) == {"device-004"}


def test_a_request_cannot_name_the_victim_as_a_dropout(malicious: Callable[..., Any]) -> None:
    coordinator = malicious()
    coordinator.collect()
    raw = coordinator.sign(request(coordinator))
    # As a separate entry after the survivors, or as a second entry of the victim: neither is a valid message.
    body = request(coordinator).encode()
    entry = bytes([len(VICTIM)]) + VICTIM.encode() + bytes(32)
    second = body.replace(b"\x00\x00\x00\x05", b"\x00\x00\x00\x06", 1)[:-4] + entry + bytes(4)
    for damaged, about in ((body + entry, "encoding.trailing"), (second, "encoding.order")):
        with refused(ProtocolError, about):
            Unmask.decode(damaged)
    coordinator.fleet.answer("on_unmask", "device-000", raw)


def test_without_the_rule_the_victim_is_exposed(malicious: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def both(session: Any, plan: Any, me: str, survivors: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return tuple(sorted(survivors.vectors)), (VICTIM,)

    coordinator = malicious()
    coordinator.collect()
    monkeypatch.setattr(checks, "shares_to_reveal", both)
    found = responses(coordinator)
    recovery = coordinator.recover({n: o.seeds for n, o in found.items()}, {n: o.keys for n, o in found.items()})
    seed, key = recovery.seed(VICTIM), recovery.mask_key(VICTIM)
    coordinator.assert_exposed(VICTIM, coordinator.unmask_upload(VICTIM, seed, {VICTIM: key}))


def test_the_rule_holds_in_an_active_session_too(malicious: Callable[..., Any]) -> None:
    coordinator = malicious(Adversary.ACTIVE)
    coordinator.collect(dropouts=("device-004",))
    fleet = coordinator.fleet
    _, bodies = fleet.confirm(*coordinator.state.close())
    for name in bodies:
        response = coordinator.open_verified(name, UnmaskResponse, fleet.answer("on_unmask", name, bodies[name]))
        assert not set(response.seeds) & set(response.keys)
