"""Whose turn it is at a full gateway: every device has one, and nobody gets another's by pushing."""

import random
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.gateway.room import Leaving, Room

LEAST = 10.0  # seconds until a window begins


class Population:
    """Devices that come back as the gateway asks, and an hour of virtual time for each session."""

    def __init__(self, places: int, seed: int = 0) -> None:
        self.room, self.now, self.rng = Room(places, LEAST), 0.0, random.Random(seed)  # noqa: S311
        self.due = dict[str, float]()  # device outside → when it comes
        self.served = list[set[str]]()

    def come(self, device: str) -> bool:
        """Let a device ask for a place. Returns whether it has one."""
        self.due.pop(device, None)
        leaving = self.room.enter(device, self.now)
        if leaving is None:
            self._send_away(device)
            return False
        for last, served in leaving:
            if served:
                self.room.leave(last)
                self.due[last] = self.now + self.rng.uniform(1.0, 2.0)
            else:
                self._send_away(last)
        return True

    def _send_away(self, device: str) -> None:
        self.room.send_away(device, self.now, self.now + 2 * LEAST)
        self.due[device] = self.now + self.rng.uniform(LEAST, 2 * LEAST)

    def pass_time(self, seconds: float) -> None:
        end = self.now + seconds
        while self.due and min(self.due.values()) <= end:
            device = min(self.due, key=self.due.__getitem__)
            self.now = self.due[device]
            self.come(device)
        self.now = end

    def session(self, choose: Callable[[list[str]], Iterable[str]] = list, seconds: float = 60.0) -> None:
        """As the coordinator does it: free the places, let others come, ask, keep, run rounds."""
        self.room.keep((), self.now)
        end = self.now + 2 * LEAST
        while self.room.turns_over(self.now) and self.now < end:
            self.pass_time(0.2)
        chosen = set(choose(sorted(self.room._inside)))
        for device in chosen:
            self.room.ask(device)
        self.room.keep(chosen, self.now)
        self.served.append(chosen)
        self.pass_time(seconds)
        assert chosen <= set(self.room._inside)  # no member has lost its place

    def longest_gap(self, device: str) -> int:
        rounds = [-1, *(number for number, chosen in enumerate(self.served) if device in chosen), len(self.served)]
        return max(after - before for before, after in pairwise(rounds))


@pytest.mark.parametrize("seconds", [0.0, 60.0])
@pytest.mark.parametrize("seed", range(3))
def test_every_device_of_130_takes_part_in_any_three_sessions_of_a_gateway_for_100(seed: int, seconds: float) -> None:
    fleet, names = Population(100, seed), [f"device-{number:03d}" for number in range(130)]
    for name in names:
        fleet.come(name)
    fleet.pass_time(3 * LEAST)
    for _ in range(25):
        fleet.session(seconds=seconds)
    assert [len(chosen) for chosen in fleet.served] == [100] * 25
    assert max(map(fleet.longest_gap, names)) <= 3
    counts = Counter(device for chosen in fleet.served for device in chosen)
    assert 0.8 * 25 * 100 / 130 < min(counts.values()) <= max(counts.values()) < 1.2 * 25 * 100 / 130


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 40), st.integers(0, 2**16))
def test_no_device_waits_longer_than_it_takes_to_serve_all_others_once(places: int, devices: int, seed: int) -> None:
    fleet, names = Population(places, seed), [f"device-{number:03d}" for number in range(devices)]
    for name in names:
        fleet.come(name)
    bound = -(-devices // places) + 1
    for _ in range(4 * bound):
        fleet.session()
    assert max(map(fleet.longest_gap, names)) <= bound


def test_where_a_session_takes_few_every_device_is_asked_in_turn() -> None:
    fleet, names = Population(20), [f"device-{number:02d}" for number in range(60)]
    for name in names:
        fleet.come(name)
    for _ in range(60):
        fleet.session(lambda inside: fleet.rng.sample(inside, 5))
    counts = Counter(device for chosen in fleet.served for device in chosen)
    assert len(counts) == len(names)
    assert max(counts.values()) <= 3 * min(counts.values())


def test_a_gateway_with_room_for_all_sends_nobody_away() -> None:
    fleet = Population(10)
    assert all(fleet.come(f"device-{number}") for number in range(10))
    for _ in range(5):
        fleet.session()
    assert (fleet.due, fleet.room.waiting(fleet.now)) == ({}, 0)
    assert [len(chosen) for chosen in fleet.served] == [10] * 5


# Attacks


def test_new_names_without_end_overtake_nobody_that_has_waited() -> None:
    fleet = Population(5)
    honest = [f"honest-{number}" for number in range(15)]
    for name in honest:
        fleet.come(name)
    fleet.pass_time(1.0)
    for number in range(6):
        for each in range(50):
            fleet.come(f"new-{number}-{each}")
        fleet.session(seconds=2 * LEAST)
    first = {name for chosen in fleet.served[:3] for name in chosen}
    assert first == set(honest)


def test_a_device_that_comes_again_and_again_takes_no_place_from_one_that_waited_longer() -> None:
    room = Room(2, LEAST)
    assert [room.enter(name, at) for name, at in (("kitchen", 0.0), ("garage", 1.0))] == [(), ()]
    for number in range(100):
        assert room.enter("pusher", 2.0 + number) is None
        room.send_away("pusher", 2.0 + number, 3.0 + number)
    room.leave("garage")
    assert room.enter("pusher", 102.5) == ()
    room.leave("pusher")  # by itself: its turn is lost
    assert room.enter("garage", 103.0) == ()  # which left too
    assert room.enter("pusher", 104.0) is None
    assert ("kitchen" in room, "garage" in room) == (True, True)


def test_one_that_was_served_makes_room_for_one_that_waits_and_not_the_other_way_round() -> None:
    room = Room(2, LEAST)
    for at, name in enumerate(("kitchen", "garage")):
        assert room.enter(name, float(at)) == ()
    assert room.enter("hall", 2.0) is None
    room.send_away("hall", 2.0, 22.0)
    room.ask("kitchen")
    assert room.enter("hall", 3.0) is None  # kitchen is asked, and garage has waited longer
    room.keep(["kitchen"], 4.0)
    assert room.enter("hall", 5.0) is None
    assert not room.turns_over(5.0)
    room.keep([], 6.0)
    assert room.turns_over(6.0)
    assert room.enter("hall", 7.0) == (Leaving("kitchen", served=True),)
    room.leave("kitchen")
    assert room.enter("kitchen", 8.0) is None
    room.send_away("kitchen", 8.0, 28.0)
    assert not room.turns_over(8.0)


def test_a_member_of_the_session_that_left_comes_before_all_that_wait() -> None:
    room = Room(2, LEAST)
    for at, name in enumerate(("kitchen", "garage")):
        room.enter(name, float(at))
        room.ask(name)
    room.keep(["kitchen"], 3.0)
    room.leave("kitchen")
    assert room.enter("hall", 4.0) == ()
    assert room.enter("kitchen", 5.0) == (Leaving("hall", served=False),)
    room.send_away("hall", 5.0, 25.0)
    assert room.enter("hall", 6.0) is None  # garage was asked at 3.0, before hall came


def test_a_device_that_does_not_come_in_its_window_is_not_waited_for_and_has_lost_its_turn() -> None:
    room = Room(1, LEAST)
    room.enter("kitchen", 0.0)
    room.send_away("hall", 1.0, 21.0)
    room.ask("kitchen")
    room.keep([], 2.0)
    assert (room.waiting(31.0), room.turns_over(31.0)) == (1, True)
    assert (room.waiting(31.5), room.turns_over(31.5)) == (0, False)
    assert room.enter("hall", 32.0) is None
    assert not room._outside
