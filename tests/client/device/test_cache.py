"""The cache keeps its limits and gives up what was used longest ago."""

import threading
import time

import pytest

from aggregation.errors import ConfigError
from client.inference.cache import Cache


def test_the_least_recently_used_is_given_up_when_there_are_too_many() -> None:
    dropped: list[str] = []
    cache = Cache[str](2, 100, dropped.append)
    cache.put("a", "A", 1)
    cache.put("b", "B", 1)
    assert cache.get("a") == "A"
    cache.put("c", "C", 1)
    assert dropped == ["B"]
    assert [key in cache for key in "abc"] == [True, False, True]


def test_as_many_are_given_up_as_the_size_asks_for() -> None:
    dropped: list[str] = []
    cache = Cache[str](10, 100, dropped.append)
    for key, size in (("a", 40), ("b", 40), ("c", 20)):
        cache.put(key, key.upper(), size)
    assert (dropped, cache.nbytes) == ([], 100)
    cache.put("d", "D", 70)
    assert (dropped, cache.nbytes) == (["A", "B"], 90)


def test_one_that_is_above_the_size_by_itself_stays_until_the_next() -> None:
    dropped: list[str] = []
    cache = Cache[str](10, 100, dropped.append)
    cache.put("a", "A", 10)
    cache.put("huge", "H", 500)
    assert (dropped, cache.get("huge")) == (["A"], "H")
    cache.put("b", "B", 1)
    assert (dropped, cache.nbytes, len(cache)) == (["A", "H"], 1, 1)


def test_what_is_not_held_is_none_and_changes_nothing() -> None:
    cache = Cache[str](1, 1)
    assert cache.get("a") is None
    assert len(cache) == cache.nbytes == 0


@pytest.mark.parametrize(("count", "size"), [(0, 1), (1, 0), (-1, 5)])
def test_a_cache_that_could_hold_nothing_is_refused(count: int, size: int) -> None:
    with pytest.raises(ConfigError, match="holds nothing"):
        Cache[str](count, size)


class Yielding(str):
    """A key at which a thread steps aside for the others whenever it is looked up."""

    __slots__ = ()

    def __hash__(self) -> int:
        time.sleep(0)
        return super().__hash__()


def test_threads_that_share_a_cache_leave_the_sizes_right() -> None:
    cache = Cache[str](2, 100)

    def work() -> None:
        for turn in range(300):
            if cache.get(key := Yielding("abc"[turn % 3])) is None:
                cache.put(key, key, 10)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cache.nbytes == 10 * len(cache) == 20
