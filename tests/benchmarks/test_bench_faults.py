"""Where the servers of a fleet do not start, one line says so, nothing is left behind, and other rows stay."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from aggregation.errors import EdgeAdaptError
from benchmarks.faults import measure, postgresql
from benchmarks.faults.postgresql import PostgresServer
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


def refusal(error: pytest.ExceptionInfo[EdgeAdaptError]) -> str:
    assert error.value.about == "postgresql"
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_cluster_that_cannot_be_made_leaves_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgresql, "USER", "pg_fleet")  # a name that PostgreSQL keeps for itself
    with pytest.raises(EdgeAdaptError) as error:
        PostgresServer.create()
    assert "pg_fleet" in refusal(error)
    assert not [*place.iterdir()]


def test_a_server_that_does_not_start_says_why_and_is_ended(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = PostgresServer.create()
    assert server.process is not None
    assert not [path for path in server.folder.iterdir() if path.name == "password"]
    server.stop()
    monkeypatch.setattr(postgresql, "DEADLINE", -1.0)
    with pytest.raises(EdgeAdaptError) as error:
        server.start()
    refusal(error)
    assert server.process.poll() is not None
    monkeypatch.undo()
    (server.data / "postgresql.conf").write_text("nonsense = 1\n", encoding="ascii")
    with pytest.raises(EdgeAdaptError) as error:
        server.start()
    assert "configuration file" in refusal(error)
    server.remove()
    assert not server.folder.exists()


@pytest.mark.usefixtures("place")
def test_a_fleet_that_does_not_start_is_a_row_for_each_of_its_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgresql, "USER", "pg_fleet")
    rows = measure.measure(["kill-leader", "kill-database"], print)
    assert [row.fault for row in rows] == ["kill-leader", "kill-database"]
    assert all("pg_fleet" in row.lost[0] and "\n" not in row.lost[0] for row in rows)
