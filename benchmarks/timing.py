"""Wall-clock and CPU time of calls, with medians and spread. Other work on the machine shows as a gap between them."""

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")
Note = Callable[[str], None]  # called with the name of each step when it begins


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """First and third quartile of one value or more, interpolated between values.

    >>> quartiles([4.0, 1.0, 3.0, 2.0, 5.0])
    (2.0, 4.0)
    """
    if len(values) == 1:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def in_turn(
    engines: Sequence[str], repeats: int, run: Callable[[str], Mapping[str, float]], note: Note, what: str = ""
) -> dict[str, dict[str, dict[str, float]]]:
    """Run engines in turn, in another order each time; return the median, least and largest of each figure."""
    runs: dict[str, list[Mapping[str, float]]] = {engine: [] for engine in engines}
    for repeat in range(repeats):
        for engine in engines if repeat % 2 == 0 else reversed(engines):
            note(f"{what}{engine}, {repeat + 1} of {repeats}")
            runs[engine].append(run(engine))
    return {engine: {name: _spread([run[name] for run in each]) for name in each[0]} for engine, each in runs.items()}


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def spread_text(values: Mapping[str, float], unit: float = 1.0) -> str:
    """Format what ``in_turn`` returns of a figure.

    >>> spread_text({"median": 2.0, "min": 1.5, "max": 3.0})
    '2 (1.5–3)'
    """
    median, low, high = (f"{values[key] / unit:,.4g}" for key in ("median", "min", "max"))
    return f"{median} ({low}–{high})"


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Align the cells of a table: the first ``left`` columns to the left, the others to the right.

    >>> print(aligned([("", "ms"), ("client", "7"), ("server", "12")]))
            ms
    client   7
    server  12
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    forms = [f"{{:{'<' if number < left else '>'}{width}}}" for number, width in enumerate(widths)]
    return "\n".join("  ".join(forms).format(*row).rstrip() for row in rows)


@dataclass(slots=True)
class Stopwatch:
    """Sums the time of calls: wall-clock seconds, and CPU seconds of all threads of this process."""

    seconds: float = 0.0
    cpu: float = 0.0

    def run(self, call: Callable[..., T], *given: Any) -> T:
        begun, busy = time.perf_counter(), time.process_time()
        result = call(*given)
        self.cpu += time.process_time() - busy
        self.seconds += time.perf_counter() - begun
        return result


@dataclass(frozen=True, slots=True)
class Timing:
    """Times of a repeated call, one for each repeat, in milliseconds: wall-clock, and CPU time of this process."""

    wall: tuple[float, ...]
    cpu: tuple[float, ...]

    @property
    def ms(self) -> float:
        return statistics.median(self.wall)

    @property
    def cpu_ms(self) -> float:
        return statistics.median(self.cpu)

    @property
    def quartiles(self) -> tuple[float, float]:
        return quartiles(self.wall)

    def __add__(self, other: "Timing") -> "Timing":
        """Time two calls in sequence: the sum of each repeat."""
        pairs = (self.wall, other.wall), (self.cpu, other.cpu)
        return Timing(*(tuple(map(sum, zip(*pair, strict=True))) for pair in pairs))

    def to_json(self) -> dict[str, Any]:
        """Medians, quartiles, extremes and the number of repeats."""
        return {
            "ms": self.ms,
            "quartiles_ms": list(self.quartiles),
            "min_ms": min(self.wall),
            "max_ms": max(self.wall),
            "cpu_ms": self.cpu_ms,
            "repeats": len(self.wall),
        }


@dataclass(frozen=True, slots=True)
class Call:
    """A call to time. ``make_input`` produces a new input for each repeat and is not timed."""

    run: Callable[[Any], object]
    make_input: Callable[[], Any]
    repeats: int


def measure(run: Callable[[T], object], make_input: Callable[[], T], repeats: int) -> Timing:
    """Time ``run`` on a new input in each of ``repeats`` repeats, one or more."""
    return interleaved(Call(run, make_input, repeats))[0]


def interleaved(*calls: Call) -> list[Timing]:
    """Time several calls alternately, so that other work on the machine slows all of them alike.

    Each pass has another order, the same on every run: a call that always followed one that fills the caches would look
    slow. A call with fewer repeats than others takes part in the first passes.
    """
    times: list[list[tuple[float, float]]] = [[] for _ in calls]
    order, shuffler = list(zip(calls, times, strict=True)), random.Random(0)  # noqa: S311 - an order, no secret
    for repeat in range(max(call.repeats for call in calls)):
        shuffler.shuffle(order)
        for call, found in order:
            if repeat < call.repeats:
                given, watch = call.make_input(), Stopwatch()
                watch.run(call.run, given)
                found.append((1e3 * watch.seconds, 1e3 * watch.cpu))
    return [Timing(*zip(*found, strict=True)) for found in times]
