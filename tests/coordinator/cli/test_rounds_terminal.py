"""``edgeadapt coordinator status --rounds --follow`` in a real terminal: a pty, whose screen an emulator draws."""

import fcntl
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import pyte
import pytest

from coordinator.cli.coordinator import _LiveLine
from coordinator.status import round_lines
from tests.support import FleetOf
from tests.support.gateway import wait_until

ROOT = Path(__file__).parents[3]
ROW = {
    "round": 3,
    "version": None,
    "survivors": [],
    "dropped": {"a": "plan"},
    "metrics": {},
    "seconds": 1.25,
    "ended": None,
}
NOTES = {"epsilon": 1.5, "aborted": "2 of 3 answers to the plan, and 3 are needed", "spoiled": None}


class Terminal:
    """A program in a terminal of a size, and the screen that a person sees."""

    def __init__(self, command: list[str], columns: int) -> None:
        self.screen, master_slave = pyte.Screen(columns, 24), pty.openpty()
        self._stream, (self._master, slave) = pyte.ByteStream(self.screen), master_slave
        self._set_size(columns)
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=slave, stdout=slave, stderr=slave, start_new_session=True, preexec_fn=_controlled
        )
        os.close(slave)
        self._lock = threading.Lock()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _set_size(self, columns: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def _read(self) -> None:
        while True:
            try:
                found = os.read(self._master, 4096)
            except OSError:  # Linux: nobody has the terminal open any more
                return
            if not found:
                return
            with self._lock:
                self._stream.feed(found)

    def resize(self, columns: int) -> None:
        with self._lock:
            self.screen.resize(24, columns)
        self._set_size(columns)

    def lines(self) -> list[str]:
        with self._lock:
            return [line.rstrip() for line in self.screen.display if line.strip()]

    def type(self, keys: bytes) -> None:
        os.write(self._master, keys)

    def end(self) -> int:
        code = self.process.wait(60)
        self._reader.join(60)
        return code

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


def _controlled() -> None:
    """Make standard input the controlling terminal, so that Ctrl-C is a signal."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@contextmanager
def following(folder: Path, columns: int) -> Iterator[Terminal]:
    command = [sys.executable, "-m", "edgeadapt", "coordinator", "status", str(folder), "--rounds", "--follow"]
    terminal = Terminal(command, columns)
    try:
        yield terminal
    finally:
        terminal.close()


@contextmanager
def halted(fleet: Any, number: int) -> Iterator[threading.Event]:
    """A run in which nobody answers the plan of a round until the event is set."""
    from client.node.app import app

    go, plans = threading.Event(), 0

    def answer(message: Any, context: Any) -> Any:
        nonlocal plans
        plans += message.metadata.message_type == "train.plan"
        if plans > 3 * (number - 1):
            assert go.wait(120)
        return app(message, context)

    running = threading.Thread(target=lambda: fleet.federate(fleet.grid(app=answer)))
    running.start()
    try:
        yield go
    finally:
        go.set()
        running.join()


def test_the_step_under_way_is_one_line_which_the_round_replaces(fleet_of: FleetOf) -> None:
    fleet, columns = fleet_of(3, rounds=2), 40
    with halted(fleet, 2) as go, following(fleet.out / "coordinator", columns) as terminal:
        live = "round 2, plan: 0 of 3 devices"
        wait_until(lambda: live in terminal.lines(), 120)
        heading, first, _ = terminal.lines()
        assert first.split()[0] == "1"
        assert "loss" not in heading
        terminal.resize(24)
        wait_until(lambda: live[:23] in terminal.lines(), 60)
        terminal.resize(columns)
        wait_until(lambda: live in terminal.lines(), 60)
        go.set()
        assert terminal.end() == 0
        lines = terminal.lines()
    assert [line.split()[0] for line in lines] == ["round", "1", "2"]


def test_ctrl_c_leaves_the_rounds_and_one_line(fleet_of: FleetOf) -> None:
    fleet = fleet_of(3, rounds=2)
    with halted(fleet, 2), following(fleet.out / "coordinator", 80) as terminal:
        wait_until(lambda: any(line.startswith("round 2, plan") for line in terminal.lines()), 120)
        terminal.type(b"\x03")
        assert terminal.end() == 128 + signal.SIGINT
        assert [line.split()[0] for line in terminal.lines()] == ["round", "1", "edgeadapt:"]


def test_a_line_is_erased_after_ctrl_c_while_it_was_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line, write = _LiveLine(on=True), click.echo

    def interrupted(*parts: Any, **how: Any) -> None:
        write(*parts, **how)
        raise KeyboardInterrupt

    monkeypatch.setattr("coordinator.cli.coordinator._width", lambda _: 80)
    with monkeypatch.context() as during:
        during.setattr(click, "echo", interrupted)
        with pytest.raises(KeyboardInterrupt):
            line.show("round 2: waiting")
    line.show("")
    assert capsys.readouterr().err == "\rround 2: waiting\r"  # click leaves control codes out of what is no terminal


def test_columns_that_do_not_fit_are_left_out_and_notes_follow() -> None:
    assert round_lines(ROW | NOTES) == [
        "    3        -          0         1         -       -      1.2                     -  epsilon 1.500  "
        "aborted: 2 of 3 answers to the plan, and 3 are needed"
    ]
    assert round_lines(ROW | NOTES, 40) == [
        "    3          0         1         -",
        "       epsilon 1.500  aborted: 2 of 3",
        "       answers to the plan, and 3 are",
        "       needed",
    ]
