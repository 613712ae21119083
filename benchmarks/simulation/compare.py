"""The measurements of `python -m benchmarks simulation`: both engines on copies of one fleet, one after the other.

Each run is a process of its own. The rate is that of the rounds after the first one, which starts processes and loads
torch; the seconds of a whole run are given as well. Memory is the peak of the sum over all processes of a run, in which
a page that k processes share counts 1/k in each (``pss``).
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from aggregation.errors import ConfigError, EdgeAdaptError
from benchmarks.ondevice.memory import Pages
from benchmarks.simulation.contender import ENGINES
from benchmarks.simulation.fleets import make_fleet
from benchmarks.timing import Note, aligned, in_turn, spread_text
from simulations.engine.flowerengine import require_ray

SAMPLE = 0.5  # seconds between two looks at the memory
ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True, slots=True)
class Work:
    """What one row of the table measures."""

    clients: int
    rounds: int
    minilm: bool
    trains: bool
    goal: float  # times as many clients a second as Flower's engine


@dataclass(frozen=True, slots=True)
class SimulationWorkload:
    """The rows, and how often both engines run each."""

    rows: Mapping[str, Work]
    repeats: int = 3


FULL = SimulationWorkload(
    {
        "no training": Work(30, 5, minilm=False, trains=False, goal=20.0),
        "tiny model": Work(30, 5, minilm=False, trains=True, goal=3.0),
        "MiniLM": Work(8, 3, minilm=True, trains=True, goal=1.2),
    }
)
QUICK = SimulationWorkload({"no training": Work(4, 2, minilm=False, trains=False, goal=20.0)}, 1)


def compare(work: SimulationWorkload, note: Note) -> dict[str, Any]:
    """Measure both engines and return the figures as JSON has them. Raises ConfigError: Ray is not installed, or the
    system is not Linux."""
    require_ray()
    found = dict[str, dict[str, Any]]()
    with TemporaryDirectory() as folder:
        for name, row in work.rows.items():
            note(f"{name}: making {row.clients} clients")
            fleet = Path(folder) / name.replace(" ", "-")
            fleet.mkdir()
            make_fleet(fleet, row.clients, row.rounds, minilm=row.minilm, trains=row.trains)
            sides = in_turn(ENGINES, work.repeats, partial(_run, fleet=fleet, row=row), note, f"{name}: ")
            ours, peer = sides["ours"], sides["flower"]
            found[name] = {"clients": row.clients, "rounds": row.rounds, "goal": row.goal, **sides}
            found[name]["ratio"] = ours["clients_per_second"]["median"] / peer["clients_per_second"]["median"]
            found[name]["memory_share"] = ours["memory"]["median"] / peer["memory"]["median"]
            shutil.rmtree(fleet)
    return {"rows": found, "repeats": work.repeats}


def _run(engine: str, fleet: Path, row: Work) -> dict[str, Any]:
    """Return the figures of one run on a copy of the fleet. Raises EdgeAdaptError: a device dropped out."""
    with TemporaryDirectory() as folder:
        copy = Path(folder) / "fleet"
        shutil.copytree(fleet, copy)
        command = [sys.executable, "-m", "benchmarks.simulation.contender", engine, str(copy)]
        environment = {**os.environ, **ENVIRONMENT}
        with subprocess.Popen(  # noqa: S603  # this package
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        ) as run:
            memory = 0
            while run.poll() is None:
                memory = max(memory, sum(_pages(process) for process in tree(run.pid)))
                time.sleep(SAMPLE)
            out, err = run.communicate()
    if run.returncode:
        last = err.strip().splitlines()[-1:] or ["no message"]
        raise EdgeAdaptError(f"the run on the engine {engine} failed: {last[0]}", about="bench", value=engine)
    found = json.loads(out)
    if found["survivors"] != [row.clients] * row.rounds:
        raise EdgeAdaptError(f"devices dropped out on the engine {engine}: {found['survivors']}", about="bench")
    first, last_end = found["ends"][0], found["ends"][-1]
    rate = row.clients * (row.rounds - 1) / (last_end - first)
    return {"clients_per_second": rate, "seconds": found["seconds"], "memory": memory}


def _pages(process: int) -> int:
    try:
        return Pages.of(process).pss
    except (ConfigError, ProcessLookupError, PermissionError, IndexError):  # it has ended meanwhile
        return 0


def tree(root: int) -> Iterator[int]:
    """A process, and all that it started, directly or not."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    waiting = [root]
    while waiting:
        process = waiting.pop()
        yield process
        waiting += [child for child, parent in parents.items() if parent == process]


_HEAD = ("", "clients/s ours", "Flower", "ratio", "goal", "whole run s", "Flower", "MB ours", "Flower", "share")


def table(found: Mapping[str, Any]) -> str:
    """Format the comparison: medians with the smallest and largest value."""
    rows = [_HEAD, *(_row(name, figures) for name, figures in found["rows"].items())]
    notes = (
        f"Median (smallest–largest) of {found['repeats']} runs of each engine, in turn; each in a process of its own.",
        "clients/s: of the rounds after the first one. The same apps, with active secure aggregation, on both engines.",
        "MB: peak of all processes of a run; pages that several share are counted once.",
    )
    return "\n".join([aligned(rows), "", *notes])


def _row(name: str, figures: Mapping[str, Any]) -> tuple[str, ...]:
    ours, peer = figures["ours"], figures["flower"]
    return (
        f"{name}, {figures['clients']} clients",
        spread_text(ours["clients_per_second"]),
        spread_text(peer["clients_per_second"]),
        f"{figures['ratio']:.1f}",
        f"≥ {figures['goal']:g}",
        spread_text(ours["seconds"]),
        spread_text(peer["seconds"]),
        spread_text(ours["memory"], 1e6),
        spread_text(peer["memory"], 1e6),
        f"{figures['memory_share']:.2f}",
    )
