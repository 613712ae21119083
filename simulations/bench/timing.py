"""How long a call takes: wall time and CPU time, medians and spread. Other work on the machine shows as a gap."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Timing:
    """Repeats of one call, in milliseconds."""

    wall: tuple[float, ...]
    cpu: tuple[float, ...]

    @property
    def ms(self) -> float:
        """Median wall time."""
        return statistics.median(self.wall)

    @property
    def cpu_ms(self) -> float:
        """Median CPU time of all threads."""
        return statistics.median(self.cpu)

    def to_json(self) -> dict[str, float | int]:
        """Median, extremes and CPU time."""
        return {
            "ms": self.ms,
            "least_ms": min(self.wall),
            "most_ms": max(self.wall),
            "cpu_ms": self.cpu_ms,
            "repeats": len(self.wall),
        }


def measure(call: Callable[[T], object], inputs: Callable[[], T], repeats: int) -> Timing:
    """Time ``call`` on a fresh input each time; making the input does not count."""
    wall, cpu = [], []
    for _ in range(repeats):
        given = inputs()
        begun, busy = time.perf_counter(), time.process_time()
        call(given)
        cpu.append(1e3 * (time.process_time() - busy))
        wall.append(1e3 * (time.perf_counter() - begun))
    return Timing(tuple(wall), tuple(cpu))
