"""What a person sees while a command takes long: a status on a terminal, a plain line now and then on a pipe."""

import io
import sys
import threading
from queue import Queue

import click
import pytest

from edgeadapt.commandline import quiet, status
from export.onnx.exported import counted


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Pipe(io.StringIO):
    def __init__(self) -> None:
        super().__init__()
        self.written: Queue[str] = Queue()

    def write(self, text: str) -> int:
        self.written.put(text)
        return super().write(text)

    def until(self, text: str) -> None:
        while self.written.get(timeout=60) != text:
            pass


@pytest.fixture(params=["1", None], ids=["FORCE_COLOR", "default"], autouse=True)
def _color(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    if request.param:
        monkeypatch.setenv("FORCE_COLOR", request.param)


def test_a_pipe_gets_plain_lines_of_what_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", pipe := Pipe())
    with status("merging"):
        pass
    assert pipe.getvalue() == ""  # it was short
    monkeypatch.setattr("edgeadapt.commandline.PERIOD", 0.01)
    with status("merging") as show:
        pipe.until("merging (0 s)")
        show("comparing")
        pipe.until("merging: comparing (0 s)")
    with status("exporting") as report:
        pipe.until("exporting (0 s)")
        counted(report, "quantizing", 400)(100)
        pipe.until("exporting: quantizing 100 of 400 (0 s)")


def test_a_terminal_shows_the_status_and_is_left_at_the_start_of_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with pytest.raises(ValueError, match="wrong"), status("exporting"):
        raise ValueError("wrong")
    assert "exporting" in terminal.getvalue()
    assert terminal.getvalue().endswith("\x1b[2K")  # the line is cleared
    assert "\x1b[?25h" in terminal.getvalue()  # the cursor is visible again


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_with_quiet_nothing_is_shown(monkeypatch: pytest.MonkeyPatch, stream: type[io.StringIO]) -> None:
    monkeypatch.setattr(sys, "stderr", shown := stream())

    @click.command()
    @quiet
    def command() -> None:
        with status("exporting") as report:
            counted(report, "quantizing", 400)(100)
            assert not [thread.name for thread in threading.enumerate() if "speak" in thread.name]

    command.main(["-q"], standalone_mode=False)
    assert shown.getvalue() == ""


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_an_export_shows_its_stage_and_the_share_that_is_done_on_a_terminal_alone(
    monkeypatch: pytest.MonkeyPatch, stream: type[io.StringIO]
) -> None:
    monkeypatch.setattr(sys, "stderr", shown := stream())
    with status("exporting") as report:
        report("building the graph", 0, 0)
        step = counted(report, "quantizing", 400)
        step(100)
    if stream is io.StringIO:
        assert shown.getvalue() == ""
    else:
        assert "exporting: quantizing" in shown.getvalue()
        assert "25%" in shown.getvalue()
        assert "building" not in shown.getvalue().rpartition("quantizing")[2]
