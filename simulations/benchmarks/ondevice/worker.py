"""One contender in a process of its own: JSON lines in, JSON lines out.

The first line says what to load; the commands after it are those of ``Worker``'s callers in ``contender.py``. Standard
output belongs to the answers alone, whatever a library prints. The process ends with its standard input.
"""

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, TextIO

from aggregation.errors import EdgeAdaptError
from simulations.benchmarks.ondevice.engine import Engine, loss


def main() -> None:
    """Load and serve until standard input ends."""
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
    engine = load(json.loads(spec))
    yield {}
    for line in lines:
        yield answer(engine, json.loads(line))


def load(spec: Mapping[str, Any]) -> Engine:
    """The engine of a specification (``contender.Spec``). Each imports its framework only when it is asked for."""
    paths = [Path(path) for path in spec["adapters"]]
    if spec["name"] == "llama.cpp":
        from simulations.benchmarks.ondevice.peer import LlamaCpp

        return LlamaCpp(Path(spec["model"]), threads=spec["threads"], context=spec["context"], adapters=paths)
    if spec["name"] == "torch":
        from adapters.classifier import LoraSpec
        from simulations.benchmarks.ondevice.eager import Eager

        lora = LoraSpec(spec["rank"], spec["alpha"], tuple(spec["targets"]))
        return Eager(spec["model"], threads=spec["threads"], adapters=paths, lora=lora)
    from simulations.benchmarks.ondevice.ours import OnDevice

    return OnDevice(Path(spec["model"]), threads=spec["threads"], context=spec["context"], adapters=spec["adapters"])


def answer(engine: Engine, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Do what is asked: ``use``, ``race``, ``loss`` or ``memory``."""
    if asked["do"] == "use":
        begun = time.perf_counter()
        engine.use(asked["adapter"])
        return {"ms": 1e3 * (time.perf_counter() - begun)}
    if asked["do"] == "loss":
        total, count = loss(engine, asked["rows"])
        return {"loss": total, "count": count}
    if asked["do"] == "memory":
        return {"bytes": _peak()}
    marks = [time.perf_counter()]
    engine.prefill(asked["prompt"])
    marks.append(time.perf_counter())
    tokens = []
    for _ in range(asked["count"]):
        tokens.append(engine.step())
        marks.append(time.perf_counter())
    seconds = [later - earlier for earlier, later in pairwise(marks)]
    return {"prefill": seconds[0], "steps": seconds[1:], "tokens": tokens}


def _peak() -> int:
    """The most memory that this process has had, in bytes; 0 where only a parent's could be told (no Linux)."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    # Not ``ru_maxrss``: a process begins with what its parent had when it was forked.
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)


if __name__ == "__main__":
    main()
