"""The benchmark of routing measures what a router finds, with a real base."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import routing
from benchmarks.__main__ import bench
from tests.client.inference.test_passages import encoder as encoder


def test_shares_are_those_of_the_heads_that_answer() -> None:
    texts, labels = np.eye(3), np.array([0, 1, 1])
    right, wrong = np.array([[1.0, 0], [0, 1], [0, 1]]), np.array([[0.0, 1], [1, 0], [1, 0]])
    router = np.array([[1.0, 0], [0, 1], [0, 0]])  # the last text is unsure
    found = routing.shares(texts, labels, 0, [right, wrong], right, router)
    assert found == pytest.approx(
        {"one for all": 1, "its own": 1, "router": 2 / 3, "language found": 2 / 3, "unsure": 0}
    )
    unsure = routing.shares(texts, labels, 1, [right, wrong, right], right, np.zeros((3, 3)))
    assert (unsure["router"], unsure["its own"], unsure["unsure"]) == (1, 0, 1)


def test_a_table_is_printed(encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "SEEDS", range(100, 101))
    monkeypatch.setattr(routing, "HOUSEHOLDS", 12)
    result = CliRunner().invoke(bench, ["routing", "--bundle", str(encoder)])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0].startswith("2 households")
    assert "language found" in result.stdout
