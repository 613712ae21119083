"""How many cores there are, also where the system does not say which of them are ours."""

import os

import pytest

from adapters.cores import cores


def test_as_many_as_this_process_may_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3}, raising=False)
    assert cores() == 2


@pytest.mark.parametrize(("found", "count"), [(8, 8), (None, 1)])
def test_where_affinity_is_unknown_all_of_them(monkeypatch: pytest.MonkeyPatch, found: int | None, count: int) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: found)
    assert cores() == count
