"""The benchmark of gradient inversion prints a row for each sight of an attacker, and draws its reconstructions."""

from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from aggregation.errors import DataError
from benchmarks import inversion
from benchmarks.__main__ import bench
from tests.support import refused

TINY = ["inversion", "--data", "shapes", "--network", "vit", "--trials", "1", "--searches", "1", "--steps", "1"]


def test_a_table_is_printed_and_reconstructions_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    monkeypatch.setattr(inversion, "PUBLIC", 100)
    result = CliRunner().invoke(bench, [*TINY, "--out", str(tmp_path / "a.png")])
    assert result.exit_code == 0, result.output
    heading, *rows = result.stdout.splitlines()
    assert heading.startswith("small ViT")
    assert len(rows) == len(inversion.SIGHTS) + 1
    assert rows[0].split()[:6] == ["one", "update", "of", "one", "picture", "1.00"]
    assert Image.open(tmp_path / "a.png").height > 100


def test_a_folder_that_does_not_exist_is_named_before_anything_is_measured(tmp_path: Path) -> None:
    result = CliRunner().invoke(bench, [*TINY, "--out", str(tmp_path / "none" / "a.png")])
    with refused(DataError, "--out"):
        raise result.exception or AssertionError(result.output)
