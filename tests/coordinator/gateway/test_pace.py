"""The pace of check-ins: windows that keep a fleet below the target, whatever its size, and leave nobody out."""

import heapq
import random
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.gateway.pace import FORGET, Pace, Schedule
from edgeadapt.formats.gateway.messages import RetryWindow

TARGET = 10_000  # check-ins a minute
MINUTES = 8


def simulate(devices: int) -> tuple[Counter[int], Counter[str], int]:
    """Devices that all come in the first minute. A gateway serves each for half a minute, 2000 at once.

    Returns:
        Check-ins by minute; rounds by device; check-ins that came too early.
    """
    rng, pace = random.Random(5), Pace(TARGET / 60, accepted=60.0, rejected=10.0)  # noqa: S311
    events = [(rng.uniform(0, 60), f"device-{number}", False) for number in range(devices)]
    heapq.heapify(events)
    check_ins, served, connected, early = Counter[int](), Counter[str](), 0, 0
    while events and events[0][0] < 60 * MINUTES:
        now, device, leaves = heapq.heappop(events)
        if leaves:
            connected -= 1
            window = pace.accept(device, now)
        else:
            check_ins[int(now // 60)] += 1
            early += pace.early(device, now) is not None
            if pace.admits(now) and connected < 2000:
                connected += 1
                served[device] += 1
                heapq.heappush(events, (now + 30, device, True))
                continue
            window = pace.reject(device, now)
        heapq.heappush(events, (now + rng.uniform(window.earliest, window.latest), device, False))
    return check_ins, served, early


@pytest.mark.parametrize("devices", [1_000, 10_000, 30_000])
def test_a_fleet_keeps_the_pace_after_its_first_minute_and_every_device_gets_its_turn(devices: int) -> None:
    check_ins, served, early = simulate(devices)
    assert check_ins[0] >= min(devices, TARGET) * 0.9  # it came all at once
    assert max(check_ins[minute] for minute in range(1, MINUTES)) <= TARGET * 1.05
    assert not early
    assert len(served) == devices if devices <= TARGET else len(served) > 0.5 * devices


@given(st.lists(st.floats(0, 100), min_size=2, max_size=50), st.floats(0.1, 1000), st.floats(0.01, 100))
def test_windows_begin_no_closer_than_the_rate_permits_and_no_sooner_than_the_least(
    times: list[float], rate: float, least: float
) -> None:
    schedule, begins = Schedule(rate, least), []
    for now in sorted(times):
        window = schedule.window(now)
        assert window.earliest >= least - 1e-9
        assert window.latest - window.earliest == pytest.approx(least)
        begins.append(now + window.earliest)
    assert all(after - before >= 0.999 / rate - 1e-9 for before, after in pairwise(begins))


def test_accepted_and_rejected_devices_have_windows_of_their_own() -> None:
    pace = Pace(10.0, accepted=3600.0, rejected=60.0)
    assert (pace.accept("kitchen", 0.0), pace.reject("garage", 0.0)) == (
        RetryWindow(3600.0, 7200.0),
        RetryWindow(60.0, 120.0),
    )
    assert pace.early("kitchen", 600.0) == RetryWindow(3000.0, 6600.0)
    assert pace.early("garage", 600.0) is None
    assert pace.early("hall", 0.0) is None


def test_windows_that_are_over_take_no_memory() -> None:
    pace = Pace(1e6, accepted=0.001, rejected=0.001)
    for number in range(20 * FORGET):
        pace.reject(f"device-{number}", float(number))
    assert len(pace._windows) <= FORGET
    assert pace.early(f"device-{20 * FORGET - 1}", 20.0 * FORGET - 1) is not None
