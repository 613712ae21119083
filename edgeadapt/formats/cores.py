"""How many cores this process may use, and work that is done ahead on the others."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ahead(call: Callable[[A], B], items: Iterable[A], threads: int) -> Iterator[tuple[A, Callable[[], B]]]:
    """Yield each item with a function that gives the outcome of ``call(item)``, in order.

    With two threads or more, calls run while the caller handles earlier items, and at most ``threads`` items wait for
    the caller, so that few are in memory. With one, a call runs when its outcome is asked for. Threads help if ``call``
    releases the interpreter lock, as hashing long messages does."""
    if threads == 1:
        yield from ((item, partial(call, item)) for item in items)
        return
    pending: deque[tuple[A, Future[B]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            pending.append((item, pool.submit(call, item)))
            while pending and (len(pending) > threads or pending[0][1].done()):
                first, future = pending.popleft()
                yield first, future.result
        yield from ((item, future.result) for item, future in pending)
