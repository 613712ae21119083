"""Measures how the time of reading a hostile text grows with its length."""

import time
from collections.abc import Callable

FLOOR = 0.02  # CPU seconds; below it, what a call costs at all counts for too much


def growth(read: Callable[[str], object], make: Callable[[int], str], limit: int) -> float:
    """Measure how many times as long it takes to read twice the text: 2 is linear, 4 quadratic. 0: that many
    characters, ``limit``, take less than ``FLOOR``. ``make`` makes a text of a length."""
    size = 1000
    while _seconds(read, make(size), 1) < FLOOR:
        if size >= limit:
            return 0.0
        size = min(4 * size, limit)
    return _seconds(read, make(size), 3) / _seconds(read, make(size // 2), 3)


def repeated(unit: str, before: str = "", after: str = "") -> Callable[[int], str]:
    """Repeat a unit between two texts, up to a length."""
    return lambda size: before + unit * max(1, (size - len(before) - len(after)) // len(unit)) + after


def _seconds(read: Callable[[str], object], text: str, times: int) -> float:
    """The least of several times: other processes only add to it."""
    found = []
    for _ in range(times):
        begun = time.thread_time()
        read(text)
        found.append(time.thread_time() - begun)
    return min(found)
