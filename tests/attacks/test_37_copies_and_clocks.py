"""Two copies of one device, and devices whose clock is set back, against what a device remembers between sessions.

A copy has the device's key and certificate, and what the device knew when it was copied. Neither knows of the other.
"""

import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from aggregation.errors import EdgeAdaptError
from client.node import step as device_step
from client.node.app import STATE, register
from client.node.privacyledger import PrivacyLedger
from client.node.statedir import DeviceStateDir
from tests.client.node.test_revocations import install, list_of, replaced
from tests.support import FleetOf, refused

VICTIM = "device-00"
NOISE = {"privacy__mechanism": "skellam", "privacy__noise_multiplier": 2.0, "aggregation__clip_norm": 0.5}


class WithCopy:
    """The devices' app, in which the victim answers from the copy of its state directory once ``copied`` is set."""

    def __init__(self, fleet: Any) -> None:
        self.original = fleet.state_dir(VICTIM).folder
        self.copy = Path(shutil.copytree(self.original, fleet.out / "copy"))
        self.copied = False
        self._app = ClientApp()
        register(self._app, self._open)

    def _open(self, context: Context) -> DeviceStateDir:
        folder = Path(str(context.node_config[STATE]))
        return DeviceStateDir.open(self.copy if self.copied and folder == self.original else folder)

    def __call__(self, message: Message, context: Context) -> Message:
        return self._app(message, context)


def limit(folder: Path, epsilon: float) -> None:
    text = (folder / "device.toml").read_text()
    (folder / "device.toml").write_text(text.replace("[policy]\n", f"[policy]\nmaximum_epsilon = {epsilon}\n"))


def cost(app_fleet_of: FleetOf) -> float:
    fleet = app_fleet_of(8, rounds=1, **NOISE)
    fleet.federate(fleet.grid())
    return float(fleet.state_dir(VICTIM).load(PrivacyLedger).spent.epsilon(1e-6))


def test_a_device_refuses_what_its_limit_excludes_and_a_copy_of_it_does_not(app_fleet_of: FleetOf) -> None:
    """Not repaired: a device that has a copy counts among the corrupt (docs/explanation/threat-model.md)."""
    fleet = app_fleet_of(8, rounds=1, attempts=1, aggregation__session_rounds=1, **NOISE)
    limit(fleet.state_dir(VICTIM).folder, 1.3 * cost(app_fleet_of))
    attack = WithCopy(fleet)
    (first,) = fleet.federate(fleet.grid(app=attack))
    fleet.configure({"rounds": 2})
    second = fleet.federate(fleet.grid(app=attack))[1]
    attack.copied = True
    fleet.configure({"rounds": 3})
    third = fleet.federate(fleet.grid(app=attack))[2]
    assert [VICTIM in record.survivors for record in (first, second, third)] == [True, False, True]
    spent = [DeviceStateDir.open(folder).load(PrivacyLedger).noisy for folder in (attack.original, attack.copy)]
    assert spent == [1, 1]


def set_back(monkeypatch: pytest.MonkeyPatch, days: float) -> None:
    """Set the devices' clock back; the coordinator's goes on."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.now(tz) - timedelta(days)

    monkeypatch.setattr(device_step, "datetime", Clock)


@pytest.mark.parametrize("has_list", [True, False])
def test_a_clock_that_is_set_back_before_the_newest_list_or_a_certificate_joins_no_session(
    app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, has_list: bool
) -> None:
    """The coordinator withholds newer lists from then on, and hopes that an older one passes for fresh."""
    fleet = app_fleet_of(6, rounds=1, attempts=1)
    if has_list:
        install(fleet, list_of(fleet, 1, begin=datetime.now(UTC).replace(microsecond=0)))
    assert len(fleet.federate(fleet.grid())[0].survivors) == 6
    fleet.configure({"rounds": 2})
    set_back(monkeypatch, 2)
    with refused(EdgeAdaptError, "session"):
        fleet.federate(fleet.grid(app=replaced(None)))
    found = {getattr(record, "about", None) for record in caplog.records if record.name == "edgeadapt.device"}
    assert found - {None} == {"offer.revocations.this-update" if has_list else "certificate.validity"}


def test_a_clock_that_is_set_back_by_half_an_hour_joins(app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not repaired: within its certificates and its newest list, a device takes its own clock's word."""
    fleet = app_fleet_of(6, rounds=1)
    install(fleet, list_of(fleet, 1, begin=datetime.now(UTC).replace(microsecond=0)))
    set_back(monkeypatch, 1 / 48)
    assert len(fleet.federate(fleet.grid())[0].survivors) == 6
