"""How long calls take: wall time and CPU time, medians and spread. Other work on the machine shows as a gap."""

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Timing:
    """Repeats of one call, in milliseconds. CPU time is that of this process, all its threads together."""

    wall: tuple[float, ...]
    cpu: tuple[float, ...]

    @property
    def ms(self) -> float:
        """Median wall time."""
        return statistics.median(self.wall)

    @property
    def cpu_ms(self) -> float:
        """Median CPU time."""
        return statistics.median(self.cpu)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile of the wall time: half of the repeats were between them."""
        if len(self.wall) == 1:
            return self.wall[0], self.wall[0]
        first, _, third = statistics.quantiles(self.wall, n=4, method="inclusive")
        return first, third

    def __add__(self, other: "Timing") -> "Timing":
        """One after the other, repeat by repeat."""
        return Timing(_sums(self.wall, other.wall), _sums(self.cpu, other.cpu))

    def to_json(self) -> dict[str, Any]:
        """Medians, quartiles, extremes."""
        return {
            "ms": self.ms,
            "quartiles_ms": list(self.quartiles),
            "least_ms": min(self.wall),
            "most_ms": max(self.wall),
            "cpu_ms": self.cpu_ms,
            "repeats": len(self.wall),
        }


def _sums(one: tuple[float, ...], other: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(map(sum, zip(one, other, strict=True)))


@dataclass(frozen=True, slots=True)
class Call:
    """What is timed, and what makes a fresh input for it each time; making the input does not count."""

    run: Callable[[Any], object]
    given: Callable[[], Any]
    repeats: int


def measure(run: Callable[[T], object], given: Callable[[], T], repeats: int) -> Timing:
    """Time ``run`` on a fresh input each time."""
    return in_turns(Call(run, given, repeats))[0]


def in_turns(*calls: Call) -> list[Timing]:
    """Time several calls in turns, so that what else the machine does at the time meets them all alike.

    Each turn has another order: a call that always came after one that fills the caches would look slow.
    """
    found: list[list[tuple[float, float]]] = [[] for _ in calls]
    order, turns = list(zip(calls, found, strict=True)), random.Random(0)  # noqa: S311 - an order, no secret
    for turn in range(max(call.repeats for call in calls)):
        turns.shuffle(order)
        for call, times in order:
            if turn < call.repeats:
                times.append(_once(call))
    return [Timing(*zip(*times, strict=True)) for times in found]


def _once(call: Call) -> tuple[float, float]:
    given = call.given()
    begun, busy = time.perf_counter(), time.process_time()
    call.run(given)
    return 1e3 * (time.perf_counter() - begun), 1e3 * (time.process_time() - busy)
