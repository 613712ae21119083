"""What a run shows while it works: on a terminal what a person wants to know, elsewhere nothing."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from simulations.engine.progress import Progress
from simulations.engine.status import Rounds, Stage
from simulations.report.result import RoundResult, RunResult

COORDINATOR, DEVICE = logging.getLogger("edgeadapt.coordinator"), logging.getLogger("edgeadapt.device")
HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"


class Terminal(StringIO):
    """A file that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


class Clock:
    """Seconds as told."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def console(file: StringIO) -> Console:
    return Console(file=file, width=100, _environ={"TERM": "xterm"})


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def drawn(part: Rounds | Stage, now: float) -> str:
    out = StringIO()
    screen = Console(file=out, width=100, _environ={})
    for line in part.draw(now):
        screen.print(line)
    return out.getvalue()


def answer(step: str, times: int) -> None:
    for _ in range(times):
        COORDINATOR.debug("answered", extra={"answered": step})


def finish(record: RoundResult, rounds: int = 10) -> None:
    COORDINATOR.info("round", extra={"record": record, "rounds": rounds})


@contextmanager
def levels_as_they_were() -> Iterator[None]:
    before = [(log.level, list(log.handlers)) for log in (COORDINATOR, DEVICE)]
    yield
    assert [(log.level, list(log.handlers)) for log in (COORDINATOR, DEVICE)] == before


def run(result: RunResult, progress: Progress) -> None:
    with progress:
        with progress.stage("prepare"):
            pass
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
        run(result, Progress(console=console(out)))
    text = plain(out.getvalue())
    assert "round  1  accuracy .530  loss 1.790  11 devices  692 kB  dropped out: de-03 at survivors" in text
    assert "round 10  accuracy .780" in text
    assert "personal step  15 in 0.0 s" in text


@pytest.mark.parametrize("quiet", [True, False])
def test_no_terminal_or_quiet_prints_nothing_and_still_counts(result: RunResult, quiet: bool) -> None:
    out = Terminal() if quiet else StringIO()
    progress = Progress(quiet=quiet, console=console(out))
    with levels_as_they_were():
        run(result, progress)
    assert out.getvalue() == ""
    assert progress.training_seconds == pytest.approx(15.0)


def test_a_pipe_is_shown_nothing_even_where_colour_is_forced(
    result: RunResult, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    run(result, Progress())
    assert capsys.readouterr() == ("", "")


def test_ctrl_c_passes_the_cursor_comes_back_and_the_loggers_are_as_before() -> None:
    out = Terminal()
    with (
        levels_as_they_were(),
        pytest.raises(KeyboardInterrupt),
        Progress(console=console(out)) as progress,
        progress.stage("personal step", total=3),
    ):
        raise KeyboardInterrupt
    assert HIDE in out.getvalue()
    assert out.getvalue().rindex(SHOW) > out.getvalue().rindex(HIDE)
    assert "personal step  " not in plain(out.getvalue()).splitlines()[-1]


def test_ctrl_c_while_a_record_is_shown_is_not_swallowed(result: RunResult, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Rounds, "finish", interrupted)
    with levels_as_they_were(), pytest.raises(KeyboardInterrupt), Progress(quiet=True):
        finish(result.rounds[0])


def test_a_record_that_cannot_be_shown_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)
    with levels_as_they_were(), Progress(quiet=True) as progress:
        COORDINATOR.info("odd", extra={"record": object(), "rounds": 3})
        DEVICE.info("trained", extra={"training_seconds": 2.0})
    assert progress.training_seconds == 2.0


def test_a_device_name_cannot_steer_the_terminal(result: RunResult) -> None:
    out = Terminal()
    with Progress(console=console(out)):
        finish(replace(result.rounds[0], dropped={"\x1b[2Jx[bold]": "plan"}))
    assert "\x1b[2Jx" not in out.getvalue()
    assert "?[2Jx[bold] at plan" in plain(out.getvalue())


def test_the_live_lines_say_round_step_devices_accuracy_bytes_and_dropouts(result: RunResult) -> None:
    rounds = Rounds(began=0.0)
    for _ in range(12):
        rounds.answer("offer")
    rounds.finish(result.rounds[0], 10, now=6.0)
    for _ in range(7):
        rounds.answer("plan")
    text = drawn(rounds, now=8.0)
    assert "round 2 of 10" in text
    assert "plan: 7 of 12 answered" in text
    assert "accuracy .530  loss 1.790  692 kB in all  1 dropout" in text
    assert "8.0 s, about 52 s left" in text  # 9 rounds at 6 s, 2 s of which are over


def test_how_many_devices_there_are_is_said_once_it_is_known() -> None:
    rounds = Rounds(began=0.0)
    for _ in range(9):
        rounds.answer("offer")
    assert "offer: 9 answered" in drawn(rounds, now=1.0)
    rounds.answer("roster")
    assert "roster: 1 of 9 answered" in drawn(rounds, now=1.0)


def test_the_estimate_of_a_resumed_run_counts_only_what_this_process_saw(result: RunResult) -> None:
    rounds = Rounds(began=100.0)
    rounds.finish(result.rounds[7], 10, now=110.0)  # round 8 of 10
    assert "10 s, about 20 s left" in drawn(rounds, now=110.0)
    assert not rounds.over
    rounds.finish(result.rounds[9], 10, now=120.0)
    assert rounds.over


def test_a_stage_says_which_part_is_under_way_and_what_remains() -> None:
    stage = Stage("personal step", 15, began=0.0)
    assert "personal step 1 of 15" in drawn(stage, now=1.0)
    for _ in range(5):
        stage.advance()
    assert "personal step 6 of 15" in drawn(stage, now=10.0)
    assert "10 s, about 20 s left" in drawn(stage, now=10.0)


def test_an_aborted_round_says_why_and_keeps_the_last_accuracy(result: RunResult) -> None:
    rounds = Rounds(began=0.0)
    rounds.finish(result.rounds[0], 10, now=6.0)
    gone = replace(result.rounds[1], survivors=(), aborted="4 are left, 8 are needed", metrics={}, version=None)
    assert rounds.finish(gone, 10, now=12.0).plain.startswith("round  2  aborted: 4 are left, 8 are needed")
    assert "accuracy .530" in drawn(rounds, now=12.0)


def test_levels_are_lowered_only_while_it_listens() -> None:
    DEVICE.setLevel(logging.ERROR)
    try:
        with Progress(quiet=True):
            assert COORDINATOR.isEnabledFor(logging.DEBUG)
            assert DEVICE.isEnabledFor(logging.INFO)
        assert DEVICE.level == logging.ERROR
    finally:
        DEVICE.setLevel(logging.NOTSET)


def test_a_dumb_terminal_is_shown_nothing(result: RunResult) -> None:
    out = Terminal()
    run(result, Progress(console=Console(file=out, _environ={"TERM": "dumb"}), clock=Clock()))
    assert out.getvalue() == ""
