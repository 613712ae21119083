"""Numbers as they are said."""

from dataclasses import replace
from pathlib import Path

import pytest

from simulations.report.formatting import count, duration, percent, printable, program, share, size
from simulations.report.result import RunResult, dropouts_by_step


@pytest.mark.parametrize(
    ("value", "said"), [(0.8884, ".888"), (1.0, "1.000"), (0.0, ".000"), (0.9996, "1.000"), (float("nan"), "–")]
)
def test_a_share_has_three_digits_and_no_zero(value: float, said: str) -> None:
    assert share(value) == said


@pytest.mark.parametrize(
    ("value", "said"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (9996, "10.0 kB"), (331_400, "331 kB"), (999_600, "1.00 MB"),
     (90_868_376, "90.9 MB"), (2.5e15, "2500 TB")],
)  # fmt: skip
def test_a_size_has_three_digits_and_its_unit(value: float, said: str) -> None:
    assert size(value) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.6, "1 min 00 s"), (252, "4 min 12 s"),
     (3899.7, "1 h 05 min"), (float("nan"), "–")],
)  # fmt: skip
def test_a_duration_is_said_as_people_do(seconds: float, said: str) -> None:
    assert duration(seconds) == said


@pytest.mark.parametrize(
    ("part", "whole", "said"), [(263, 90_868, "0.29 %"), (1, 1, "100 %"), (9.96, 100, "10 %"), (1, 0, "–")]
)
def test_a_percentage_has_two_digits(part: float, whole: float, said: str) -> None:
    assert percent(part, whole) == said


def test_one_is_one_and_many_are_many() -> None:
    assert (count(1, "household"), count(2, "household")) == ("1 household", "2 households")


def test_dropouts_are_counted_in_the_order_of_the_protocol_unknown_steps_last(result: RunResult) -> None:
    dropped = {str(number): step for number, step in enumerate(["unmask", "x", "plan", "unmask", "offer"])}
    counts = dropouts_by_step([replace(result.rounds[0], dropped=dropped)])
    assert list(counts.items()) == [("offer", 1), ("plan", 1), ("unmask", 2), ("x", 1)]


def test_what_steers_a_terminal_is_not_printed() -> None:
    assert printable("en-01\x1b[2J\n") == "en-01?[2J?"


def test_the_command_is_called_as_the_shell_can_find_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.executable", str(tmp_path / "a b" / "python"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert program() == "'a b/python' -m edgeadapt"
    (tmp_path / "edgeadapt").write_text("#!/bin/sh\n")
    (tmp_path / "edgeadapt").chmod(0o755)
    assert program() == "edgeadapt"
