"""What a run shows while it works: a live line and finished lines on a terminal, plain lines elsewhere."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from io import StringIO
from queue import Queue
from typing import Any

import pytest
from rich.console import Console
from rich.progress import Progress

from simulations.engine import progress as module
from simulations.engine.progress import RunProgress, SuiteProgress
from simulations.result import ReportedRound, RunResult

COORDINATOR, DEVICE, RUN = (logging.getLogger(f"edgeadapt.{name}") for name in ("coordinator", "device", "run"))
HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"


class Terminal(StringIO):
    """A file that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


class Clock:
    """Seconds that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def console(file: StringIO) -> Console:
    return Console(file=file, width=100, _environ={"TERM": "xterm"})


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


@contextmanager
def levels_as_they_were() -> Iterator[None]:
    before = [(log.level, list(log.handlers)) for log in (COORDINATOR, DEVICE, RUN)]
    yield
    assert [(log.level, list(log.handlers)) for log in (COORDINATOR, DEVICE, RUN)] == before


class Screen:
    """A run's display on a terminal, with a clock that the test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock, self.out = Clock(), Terminal()
        made: list[Progress] = []

        def display(*columns: Any, **options: Any) -> Progress:
            made.append(Progress(*columns, **options))
            return made[-1]

        monkeypatch.setattr(module, "Progress", display)
        self.progress = RunProgress(console=console(self.out), clock=self.clock)
        self.display = made[0]

    def line(self) -> str:
        out = StringIO()
        Console(file=out, width=100).print(self.display.get_renderable())
        return out.getvalue()


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Screen]:
    with levels_as_they_were():
        screen = Screen(monkeypatch)
        with screen.progress:
            yield screen


def answer(step: str, times: int) -> None:
    for _ in range(times):
        COORDINATOR.debug("answered", extra={"answered": step})


def finish(record: ReportedRound, rounds: int = 10) -> None:
    COORDINATOR.info("round", extra={"record": record, "rounds": rounds})


def run(result: RunResult, progress: RunProgress) -> None:
    with progress:
        with progress.stage("prepare"):
            pass
        with progress.rounds(0, len(result.rounds)):
            for record in result.rounds:
                answer("plan", 12)
                DEVICE.info("trained", extra={"training_seconds": 1.5})
                finish(record)
        with progress.stage("personal step", total=15) as advance:
            for _ in range(15):
                advance()


def test_a_terminal_is_shown_rounds_and_stages(result: RunResult) -> None:
    out = Terminal()
    with levels_as_they_were():
        run(result, RunProgress(console=console(out)))
    text = plain(out.getvalue())
    assert "round  1  accuracy .530  loss 1.790  11 devices  692 kB  dropped: de-03 at survivors" in text
    assert "round 10  accuracy .780" in text
    assert "personal step  15 in 0.0 s" in text


def test_a_pipe_gets_a_plain_line_for_each_stage_and_round_with_the_time_left(result: RunResult) -> None:
    out, clock = StringIO(), Clock()
    progress = RunProgress(console=console(out), clock=clock)
    with levels_as_they_were(), progress, progress.rounds(0, 10):
        clock.now = 6.0
        finish(result.rounds[0])
    assert out.getvalue() == (
        "round  1  accuracy .530  loss 1.790  11 devices  692 kB  dropped: de-03 at survivors  about 54 s left\n"
    )
    with levels_as_they_were():
        run(result, RunProgress(console=console(out), clock=clock))
    assert len(out.getvalue().splitlines()) == 1 + 1 + len(result.rounds) + 1
    assert out.getvalue().endswith("personal step  15 in 0.0 s\n")


def test_a_pipe_gets_a_line_for_each_job_of_a_suite_with_the_time_left() -> None:
    out, clock = StringIO(), Clock()
    with SuiteProgress(console=console(out), clock=clock) as progress:
        progress.show(0.0, 4.0, ["base, seed 0"])
        clock.now = 6.0
        progress.show(1.0, 3.0, ["local, seed 0"], "base, seed 0: 6.0 s")
        clock.now = 12.0
        progress.show(2.0, 2.0, [], "local, seed 0: failed, \x1b[2J")
    assert out.getvalue().splitlines() == [
        "base, seed 0: 6.0 s  25 %  about 18 s left",
        "local, seed 0: failed, ?[2J  50 %  about 12 s left",
    ]


@pytest.mark.parametrize("out", [Terminal(), StringIO()], ids=["terminal", "pipe"])
def test_quiet_nothing_is_printed_and_the_training_is_summed(result: RunResult, out: StringIO) -> None:
    progress = RunProgress(quiet=True, console=console(out))
    with levels_as_they_were():
        run(result, progress)
    assert out.getvalue() == ""
    assert progress.training_seconds == pytest.approx(15.0)


def test_stages_and_their_parts_are_logged(result: RunResult, caplog: pytest.LogCaptureFixture) -> None:
    with levels_as_they_were():
        run(result, RunProgress(quiet=True))
    said = [record.getMessage() for record in caplog.records if record.name == "edgeadapt.run"]
    assert said[:2] == ["prepare begins", "prepare  0.0 s"]
    assert said[2:5] == ["round 1 of 10 begins", "personal step 1 of 15 begins", "personal step: 1 of 15 done"]
    assert said[-1] == "personal step  15 in 0.0 s"


def test_a_pipe_is_shown_a_plain_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeadapt.commandline.PERIOD", 0.01)
    lines: Queue[str] = Queue()

    class Pipe(StringIO):
        def write(self, text: str) -> int:
            lines.put(text)
            return len(text)

    def until(text: str) -> None:
        while not re.fullmatch(rf"{text} \(\d+ s\)", lines.get(timeout=60)):
            pass

    with levels_as_they_were(), RunProgress(console=console(Pipe())) as progress:
        with progress.rounds(0, 10):
            until("round 1 of 10")
            answer("plan", 7)
            until("round 1 of 10, plan: 7 answered")
        with progress.stage("personal step", total=15) as advance:
            advance()
            until(r"personal step 2 of 15(, about .* left)?")


def test_ctrl_c_is_raised_and_cursor_and_loggers_are_restored() -> None:
    out = Terminal()
    with (
        levels_as_they_were(),
        pytest.raises(KeyboardInterrupt),
        RunProgress(console=console(out)) as progress,
        progress.stage("personal step", total=3),
    ):
        raise KeyboardInterrupt
    assert HIDE in out.getvalue()
    assert out.getvalue().rindex(SHOW) > out.getvalue().rindex(HIDE)
    assert "personal step  " not in plain(out.getvalue()).splitlines()[-1]


def test_a_record_that_cannot_be_shown_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)
    with levels_as_they_were(), RunProgress(quiet=True) as progress:
        COORDINATOR.info("odd", extra={"record": object(), "rounds": 3})
        DEVICE.info("trained", extra={"training_seconds": 2.0})
    assert progress.training_seconds == 2.0


def test_a_device_name_cannot_steer_the_terminal(result: RunResult) -> None:
    out = Terminal()
    with RunProgress(console=console(out)):
        finish(replace(result.rounds[0], dropped={"\x1b[2Jx[bold]": "plan"}))
    assert "\x1b[2Jx" not in out.getvalue()
    assert "?[2Jx[bold] at plan" in plain(out.getvalue())


def test_many_devices_that_dropped_out_are_counted_by_step(result: RunResult) -> None:
    out = Terminal()
    with RunProgress(console=console(out)):
        finish(replace(result.rounds[0], dropped={**{f"de-{n}": "plan" for n in range(60)}, "en-1": "unmask"}))
    assert "dropped: 60 at plan, 1 at unmask" in plain(out.getvalue())


def test_the_live_line_has_round_step_devices_and_an_estimate(result: RunResult, screen: Screen) -> None:
    with screen.progress.rounds(0, 10):
        answer("offer", 12)
        assert "round 1 of 10" in screen.line()
        assert "-:--:-- left" in screen.line()
        screen.clock.now = 6.0
        finish(result.rounds[0])
        answer("plan", 7)
        screen.clock.now = 8.0
        assert "round 2 of 10" in screen.line()
        assert "plan: 7 of 12 answered" in screen.line()
        assert "0:00:08 0:00:54 left" in screen.line()  # nine rounds of six seconds


def test_the_estimate_of_a_resumed_run_counts_only_what_this_process_saw(result: RunResult, screen: Screen) -> None:
    with screen.progress.rounds(7, 10):
        assert "round 8 of 10" in screen.line()
        screen.clock.now = 10.0
        finish(result.rounds[7])
        assert "round 9 of 10" in screen.line()
        assert "0:00:10 0:00:20 left" in screen.line()
        finish(result.rounds[8])
        finish(result.rounds[9])
        assert "round 10 of 10" in screen.line()
        assert "0:00:00 left" in screen.line()
    assert screen.line().strip() == ""


def test_a_stage_shows_the_part_under_way_and_what_remains(screen: Screen) -> None:
    with screen.progress.stage("personal step", total=15) as advance:
        assert "personal step 1 of 15" in screen.line()
        for _ in range(5):
            screen.clock.now += 2.0
            advance()
        assert "personal step 6 of 15" in screen.line()
        assert "0:00:10 0:00:20 left" in screen.line()
    assert "personal step  15 in 10 s" in plain(screen.out.getvalue())
