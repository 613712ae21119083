"""Numbers as text."""

from dataclasses import replace

import pytest

from simulations.report.formatting import duration, percent, printable, share, size
from simulations.result import RunResult, dropouts_by_step


@pytest.mark.parametrize(
    ("value", "text"), [(0.8884, ".888"), (1.0, "1.000"), (0.0, ".000"), (0.9996, "1.000"), (float("nan"), "–")]
)
def test_a_share_has_three_digits_and_no_zero(value: float, text: str) -> None:
    assert share(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(999, "999 B"), (9996, "10.0 kB"), (999_600, "1.00 MB"), (2.5e15, "2500 TB")],
)  # fmt: skip
def test_a_size_has_three_digits_and_its_unit(value: float, text: str) -> None:
    assert size(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(9.94, "9.9 s"), (9.96, "10 s"), (59.6, "1 min 00 s"), (3899.7, "1 h 05 min"), (float("nan"), "–")],
)  # fmt: skip
def test_a_duration_is_in_hours_minutes_and_seconds(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("part", "whole", "text"), [(263, 90_868, "0.29 %"), (1, 1, "100 %"), (9.96, 100, "10 %"), (1, 0, "–")]
)
def test_a_percentage_has_two_digits(part: float, whole: float, text: str) -> None:
    assert percent(part, whole) == text


def test_dropouts_are_counted_in_the_order_of_the_protocol_unknown_steps_last(result: RunResult) -> None:
    dropped = {str(number): step for number, step in enumerate(["unmask", "x", "plan", "unmask", "offer"])}
    counts = dropouts_by_step([replace(result.rounds[0], dropped=dropped)])
    assert list(counts.items()) == [("offer", 1), ("plan", 1), ("unmask", 2), ("x", 1)]


def test_control_characters_are_not_printed() -> None:
    assert printable("en-01\x1b[2J\n") == "en-01?[2J?"
