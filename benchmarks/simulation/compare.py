"""The measurements of `python -m benchmarks simulation`: the engines on copies of one fleet, one after the other.

Each run is a process of its own. The rate is that of the rounds after the first one, which starts processes and loads
torch. So is the CPU time, of all processes of a run. Memory is the peak of the sum over them, in which a page that k
processes share counts 1/k in each (``pss``).
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
from benchmarks.simulation.contender import ENGINES, tree
from benchmarks.simulation.fleets import make_fleet
from benchmarks.simulation.flowerengine import require_ray
from benchmarks.timing import Note, aligned, in_turn, spread_text

SAMPLE = 0.5  # seconds between two looks at the memory
ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True, slots=True)
class Work:
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


TITLES = {"ours": "without masks", "masked": "with the protocol", "flower": "Flower's engine"}
FULL = SimulationWorkload(
    {
        "no training": Work(30, 5, minilm=False, trains=False, goal=20.0),
        "tiny model": Work(30, 5, minilm=False, trains=True, goal=5.0),
        "MiniLM": Work(8, 3, minilm=True, trains=True, goal=1.2),
    }
)
QUICK = SimulationWorkload({"no training": Work(4, 2, minilm=False, trains=False, goal=20.0)}, 1)


def compare(work: SimulationWorkload, note: Note) -> dict[str, Any]:
    """Measure the engines and return the figures as JSON has them. Raises ConfigError: Ray is not installed, or the
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
            found[name]["cpu_ratio"] = peer["cpu_ms"]["median"] / ours["cpu_ms"]["median"]
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
        raise EdgeAdaptError(f"the run on the engine {engine} failed: {last[0]}", about="bench")
    found = json.loads(out)
    if found["survivors"] != [row.clients] * row.rounds:
        raise EdgeAdaptError(f"devices dropped out on the engine {engine}: {found['survivors']}", about="bench")
    done = row.clients * (row.rounds - 1)
    seconds, cpu = (found[name][-1] - found[name][0] for name in ("ends", "cpu"))
    return {"clients_per_second": done / seconds, "cpu_ms": 1e3 * cpu / done, "memory": memory}


def _pages(process: int) -> int:
    try:
        return Pages.of(process).pss
    except (ConfigError, ProcessLookupError, PermissionError, IndexError):  # it has ended meanwhile
        return 0


_HEAD = ("", "clients/s", "ratio", "goal", "CPU ms", "ratio", "MB", "share")


def table(found: Mapping[str, Any]) -> str:
    """Format the comparison: medians with the smallest and largest value."""
    rows = [_HEAD, *(row for name, figures in found["rows"].items() for row in _rows(name, figures))]
    notes = (
        f"Median (smallest–largest) of {found['repeats']} runs of each engine, in turn; each in a process of its own.",
        "clients/s, and CPU time of a client in a round, after the first round. The ratios are to Flower's engine.",
        "The same apps on all engines, with active secure aggregation, or without its masks, which cancel.",
        "MB: peak of all processes of a run; pages that several share are counted once.",
    )
    return "\n".join([aligned(rows), "", *notes])


def _rows(name: str, figures: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    yield (f"{name}, {figures['clients']} clients", *[""] * (len(_HEAD) - 1))
    compared = f"{figures['ratio']:.1f}", f"≥ {figures['goal']:g}", f"{figures['cpu_ratio']:.1f}"
    for engine, title in TITLES.items():
        own = figures[engine]
        ratio, goal, cpu, share = (*compared, f"{figures['memory_share']:.2f}") if engine == "ours" else [""] * 4
        rate, spent = spread_text(own["clients_per_second"]), spread_text(own["cpu_ms"])
        yield (f"  {title}", rate, ratio, goal, spent, cpu, spread_text(own["memory"], 1e6), share)
