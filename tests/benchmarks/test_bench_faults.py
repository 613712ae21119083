"""Where the servers of a fleet do not start, one line says so, nothing is left behind, and other rows stay."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.faults import measure, postgresql
from tests.support.postgresql import REQUIRED
from tests.support.programs import need


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where temporary folders are made, which the server's user can reach."""
    need(not postgresql.missing(), postgresql.missing(), required=REQUIRED)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


@pytest.mark.usefixtures("place")
def test_a_fleet_that_does_not_start_is_a_row_for_each_of_its_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgresql, "USER", "pg_fleet")
    rows = measure.measure(["kill-leader", "kill-database"], print)
    assert [row.fault for row in rows] == ["kill-leader", "kill-database"]
    assert all("pg_fleet" in row.lost[0] and "\n" not in row.lost[0] for row in rows)
