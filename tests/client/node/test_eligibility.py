"""The conditions of [eligibility]: what is read of the machine, and that what cannot be read is not met."""

import json
import os
import re
import stat
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from click.testing import CliRunner

from aggregation.errors import ConfigError, DataError
from aggregation.pki.identity import IdentityKey
from client.cli import device
from client.node.eligibility import Condition, EligibilityError, conditions, require
from client.node.readings import Readings
from client.node.statedir import ADAPTERS, DeviceSettings, DeviceStateDir
from tests.support import refused
from tests.support.machine import Machine

NIGHT = datetime(2026, 1, 2, 2, 30, tzinfo=timezone(timedelta(hours=5)))


class Zero:
    def bytes(self, n: int) -> bytes:
        return bytes(n)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "root")


def state_dir(folder: Path, eligibility: str = "") -> DeviceStateDir:
    DeviceStateDir.create(folder, DeviceSettings(base="some_base"), IdentityKey(bytes(32)), {}, Zero())
    (folder / "device.toml").write_text(f'base = "some_base"\n[eligibility]\n{eligibility}')
    return DeviceStateDir.open(folder)


def found(tmp_path: Path, machine: Machine, eligibility: str, now: datetime = NIGHT) -> Condition:
    (one,) = conditions(state_dir(tmp_path / "state", eligibility), Readings(machine.root), now)
    return one


def test_without_conditions_nothing_is_read_and_the_device_is_eligible(tmp_path: Path) -> None:
    nothing = conditions(state_dir(tmp_path), Readings(tmp_path / "missing"), NIGHT)
    assert nothing == []
    require(nothing)


@pytest.mark.parametrize(
    ("supplies", "external"),
    [
        ({"AC": {"type": "Mains", "online": "1"}, "BAT0": {"type": "Battery", "status": "Charging"}}, True),
        ({"AC": {"type": "Mains", "online": "0"}, "BAT0": {"type": "Battery", "status": "Discharging"}}, False),
        ({"AC": {"type": "Mains", "online": "0"}, "ucsi": {"type": "USB", "online": "2"}}, True),
        ({"BAT0": {"type": "Battery", "status": "Full"}}, True),
        ({"BAT0": {"type": "Battery", "status": "Discharging"}}, False),
        (
            {
                "AC": {"type": "Mains", "online": "0"},
                "mouse": {"type": "Battery", "scope": "Device", "status": "Charging"},
            },
            False,
        ),
    ],
)
def test_external_power_is_read_from_the_supplies_of_the_machine(
    machine: Machine, supplies: dict[str, dict[str, str]], external: bool
) -> None:
    for name, files in supplies.items():
        machine.supply(name, **files)
    assert Readings(machine.root).external_power() is external


@pytest.mark.parametrize(
    "supplies",
    [
        {},
        {"mouse": {"type": "Battery", "scope": "Device", "status": "Charging", "capacity": "80"}},
        {"BAT0": {"type": "Battery", "status": "Unknown", "capacity": "full"}},
        {"BAT0": {"type": "Battery", "capacity": "4000000000"}},
        {"BAT0": {"type": "\ufffd" * 5000, "capacity": "80"}},
    ],
)
def test_a_machine_that_does_not_say_is_not_eligible(
    tmp_path: Path, machine: Machine, supplies: dict[str, dict[str, str]]
) -> None:
    for name, files in supplies.items():
        machine.supply(name, **files)
    with refused(DataError, "charging"):
        Readings(machine.root).external_power()
    for key in ("charging = true", "minimum_battery = 5"):
        condition = found(tmp_path, machine, key)
        assert (condition.name, condition.met) == (key.split()[0], False)
        assert "\n" not in condition.reading


def test_the_charge_is_the_mean_of_the_batteries(tmp_path: Path, machine: Machine) -> None:
    machine.supply("BAT0", type="Battery", capacity="20")
    machine.supply("BAT1", type="Battery", capacity="80")
    assert Readings(machine.root).battery() == 50
    assert found(tmp_path, machine, "minimum_battery = 50").met
    assert not found(tmp_path, machine, "minimum_battery = 51").met


def test_a_processor_that_others_use_is_not_idle(tmp_path: Path, machine: Machine) -> None:
    readings, state = Readings(machine.root), state_dir(tmp_path / "state", "idle = true")
    machine.processors(busy=1_000, idle=1_000)
    assert conditions(state, readings, NIGHT)[0].met  # nothing passed
    machine.processors(busy=1_200_000, idle=1_800_000)
    assert not conditions(state, readings, NIGHT)[0].met
    machine.processors(busy=1_300_000, idle=2_800_000)
    assert conditions(state, readings, NIGHT)[0].met


def test_the_time_that_this_process_uses_does_not_count_as_that_of_others(machine: Machine) -> None:
    readings = Readings(machine.root)
    machine.processors(busy=0, idle=0)
    readings.used_by_others()
    before = sum(os.times()[:4])
    while (used := sum(os.times()[:4]) - before) < 0.3:
        pass
    ticks = round(used * os.sysconf("SC_CLK_TCK"))
    machine.processors(busy=ticks, idle=ticks)
    assert readings.used_by_others() < 0.1
    machine.processors(busy=3 * ticks, idle=ticks)
    assert readings.used_by_others() > 0.5


def test_this_machine_says_how_busy_it_is() -> None:
    assert 0 <= Readings().used_by_others() <= 1


@pytest.mark.parametrize("text", ["", "cpu 1 2\n", "cpu a b c d e f\n", "intr 1 2 3 4 5 6\n"])
def test_a_damaged_proc_stat_is_not_eligible(tmp_path: Path, machine: Machine, text: str) -> None:
    machine.write("proc/stat", text)
    assert not found(tmp_path, machine, "idle = true").met


@pytest.mark.parametrize(
    ("answer", "met"), [("u 1", False), ("u 2", True), ("u 3", False), ("u 4", True), ("u 0", False), ("s x", False)]
)
def test_the_connection_is_unmetered_if_network_manager_says_so(
    tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch, answer: str, met: bool
) -> None:
    busctl = tmp_path / "bin" / "busctl"
    busctl.parent.mkdir()
    busctl.write_text(f"#!/bin/sh\necho '{answer}'\n")
    busctl.chmod(busctl.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{busctl.parent}:{os.environ['PATH']}")
    assert found(tmp_path, machine, "unmetered = true").met is met


@pytest.mark.parametrize("path", ["/nowhere", os.environ["PATH"]])
def test_without_network_manager_the_connection_counts_as_metered(
    tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setenv("PATH", path)
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", f"unix:path={tmp_path}/none")
    condition = found(tmp_path, machine, "unmetered = true")
    assert (condition.met, "cannot be read" in condition.reading) == (False, True)


@pytest.mark.parametrize(
    ("hours", "met"),
    [
        ("22:00-06:00", True),
        ("02:30-02:31", True),
        ("02:00-02:30", False),
        ("06:00-22:00", False),
        ("23:00-02:30", False),
    ],
)
def test_hours_are_of_local_time_and_may_span_midnight(tmp_path: Path, machine: Machine, hours: str, met: bool) -> None:
    assert found(tmp_path, machine, f'hours = "{hours}"').met is met


@pytest.mark.parametrize(("least", "met"), [(2, True), (3, False)])
def test_examples_are_counted_with_or_without_labels(tmp_path: Path, machine: Machine, least: int, met: bool) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "examples.jsonl").write_text('{"text": "on", "label": 3}\n{"text": "off"}\n')
    assert found(tmp_path, machine, f"minimum_examples = {least}").met is met


def test_examples_that_cannot_be_read_are_not_enough(tmp_path: Path, machine: Machine) -> None:
    (tmp_path / "state").mkdir()
    for text in ("", "{", '{"text": "'):
        (tmp_path / "state" / "examples.jsonl").write_text(text)
        assert not found(tmp_path, machine, "minimum_examples = 1").met


@pytest.mark.parametrize(("hours", "met"), [(0.5, False), (1.5, True), (-0.5, True)])
def test_the_last_round_is_long_enough_ago_or_the_clock_was_set_back(
    tmp_path: Path, machine: Machine, hours: float, met: bool
) -> None:
    state = state_dir(tmp_path / "state", "minimum_separation_hours = 1.0")
    assert conditions(state, Readings(machine.root), NIGHT) == []  # it took part in none
    at = (NIGHT.astimezone(UTC) - timedelta(hours=hours)).timestamp()
    (state.folder / ADAPTERS).write_bytes(b"")
    os.utime(state.folder / ADAPTERS, (at, at))
    assert conditions(state, Readings(machine.root), NIGHT)[0].met is met


def test_each_condition_that_is_not_met_is_named_in_one_line() -> None:
    unmet = [Condition("charging", "on battery", False), Condition("idle", "no", False), Condition("hours", "", True)]
    with refused(EligibilityError, "charging") as error:
        require(unmet)
    assert re.fullmatch("charging: .*; idle: .*", str(error.value))


@pytest.mark.parametrize(
    ("table", "about"),
    [
        ("charging = 1", "charging"),
        ('hours = "6-22"', "hours"),
        ('hours = "22:00-24:00"', "hours"),
        ('hours = "06:00-06:00"', ""),
        ("minimum_battery = 101", "minimum_battery"),
        ("minimum_separation_hours = inf", "minimum_separation_hours"),
        ("chargin = true", "chargin"),
    ],
)
def test_wrong_conditions_are_refused(tmp_path: Path, table: str, about: str) -> None:
    with refused(ConfigError, f"eligibility.{about}" if about else "eligibility"):
        state_dir(tmp_path, table)


def test_the_command_shows_each_condition_with_its_reading(tmp_path: Path) -> None:
    folder = state_dir(tmp_path / "kitchen", "minimum_examples = 2\nidle = false").folder
    shown = CliRunner().invoke(device, ["policy", "--state", str(folder), "--json"], catch_exceptions=False)
    eligibility = json.loads(shown.stdout)["eligibility"]
    assert (eligibility["eligible"], [each["name"] for each in eligibility["conditions"]]) == (
        False,
        ["minimum_examples"],
    )
    text = CliRunner().invoke(device, ["policy", "--state", str(folder)], catch_exceptions=False).stdout
    assert text.splitlines()[-3] == "not eligible now"
    assert text.splitlines()[-2].startswith("- minimum_examples")
