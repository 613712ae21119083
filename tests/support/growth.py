"""Measures how the time of reading a hostile text grows with its length."""

import math
import time
from collections.abc import Callable

FLOOR = 0.02  # CPU seconds; below it, what a call costs at all counts for too much
LINEAR = 1.5  # exponents below it; caches and other processes make a linear one seem larger
SPAN = 8  # the longer text has so many times as many characters


def growth(read: Callable[[str], object], make: Callable[[int], str], limit: int) -> float:
    """Measure the exponent with which the time of reading a text grows with its length: 1 is linear, 2 quadratic. 0:
    that many characters, ``limit``, take less than ``FLOOR``. ``make`` makes a text of a length."""
    size = 1000
    while _seconds(read, make(size), 1) < FLOOR:
        if size >= limit:
            return 0.0
        size = min(4 * size, limit)
    return math.log(_seconds(read, make(size), 3) / _seconds(read, make(size // SPAN), 3), SPAN)


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
