"""Processes of a fleet and what they write, and how long is waited for them."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

HOST = "127.0.0.1"
PATIENCE = 600.0  # seconds for anything to happen, on a machine that has other work
LOOK = 0.1  # seconds
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "OMP_NUM_THREADS": "1"}


class Late(Exception):  # noqa: N818
    """Something did not happen in time."""


def wait_until(condition: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
    """Poll until a condition holds. Raises ``Late``."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise Late(f"not within {seconds:g} s: {what}")
        time.sleep(LOOK)


def free_port() -> int:
    """A port on which nothing listens now."""
    with socket.socket() as found:
        found.bind((HOST, 0))
        return int(found.getsockname()[1])


def edgeadapt(*arguments: object) -> list[str]:
    # -P: a checkout in the working directory has metadata of its own, which would come before those of PYTHONPATH.
    return [sys.executable, "-P", "-m", "edgeadapt", *map(str, arguments)]


class Lines:
    """A process, and the lines that it writes to standard error, with the time of each."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self.lines = list[tuple[float, str]]()
        self._changed = threading.Condition()
        own = {**os.environ, **QUIET, **(environment or {})}
        self.process = subprocess.Popen(  # noqa: S603
            command, env=own, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stderr or ():
            with self._changed:
                self.lines.append((time.monotonic(), line.rstrip()))
                self._changed.notify_all()

    def next(self, text: str, since: int, seconds: float = PATIENCE) -> None:
        """Wait for a line with ``text`` after the first ``since`` lines. Raises ``Late``."""
        with self._changed:
            found = self._changed.wait_for(lambda: any(text in line for _, line in self.lines[since:]), seconds)
        if not found:
            raise Late(f"not within {seconds:g} s: a line with {text!r}; the last ones: {self.lines[-5:]}")

    def end(self, ask: signal.Signals = signal.SIGKILL) -> int:
        """Send a signal and wait for the end; kill it if it takes too long."""
        self.process.send_signal(signal.SIGCONT)
        self.process.send_signal(ask)
        try:
            code = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        self._reader.join(1.0)
        return code


def children(process: int) -> set[int]:
    """The processes that a process has started, and that have not ended."""
    listed = (Path("/proc") / str(process) / "task" / str(process) / "children").read_text(encoding="ascii")
    return {int(number) for number in listed.split()}


def processes_of(home: Path) -> list[int]:
    """The processes whose Flower home is ``home`` or in it: Flower starts some of them in sessions of their own."""
    mark, found = f"FLWR_HOME={home}".encode(), []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            entries = (process / "environ").read_bytes().split(b"\0")
        except OSError:  # another user's, or gone
            continue
        if any(entry == mark or entry.startswith(mark + b"/") for entry in entries):
            found.append(int(process.name))
    return found
