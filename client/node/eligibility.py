"""Whether a device takes part now: the conditions of ``[eligibility]`` in ``device.toml``, and what is read for each.
The conditions are those of Google's on-device federated compute. A condition that is asked for and cannot be read is
not met. Those of the machine are read again while the device trains; the others are read when it joins a session."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta

from aggregation.errors import EdgeAdaptError
from client.node.policy import EligibilitySettings
from client.node.readings import Readings
from client.node.statedir import DeviceStateDir
from client.training.examples import parse_examples
from client.training.hygiene import read_clean

log = logging.getLogger("edgeadapt.device")
IDLE = 0.25  # share of the processors' time; others use less
LOOK = 10.0  # seconds between two readings of the machine


@dataclass(frozen=True, slots=True)
class Condition:
    """A condition that the owner demands. ``name``: its key; ``reading``: what is now, or why that is unknown."""

    name: str
    reading: str
    met: bool


class EligibilityError(EdgeAdaptError):
    """A condition is not met now. It may be later."""


def machine_conditions(settings: EligibilitySettings, readings: Readings, now: datetime) -> list[Condition]:
    """List the conditions of the machine that are demanded; ``now`` is in local time."""
    demanded = []
    if hours := settings.hours:
        demanded.append(Condition("hours", f"{now:%H:%M}, and {hours} is demanded", _within(hours, now)))
    if settings.charging:
        demanded.append(
            _read("charging", lambda: _either(readings.external_power(), "on external power", "on battery"))
        )
    if settings.minimum_battery:
        demanded.append(_read("minimum_battery", lambda: _at_least(readings.battery(), settings.minimum_battery, " %")))
    if settings.unmetered:
        free, paid = "the connection is not metered", "the connection is metered"
        demanded.append(_read("unmetered", lambda: _either(not readings.metered(), free, paid)))
    if settings.idle:
        demanded.append(_read("idle", lambda: _use(readings.used_by_others())))
    return demanded


def conditions(
    state: DeviceStateDir, readings: Readings, now: datetime, *, count_examples: bool = True
) -> list[Condition]:
    """List the conditions that are demanded of a device that joins a session. ``count_examples``: whether
    ``minimum_examples`` is one of them. Counting takes time that depends on the examples."""
    settings = state.eligibility
    demanded = machine_conditions(settings, readings, now)
    if (least := settings.minimum_examples) and count_examples:
        demanded.append(_read("minimum_examples", lambda: _at_least(_count(state), least, " examples")))
    if settings.minimum_separation_hours and state.last_round is not None:
        since = now.astimezone(UTC) - state.last_round
        # A time that is still to come was written before the clock was set back; it may be years.
        met = not timedelta(0) <= since < timedelta(hours=settings.minimum_separation_hours)
        text = f"the last round was {since / timedelta(hours=1):.1f} h ago, and {settings.minimum_separation_hours:g} h"
        demanded.append(Condition("minimum_separation_hours", f"{text} are demanded", met))
    return demanded


def require(found: Sequence[Condition]) -> None:
    """Check that all conditions are met. Raises EligibilityError."""
    if unmet := [each for each in found if not each.met]:
        raise EligibilityError("; ".join(f"{each.name}: {each.reading}" for each in unmet), about=unmet[0].name)


def _read(name: str, reading: Callable[[], tuple[str, bool]]) -> Condition:
    try:
        return Condition(name, *reading())
    except EdgeAdaptError as error:
        return Condition(name, f"cannot be read, and counts as not met: {error}", met=False)


def _within(hours: str, now: datetime) -> bool:
    begin, end = map(time.fromisoformat, hours.split("-"))
    at = now.time()
    return begin <= at < end if begin < end else at >= begin or at < end


def _either(met: bool, yes: str, no: str) -> tuple[str, bool]:
    return yes if met else no, met


def _use(share: float) -> tuple[str, bool]:
    return f"other processes use {share:.0%} of the processors, and less than {IDLE:.0%} is demanded", share < IDLE


def _at_least(value: float, least: int, unit: str) -> tuple[str, bool]:
    return f"{value:.0f}{unit}, and at least {least} are demanded", value >= least


def _count(state: DeviceStateDir) -> int:
    return len(parse_examples(read_trained(state), state.examples, 0))  # labels are not read, so both kinds count


def read_trained(state: DeviceStateDir) -> bytes:
    """Read what a session trains on. Why corrections cannot be read is logged. Raises DataError as ``read_clean``."""
    taught = b""
    try:
        taught = state.corrections()
    except EdgeAdaptError as error:
        log.warning("no corrections for this session: %s", error, extra={"about": error.about})
    return read_clean(state.examples, state.settings.data, taught)
