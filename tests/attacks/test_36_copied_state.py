"""Somebody copies the state directories of all devices once, and later subtracts their noise from every sum.

A session's noise follows from a secret of the session. If that secret follows from a file in the state directory, an
old copy of the file gives the noise of all later sessions: the sums are those without noise, and the epsilon in every
record is false. The thief uses nothing but the copies, the public session and the device's own program.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from numpy.typing import NDArray

from aggregation.client import Planned
from aggregation.errors import TrustError
from aggregation.privacy import noise
from aggregation.ring import Ring
from benchmarks.simulation import flowerengine as seeded
from client.node import step as device_step
from client.node.app import STATE, register
from client.node.privacyledger import PrivacyLedger
from client.node.snapshot import Draw, Snapshot
from client.node.statedir import DeviceStateDir
from tests.support import FleetOf, refused

Open = Callable[[Path], DeviceStateDir]
DEVICES, LATER = 8, 3  # sessions


class Sums:
    """The devices' app; it keeps the sum of each round, which the coordinator unmasks."""

    def __init__(self, open_: Open, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rounds: list[tuple[Planned, Ring]] = []
        self.app = ClientApp()
        register(self.app, lambda context: open_(Path(str(context.node_config[STATE]))))
        contribute = device_step.contribute

        def trained(device: Any, planned: Planned, *given: Any) -> Any:
            vector, parts = contribute(device, planned, *given)
            if not self.rounds or self.rounds[-1][0].plan != planned.plan:
                self.rounds.append((planned, np.zeros_like(vector)))
            self.rounds[-1] = planned, self.rounds[-1][1] + vector
            return vector, parts

        monkeypatch.setattr(device_step, "contribute", trained)


def secrets_of(copy: DeviceStateDir, sessions: int) -> list[Snapshot]:
    """What the device's own program makes of a copy: what it trains with in the next sessions."""
    found = []
    for number in range(sessions):
        copy.take_snapshot(b"", bytes([number]) * 32)
        found.append(copy.load_snapshot(bytes([number]) * 32))
    return found


def subtracted(planned: Planned, total: Ring, copies: list[Snapshot]) -> NDArray[np.float64]:
    """The sum of a round, in steps, without the noise that the copies give."""
    spec = planned.spec
    assert spec.privacy is not None
    (segment,) = spec.vector.segments
    step = spec.vector.step(segment)
    steps, variance = spec.vector.decode(total, DEVICES)[segment.name] / step, (segment.noise / step) ** 2
    for copy in copies:
        steps -= noise.draw(spec.privacy.mechanism, variance, segment.size, copy.key(planned.plan, Draw.NOISE))
    return steps


def longest(planned: Planned) -> float:
    """The largest norm of a sum of so many clipped and rounded updates, in steps."""
    spec = planned.spec
    (segment,) = spec.vector.segments
    norm = spec.clip_norm / spec.vector.step(segment)
    return float(DEVICES * np.sqrt(noise.norm_squared(norm, segment.size)))


def left_of_the_sums(app_fleet_of: FleetOf, open_: Open, monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float]]:
    """Of each later session: the norm of what is left of the sum without the noise of the copies, and ``longest``."""
    settings = {"privacy__mechanism": "skellam", "privacy__noise_multiplier": 2.0, "aggregation__clip_norm": 0.5}
    fleet = app_fleet_of(DEVICES, rounds=1, aggregation__session_rounds=1, **settings)
    attack = Sums(open_, monkeypatch)
    fleet.federate(fleet.grid(app=attack.app))
    copies = Path(shutil.copytree(fleet.out / "devices", fleet.out / "copies"))
    fleet.configure({"rounds": 1 + LATER})
    fleet.federate(fleet.grid(app=attack.app))
    names = [Path(folder).name for folder in fleet.nodes.values()]
    assert {fleet.state_dir(name).load(PrivacyLedger).noisy for name in names} == {1 + LATER}
    secrets = [secrets_of(open_(copies / name), LATER) for name in names]
    return [
        (float(np.linalg.norm(subtracted(planned, total, list(copied)))), longest(planned))
        for (planned, total), copied in zip(attack.rounds[1:], zip(*secrets, strict=True), strict=True)
    ]


def test_copies_of_all_devices_give_no_noise_of_a_later_session(
    app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    for left, bound in left_of_the_sums(app_fleet_of, DeviceStateDir.open, monkeypatch):
        assert left > 2 * bound


def test_secrets_that_follow_from_the_state_directory_give_the_sums_without_their_noise(
    app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it was, and as it is in a simulation."""
    for left, bound in left_of_the_sums(app_fleet_of, seeded.open_state_dir, monkeypatch):
        assert left <= bound


def copied_between_rounds(app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch) -> tuple[Snapshot, list[Planned]]:
    """What a device trains with by a copy from between two rounds of a session, and what it accepted in both."""
    fleet = app_fleet_of(5, rounds=2, aggregation__session_rounds=2)
    attack, copies = Sums(DeviceStateDir.open, monkeypatch), fleet.out / "copies"

    def app(message: Message, context: Context) -> Message:
        if len(attack.rounds) == 1 and message.metadata.group_id == "2" and not copies.exists():
            shutil.copytree(fleet.out / "devices", copies)
        return attack.app(message, context)

    fleet.federate(fleet.grid(app=app))
    copy = DeviceStateDir.open(copies / "device-00")
    ready: Any = copy.load_state()
    return copy.load_snapshot(ready.session.peers["device-00"].share_key), [planned for planned, _ in attack.rounds]


def test_a_copy_from_between_two_rounds_gives_nothing_of_the_first(
    app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot, (first, second) = copied_between_rounds(app_fleet_of, monkeypatch)
    with refused(TrustError, "snapshot.round"):
        snapshot.key(first.plan, Draw.NOISE)
    assert snapshot.key(second.plan, Draw.NOISE)


def test_a_secret_that_is_kept_for_a_whole_session_gives_its_first_round(
    app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    used, key = list[bytes](), Snapshot.key

    def noted(snapshot: Snapshot, plan: Any, draw: Draw) -> bytes:
        used.append(key(snapshot, plan, draw))
        return used[-1]

    monkeypatch.setattr(Snapshot, "since", lambda snapshot, round_: snapshot)
    monkeypatch.setattr(Snapshot, "key", noted)
    snapshot, (first, _) = copied_between_rounds(app_fleet_of, monkeypatch)
    assert key(snapshot, first.plan, Draw.ORDER) in used
