"""What a person sees while a command takes long: a status on a terminal, nothing on a pipe."""

import io
import sys

import pytest

from export.cli.options import progress, status
from export.onnx.exported import counted


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(params=["1", None], ids=["FORCE_COLOR", "default"], autouse=True)
def _color(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    if request.param:
        monkeypatch.setenv("FORCE_COLOR", request.param)


def test_a_pipe_gets_no_status(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", pipe := io.StringIO())
    with status("exporting"):
        pass
    assert pipe.getvalue() == ""


def test_a_terminal_shows_the_status_and_is_left_at_the_start_of_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with pytest.raises(ValueError, match="wrong"), status("exporting"):
        raise ValueError("wrong")
    assert "exporting" in terminal.getvalue()
    assert terminal.getvalue().endswith("\x1b[2K")  # the line is cleared
    assert "\x1b[?25h" in terminal.getvalue()  # the cursor is visible again


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_an_export_shows_its_stage_and_the_share_that_is_done_on_a_terminal_alone(
    monkeypatch: pytest.MonkeyPatch, stream: type[io.StringIO]
) -> None:
    monkeypatch.setattr(sys, "stderr", shown := stream())
    with progress("exporting") as report:
        report("building the graph", 0, 0)
        step = counted(report, "quantizing", 400)
        step(100)
    if stream is io.StringIO:
        assert shown.getvalue() == ""
    else:
        assert "exporting: quantizing" in shown.getvalue()
        assert "25%" in shown.getvalue()
        assert "building" not in shown.getvalue().rpartition("quantizing")[2]
