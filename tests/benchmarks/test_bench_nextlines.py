"""The benchmark of next lines counts a line only if all of it, and its end, is the likeliest."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from aggregation.errors import ConfigError
from benchmarks.nextlines import ARMS, OURS, Project, Rows, exact_lines, measure, summary, table
from simulations.scenario import Scenario
from simulations.suite.run import RESULT, SCENARIO
from tests.support import refused

TEXT = "def f():\n    x = 1\n\n    return x\n"
TOKENS = ("def", " f", "():", "\n   ", " x", " =", " ", "1", "\n\n   ", " return", " x", "\n")
ENDS = np.cumsum([len(token) for token in TOKENS]).tolist()
OFFSETS = [*zip([0, *ENDS], ENDS, strict=False)]


def counted(wrong: Sequence[int] = (), unbroken: Sequence[int] = (), size: int = len(TOKENS)) -> list[float]:
    hits, breaks = ([place not in places for place in range(size)] for places in (wrong, unbroken))
    return exact_lines(TEXT, OFFSETS[:size], hits, breaks).tolist()


def test_a_line_is_exact_if_its_tokens_and_the_break_after_it_are_the_likeliest() -> None:
    assert counted() == [2, 2]
    assert counted(wrong=(0, 1, 2)) == [2, 2]  # the first line has none before it
    assert counted(wrong=(3, 8, 11)) == [2, 2]  # which indentation follows does not count
    assert [counted(wrong=(place,)) for place in (4, 7, 9, 10)] == [[1, 2]] * 4
    assert [counted(unbroken=(place,)) for place in (8, 11)] == [[1, 2]] * 2


def test_a_line_that_was_cut_off_does_not_count() -> None:
    assert [counted(size=size) for size in (12, 11, 9, 8, 1)] == [[2, 2], [1, 1], [1, 1], [0, 0], [0, 0]]
    assert exact_lines("one line", [(0, 8)], [True], [True]).tolist() == [0, 0]
    assert exact_lines("a\n\t \nb\n", [(0, 1), (1, 5), (5, 6), (6, 7)], [True] * 4, [True] * 4).tolist() == [1, 1]


def test_what_is_no_finished_run_of_a_language_model_is_refused(tmp_path: Path) -> None:
    with refused(ConfigError, "RUN"):
        measure(tmp_path, print)
    (tmp_path / RESULT).touch()
    (tmp_path / SCENARIO).write_text(Scenario().model_dump_json())
    with refused(ConfigError, "RUN"):
        measure(tmp_path, print)


def test_an_interval_is_of_the_same_pieces_of_both_arms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.nextlines.DRAWS", 100)
    rng = np.random.default_rng(0)
    first: Rows = np.stack([rng.normal(1.2, 0.2, 30), np.ones(30), np.full(30, 4.0)], axis=1)
    ours = first - [0.1, -1.0, 0.0]
    one = Project("a", False, {arm: ours if arm == OURS else first for arm in ARMS})
    found = summary([one, replace(one, name="b"), replace(one, name="c", unseen=True)])
    assert (found["seen"]["projects"], found["seen"]["lines"], found["unseen"]["pieces"]) == (2, 240, 30)
    base = found["seen"]["arms"]["base"]
    assert base["bits per byte"]["value"] == pytest.approx(first[:, 0].mean())
    assert base["bits per byte"]["ours minus it"] == pytest.approx((-0.1, -0.1))
    assert base["exact lines"] == {"value": 0.25, "ours minus it": pytest.approx((0.25, 0.25))}
    assert table(found).count("25.0%") == 2 * (len(ARMS) - 1) * 3
