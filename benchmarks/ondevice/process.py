"""Both ends of a contender's process: ``Contender`` starts it and sends commands, ``main`` loads an engine and answers.

The first line of standard input is a ``ContenderSpec``, each one after it a command, and standard output has one line
of JSON for each: ``{}`` for the specification, ``{"error": …}`` in place of an answer. Whatever a library prints goes
to standard error. The process ends with its standard input.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TextIO

import numpy as np

from aggregation.errors import DataError, EdgeAdaptError
from edgeadapt.formats.layout import Floats

PEER, TORCH = "llama.cpp", "torch"
GRACE = 30  # seconds for a process to end by itself
# A process of its own does not inherit the filters of warnings that ``program.main`` sets.
QUIET = {"PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error"}


class ContenderEngine(Protocol):
    """A loaded model with at most one active adapter, at first none."""

    def use(self, adapter: int | None) -> None:
        """Activate an adapter, by its place in the list that the engine has loaded, or none."""

    def prefill(self, tokens: Sequence[int]) -> None:
        """Clear the context, read a prompt and select the likeliest next token."""

    def step(self) -> int:
        """Read the selected token and select the one after it; return the token that was read."""

    def logits(self, tokens: Sequence[int]) -> Floats:
        """The logits after each token, of shape ``(len(tokens), vocabulary)``, from an empty context."""


def loss(engine: ContenderEngine, rows: Sequence[Sequence[int]]) -> tuple[float, int]:
    """Sum the cross-entropy of ``rows`` under a model, in nats, over every token but the first of each row. Each row
    starts from an empty context. Returns the sum, in float64, and the number of those tokens."""
    total = 0.0
    for row in rows:
        scores = engine.logits(row)[:-1].astype(np.float64)
        scores -= scores.max(axis=1, keepdims=True)
        likely = scores[np.arange(len(row) - 1), row[1:]] - np.log(np.exp(scores).sum(axis=1))
        total -= float(likely.sum())
    return total, sum(len(row) - 1 for row in rows)


@dataclass(frozen=True, slots=True)
class ContenderSpec:
    """What a process loads. ``rank``, ``alpha`` and ``targets`` describe the adapters; only torch needs them."""

    name: str  # of a profile of ours, ``PEER`` or ``TORCH``
    model: str  # bundle, GGUF file, or base as ``find_base`` takes it
    adapters: tuple[str, ...]  # files; of ours, names in the bundle
    tokens: int  # to generate after a prompt
    threads: int
    context: int  # tokens
    rank: int
    alpha: int
    targets: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Completion:
    """A generated text with its times: seconds for the prompt, seconds for each token, and the tokens."""

    prefill: float
    steps: list[float]
    tokens: list[int]


class Contender:
    """A running process that has loaded its model."""

    def __init__(self, spec: ContenderSpec, prompt: Sequence[int]) -> None:
        """Start the process, wait until it has loaded, and let it read ``prompt`` once. Raises DataError: it could not
        load; the message is its own."""
        self.spec = spec
        begun = time.perf_counter()
        # In a session of its own: Ctrl-C reaches this process only, which then ends that one.
        self.process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=QUIET | os.environ,
        )
        try:
            self._ask(**asdict(spec))
            self.complete(prompt, 0)
            self.cold = time.perf_counter() - begun  # seconds to the first token of the base
            self.first_use = self.use(0)  # milliseconds to load the first adapter
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
        """Activate an adapter, or none; return the milliseconds that took."""
        return float(self._ask(do="use", adapter=adapter)["ms"])

    def complete(self, prompt: Sequence[int], count: int) -> Completion:
        """Read a prompt and generate ``count`` tokens."""
        return Completion(**self._ask(do="complete", prompt=list(prompt), count=count))

    def loss(self, rows: Sequence[Sequence[int]]) -> float:
        """Mean cross-entropy per token, in nats (``loss`` of this module)."""
        answer = self._ask(do="loss", rows=rows)
        return float(answer["loss"] / answer["count"])

    def memory(self) -> int:
        """Peak memory of the process, in bytes; 0 outside Linux."""
        return int(self._ask(do="memory")["bytes"])

    def _ask(self, **command: Any) -> dict[str, Any]:
        assert self.process.stdin  # noqa: S101
        assert self.process.stdout  # noqa: S101
        try:
            print(json.dumps(command), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            text = f"the process of {self.spec.name} has ended; its own message is above"
            raise DataError(text, about=self.spec.name)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise DataError(f"{self.spec.name}: {answer['error']}", about=self.spec.name)
        return answer

    def _end(self, *, at_once: bool) -> None:
        """Close its standard input, which ends it, and wait; kill it if ``at_once``, or after ``GRACE`` seconds."""
        assert self.process.stdin  # noqa: S101
        assert self.process.stdout  # noqa: S101
        try:
            if at_once:
                self.process.kill()
            self.process.stdin.close()
            self.process.wait(GRACE)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        finally:
            self.process.stdout.close()


def main() -> None:
    """Load and answer until standard input ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        for answer in _serve(sys.stdin):
            print(json.dumps(answer), file=answers, flush=True)
    except EdgeAdaptError as error:
        print(json.dumps({"error": str(error)}), file=answers, flush=True)


def _serve(lines: TextIO) -> Iterator[dict[str, Any]]:
    if not (spec := lines.readline()):
        return
    engine = _load(json.loads(spec))
    yield {}
    for line in lines:
        yield _answer(engine, json.loads(line))


def _load(spec: Mapping[str, Any]) -> ContenderEngine:
    """Load the engine of a ``ContenderSpec``, and import no framework except its own."""
    paths = [Path(path) for path in spec["adapters"]]
    if spec["name"] == PEER:
        from benchmarks.ondevice.peer import LlamaCppEngine

        return LlamaCppEngine(Path(spec["model"]), threads=spec["threads"], context=spec["context"], adapters=paths)
    if spec["name"] == TORCH:
        from benchmarks.ondevice.eager import TorchEngine
        from edgeadapt.formats.peftconfig import PeftConfig

        lora = PeftConfig.lora(spec["rank"], spec["alpha"], spec["targets"])
        return TorchEngine(spec["model"], threads=spec["threads"], adapters=paths, lora=lora)
    from benchmarks.ondevice.ours import BundleEngine

    return BundleEngine(
        Path(spec["model"]), threads=spec["threads"], context=spec["context"], adapters=spec["adapters"]
    )


def _answer(engine: ContenderEngine, command: Mapping[str, Any]) -> dict[str, Any]:
    if command["do"] == "use":
        begun = time.perf_counter()
        engine.use(command["adapter"])
        return {"ms": 1e3 * (time.perf_counter() - begun)}
    if command["do"] == "loss":
        total, count = loss(engine, command["rows"])
        return {"loss": total, "count": count}
    if command["do"] == "memory":
        return {"bytes": resident("VmHWM")}
    marks = [time.perf_counter()]
    engine.prefill(command["prompt"])
    marks.append(time.perf_counter())
    tokens = []
    for _ in range(command["count"]):
        tokens.append(engine.step())
        marks.append(time.perf_counter())
    seconds = [later - earlier for earlier, later in pairwise(marks)]
    return {"prefill": seconds[0], "steps": seconds[1:], "tokens": tokens}


def in_process(module: str, given: Mapping[str, Any], environment: Mapping[str, str] = QUIET) -> dict[str, Any]:
    """Call ``answer_once`` in a new process of ``module`` with these arguments and ``begun``, when it was started.
    Raises DataError: it fails, or has ended."""
    command = [sys.executable, "-m", module, json.dumps({**given, "begun": time.monotonic()})]
    own = os.environ | environment
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=own, check=False)  # noqa: S603
    if not done.stdout:
        raise DataError("the process that was measured has ended; its own message is above", about=module)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if "error" in found:
        raise DataError(found["error"], about=found["about"])
    return found


def answer_once(measure: Callable[..., Mapping[str, Any]]) -> None:
    """Call ``measure`` with the arguments that ``in_process`` gives, and print what it returns as a JSON object."""
    try:
        found = measure(**json.loads(sys.argv[1]))
    except EdgeAdaptError as error:
        found = {"error": str(error), "about": error.about}
    print(json.dumps(found))


def resident(what: str) -> int:
    """Bytes of this process in memory by a field of Linux's ``status`` (proc(5)): ``VmRSS`` now, ``VmHWM`` at most. 0
    outside Linux."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    # Not ``ru_maxrss``: a process begins with what its parent had when it was forked.
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{what}:")), 0)


if __name__ == "__main__":
    main()
