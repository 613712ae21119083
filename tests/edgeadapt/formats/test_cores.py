"""How many cores there are, also where the system does not say which of them are ours; and work that is done ahead."""

import os
from collections.abc import Iterator
from threading import Barrier, Event

import pytest

from edgeadapt.formats.cores import ahead, cores


def test_as_many_as_this_process_may_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3}, raising=False)
    assert cores() == 2


@pytest.mark.parametrize(("found", "count"), [(8, 8), (None, 1)])
def test_where_affinity_is_unknown_all_of_them(monkeypatch: pytest.MonkeyPatch, found: int | None, count: int) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: found)
    assert cores() == count


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_outcomes_come_in_order_each_with_its_item_and_its_error(threads: int) -> None:
    items = []
    for item, outcome in ahead(lambda item: 12 // item, [3, 0, 4, 1, 0], threads):
        items.append(item)
        if item:
            assert outcome() == 12 // item
        else:
            with pytest.raises(ZeroDivisionError):
                outcome()
    assert items == [3, 0, 4, 1, 0]


def test_calls_run_at_the_same_time() -> None:
    both = Barrier(2, timeout=10)
    assert sorted(outcome() for _, outcome in ahead(lambda item: both.wait(), range(4), 2)) == [0, 0, 1, 1]


@pytest.mark.parametrize(("threads", "first"), [(1, [0]), (3, [0, 1, 2, 3])])
def test_few_items_wait_for_the_caller(threads: int, first: list[int]) -> None:
    taken: list[int] = []
    go = Event()

    def items() -> Iterator[int]:
        for item in range(9):
            taken.append(item)
            if item == len(first) - 1:
                go.set()
            yield item

    outcomes = ahead(lambda item: go.wait(10) and taken[-1] < 0, items(), threads)
    next(outcomes)
    assert taken == first
    assert [item for item, _ in outcomes] == list(range(1, 9))
