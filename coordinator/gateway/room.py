"""Who has one of the gateway's places for devices, and whose turn it is. No gRPC and no clock here.

While there are places, each device that comes gets one. When all are taken, whoever has waited longest has a place: a
device waits from when it first came, or from the end of the session that asked it last. One that finds no place, and
has waited longer than a device inside, takes that one's place; the device that was served last goes first. Nobody
loses a place while a session may need it. So a device takes part after as many sessions as it takes to ask those that
have waited longer: neither coming often nor coming under new names lets anybody overtake it.

A device that leaves by itself, or stays away longer than its window, waits anew. Members of a session come first."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import NamedTuple


class Leaving(NamedTuple):
    """Who loses its place. ``served``: it was asked since it came in."""

    device: str
    served: bool


class Outside(NamedTuple):
    since: float  # when it began to wait
    until: float  # when it counts as gone


@dataclass(slots=True)
class Room:
    """Times are in seconds, by one clock. ``late``: how long after its window a device still counts as waiting."""

    places: int
    late: float
    _inside: dict[str, float] = field(default_factory=dict)  # device → since when it waits
    _served: set[str] = field(default_factory=set)  # of those inside
    _asked: set[str] = field(default_factory=set)  # since the last ``keep``
    _needed: frozenset[str] = frozenset()
    _outside: dict[str, Outside] = field(default_factory=dict)  # in the order of ``until``

    def __contains__(self, device: str) -> bool:
        return device in self._inside

    def enter(self, device: str, now: float) -> tuple[Leaving, ...] | None:
        """Give a device that is not inside a place. Returns who loses its own for that, if anybody; None if the device
        has to stay outside: tell it when to come back, and call ``send_away``."""
        since = self._since(device, now)
        leaving: tuple[Leaving, ...] = ()
        if len(self._inside) >= self.places:
            last = max(self._idle(), key=self._inside.__getitem__, default=None)
            if last is None or (self._inside[last] <= since and device not in self._needed):
                return None
            leaving = (Leaving(last, last in self._served),)
        self._outside.pop(device, None)
        self._inside[device] = since
        return leaving

    def send_away(self, device: str, now: float, until: float) -> None:
        """Note that a device comes back before the time ``until``, no sooner than others that were sent away before.
        It keeps its turn."""
        since = self._since(device, now)
        self._outside.pop(device, None)
        self._outside[device] = Outside(since, until + self.late)
        self.leave(device)

    def leave(self, device: str) -> None:
        self._inside.pop(device, None)
        self._served.discard(device)
        self._asked.discard(device)

    def ask(self, device: str) -> None:
        """Note that a device is asked: it keeps its place until ``keep`` is called."""
        self._asked.add(device)
        self._served.add(device)

    def keep(self, devices: Collection[str], now: float) -> None:
        """Keep the places of these devices, inside or not, until the next call. The turn of others that were asked is
        over."""
        over = (self._asked | self._needed).difference(devices)
        self._inside |= {device: now for device in over if device in self._inside}
        self._asked.clear()
        self._needed = frozenset(devices)

    def waiting(self, now: float) -> int:
        """Count the devices outside that come back."""
        self._forget(now)
        return len(self._outside)

    def turns_over(self, now: float) -> bool:
        """Whether a device outside comes back that has waited longer than one that can lose its place for it."""
        self._forget(now)
        newest = max(map(self._inside.__getitem__, self._idle()), default=now)
        return len(self._inside) >= self.places and any(each.since < newest for each in self._outside.values())

    def _idle(self) -> list[str]:
        return [device for device in self._inside if device not in self._asked and device not in self._needed]

    def _since(self, device: str, now: float) -> float:
        self._forget(now)
        if device in self._inside:
            return self._inside[device]
        return self._outside[device].since if device in self._outside else now

    def _forget(self, now: float) -> None:
        while self._outside and (first := next(iter(self._outside.items())))[1].until < now:
            del self._outside[first[0]]
