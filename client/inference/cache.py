"""What was loaded last stays loaded, within a number and a size: a cache that gives up the least recently used."""

from collections.abc import Callable, Hashable
from threading import Lock
from typing import Generic, TypeVar

from aggregation.errors import ConfigError

V = TypeVar("V")


class Cache(Generic[V]):
    """At most ``count`` values of at most ``size`` bytes together.

    The value that was put or got last is never given up: it is in use, and one that alone is above ``size`` must still
    run. So the cache holds at most ``size`` bytes or that one value. Threads may share it.
    """

    def __init__(self, count: int, size: int, dropped: Callable[[V], object] = lambda _value: None) -> None:
        """``dropped`` is called with each value that is given up.

        Raises:
            ConfigError: ``count`` or ``size`` is below 1.
        """
        if count < 1 or size < 1:
            raise ConfigError(f"a cache of {count} adapters and {size} bytes holds nothing; both must be 1 or more")
        self._count, self._size, self._dropped = count, size, dropped
        self._held: dict[Hashable, tuple[V, int]] = {}  # least recently used first
        self._lock = Lock()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._held

    def get(self, key: Hashable) -> V | None:
        """The value, from now on the most recently used; None if it is not held."""
        with self._lock:
            if (entry := self._held.pop(key, None)) is None:
                return None
            self._held[key] = entry
            return entry[0]

    def put(self, key: Hashable, value: V, nbytes: int) -> None:
        """Hold a value, instead of the one that another thread put under this key, and keep the limits."""
        with self._lock:
            self.nbytes += nbytes - self._held.pop(key, (None, 0))[1]
            self._held[key] = (value, nbytes)
            while len(self._held) > 1 and (len(self._held) > self._count or self.nbytes > self._size):
                old, freed = self._held.pop(next(iter(self._held)))
                self.nbytes -= freed
                self._dropped(old)
