"""The other side of ``worker.py``: starts a contender's process, asks it one thing at a time, and ends it."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Self

from aggregation.errors import DataError

PATIENCE = 30  # seconds for a process to end by itself
# A process of its own does not inherit what ``edgeadapt.main`` does about warnings.
QUIET = {"PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error"}


@dataclass(frozen=True, slots=True)
class Spec:
    """What a process loads. ``rank``, ``alpha`` and ``targets`` are the adapters'; only torch needs to be told."""

    name: str  # of a profile of ours, or of the peer
    model: str  # GGUF file, base as ``find_base`` takes it, or bundle
    adapters: tuple[str, ...]  # files; of ours, names in the bundle
    tokens: int  # to generate in a turn
    threads: int
    context: int  # tokens
    rank: int
    alpha: int
    targets: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Turn:
    """What one turn took: seconds for the prompt, seconds for each token after it, and those tokens."""

    prefill: float
    steps: list[float]
    tokens: list[int]


class Contender:
    """A running process with its model loaded.

    Attributes:
        spec: What it loaded.
        cold: Seconds from the start of the process to the first token of the base.
        first_use: Milliseconds to load the first adapter.
    """

    def __init__(self, spec: Spec, prompt: Sequence[int]) -> None:
        """Start it, wait until it has loaded, and let it read ``prompt`` once.

        Raises:
            DataError: It could not load; the message is its own.
        """
        self.spec = spec
        begun = time.perf_counter()
        command = [sys.executable, "-m", "simulations.benchmarks.ondevice.worker"]
        # In a session of its own: Ctrl-C is for this process, which then ends that one.
        self._process = subprocess.Popen(  # noqa: S603
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=QUIET | os.environ,
        )
        try:
            self._say(asdict(spec))
            self._hear()
            self.race(prompt, 0)
            self.cold = time.perf_counter() - begun
            self.first_use = self.use(0)
        except BaseException:
            self._end(at_once=True)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end(at_once=error is not None)

    def use(self, adapter: int | None) -> float:
        """Switch to an adapter, or none; the milliseconds that took."""
        return float(self._ask(do="use", adapter=adapter)["ms"])

    def race(self, prompt: Sequence[int], count: int) -> Turn:
        """Read a prompt and generate ``count`` tokens."""
        return Turn(**self._ask(do="race", prompt=list(prompt), count=count))

    def loss(self, rows: Sequence[Sequence[int]]) -> float:
        """Cross-entropy in nats, mean over the tokens."""
        heard = self._ask(do="loss", rows=rows)
        return float(heard["loss"] / heard["count"])

    def memory(self) -> int:
        """The most memory that the process has had, in bytes."""
        return int(self._ask(do="memory")["bytes"])

    def _ask(self, **asked: Any) -> dict[str, Any]:
        self._say(asked)
        return self._hear()

    def _say(self, what: dict[str, Any]) -> None:
        assert self._process.stdin  # noqa: S101
        try:
            print(json.dumps(what), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise DataError(f"the process of {self.spec.name} has ended") from None

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout  # noqa: S101
        if not (line := self._process.stdout.readline()):
            raise DataError(f"the process of {self.spec.name} has ended; what it said stands above")
        heard: dict[str, Any] = json.loads(line)
        if "error" in heard:
            raise DataError(f"{self.spec.name}: {heard['error']}")
        return heard

    def _end(self, *, at_once: bool) -> None:
        """Close its input, which ends it, and wait; kill it if there is no time or it takes too long."""
        assert self._process.stdin  # noqa: S101
        assert self._process.stdout  # noqa: S101
        try:
            if at_once:
                self._process.kill()
            self._process.stdin.close()
            self._process.wait(PATIENCE)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        finally:
            self._process.stdout.close()
