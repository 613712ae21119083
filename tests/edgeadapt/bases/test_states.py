"""States that are computed once: the same when they come from the cache, within its limit, the last used ones kept."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from edgeadapt.bases.states import SharedStates, StateCache
from edgeadapt.formats.layout import Floats

WIDTH = 4
Compute = Callable[[list[Sequence[int]]], list[Floats]]


@pytest.fixture
def asked() -> list[Sequence[int]]:
    return []


@pytest.fixture
def compute(asked: list[Sequence[int]]) -> Compute:
    def states(texts: list[Sequence[int]]) -> list[Floats]:
        asked.extend(texts)
        return [np.outer(text, np.full(WIDTH, 0.1, np.float32)).astype(np.float32) for text in texts]

    return states


def test_each_text_is_computed_once_and_rows_keep_their_order(compute: Compute, asked: list[Sequence[int]]) -> None:
    cache = StateCache(1 << 20)
    first = cache.rows([[1, 2], [3], [1, 2]], compute)
    second = cache.rows([(3,), (4, 5, 6), (1, 2)], compute)
    assert asked == [[1, 2], [3], (4, 5, 6)]
    np.testing.assert_array_equal(first[0], first[2])
    np.testing.assert_array_equal(second[0], first[1])
    np.testing.assert_array_equal(second[2], first[0])
    assert [row.shape for row in second] == [(1, WIDTH), (3, WIDTH), (2, WIDTH)]


def test_the_text_that_was_used_longest_ago_leaves_and_the_limit_holds(
    compute: Compute, asked: list[Sequence[int]]
) -> None:
    cache = StateCache(2 * 4 * WIDTH)  # two texts of one token
    cache.rows([[1], [2]], compute)
    cache.rows([[1]], compute)
    cache.rows([[3]], compute)
    assert cache.size == cache.limit_bytes
    asked.clear()
    cache.rows([[1], [3]], compute)
    assert asked == []
    rows = cache.rows([[2], [5], [6], [7] * 9], compute)
    assert [len(row) for row in rows] == [1, 1, 1, 9]  # more than the limit in one call
    assert cache.size <= cache.limit_bytes


def test_half_precision_gives_the_same_states_at_first_and_later(compute: Compute) -> None:
    cache = StateCache(1 << 20, np.float16)
    first, later = (cache.rows([[1, 3]], compute)[0] for _ in range(2))
    assert first.dtype == np.float32
    np.testing.assert_array_equal(first, later)
    assert cache.size == 2 * WIDTH * 2
    huge = cache.rows([[2]], lambda _: [np.full((1, WIDTH), 1e6, np.float32)])[0]
    np.testing.assert_array_equal(huge, 1e6)


def test_a_failed_computation_leaves_the_cache_as_it_was(compute: Compute, asked: list[Sequence[int]]) -> None:
    cache = StateCache(1 << 20)
    cache.rows([[1]], compute)

    def fails(_: list[Sequence[int]]) -> list[Floats]:
        raise MemoryError

    with pytest.raises(MemoryError):
        cache.rows([[1], [2]], fails)
    cache.begin({})
    assert cache.size == 0
    cache.rows([[1]], compute)
    assert asked == [[1], [1]]


def test_what_was_used_last_can_be_kept_elsewhere_up_to_a_limit(compute: Compute, asked: list[Sequence[int]]) -> None:
    cache, later = StateCache(1 << 20), StateCache(1 << 20)
    first = cache.rows([[1], [2, 3], [4]], compute)
    later.begin(cache.used(3 * 4 * WIDTH))
    assert (later.size, later.used(1 << 20)) == (0, {})  # none of them was used yet
    asked.clear()
    second = later.rows([[2, 3], [1]], compute)
    assert asked == [[1]]  # it was the first to be left out
    np.testing.assert_array_equal(second[0], first[1])
    assert len(later.used(1 << 20)) == 2


def test_shared_states_are_those_that_were_computed_and_cost_no_memory(
    compute: Compute, asked: list[Sequence[int]], tmp_path: Path
) -> None:
    texts = [[5, 6, 7], [1, 2], [4], [1, 2], [8, 9]]
    SharedStates.write(tmp_path / "states", "base/2", texts, compute)
    assert sorted(map(len, asked)) == [1, 2, 2, 3]  # each once
    shared = SharedStates.open(tmp_path / "states", "base/2")
    cache = StateCache(1 << 20, np.float16, shared=shared)
    asked.clear()
    rows = cache.rows([*texts, [3]], compute)
    assert asked == [[3]]
    assert cache.size == 2 * WIDTH
    for text, row in zip([*texts, [3]], rows, strict=True):
        np.testing.assert_array_equal(row, compute([text])[0].astype(np.float16))
    assert not SharedStates.open(tmp_path / "states", "base/3")


def test_states_that_float16_cannot_hold_are_not_shared(tmp_path: Path) -> None:
    def compute(texts: list[Sequence[int]]) -> list[Floats]:
        return [np.full((len(text), WIDTH), 1e6 if text[0] == 2 else 1.0, np.float32) for text in texts]

    SharedStates.write(tmp_path / "states", "base", [[1], [2]], compute)
    assert [rows.tolist() for rows in SharedStates.open(tmp_path / "states", "base").values()] == [[[1.0] * WIDTH]]
    SharedStates.write(tmp_path / "none", "base", [[2]], compute)
    assert not SharedStates.open(tmp_path / "none", "base")
    with pytest.raises(MemoryError):
        SharedStates.write(tmp_path / "torn", "base", [[1]], lambda _: (_ for _ in ()).throw(MemoryError))
    assert not (tmp_path / "torn").exists()
