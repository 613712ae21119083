"""One run of a scenario, start to report, in a folder that it can be resumed from.

Each stage leaves its outcome in the folder and finds there what it need not do again: a kill loses at most the
round, the household or the export under way. The apps in between are the real ones, on the in-process grid.
"""

import json
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import torch
from flwr.app import Context, RecordDict

from adapters.base import Base, find_base
from adapters.storage import replace
from aggregation.errors import ConfigError
from client.node.app import app as client_app
from client.training.examples import read_examples
from coordinator.app import STATE
from coordinator.app import app as server_app
from export.onnx.dequantize import dequantized
from export.onnx.exported import Profile
from simulations.data.households import Population, sample_population
from simulations.engine import provision
from simulations.engine.grid import ROUND_STEPS, RUN_ID, SERVER_NODE, SHORT_ROUND_STEPS, FaultModel, InProcessGrid
from simulations.engine.outcome import collect
from simulations.engine.personal import personalize_all
from simulations.engine.progress import RunProgress
from simulations.engine.publish import publish
from simulations.report.formatting import program
from simulations.report.page import write_report
from simulations.report.result import RunResult
from simulations.scenario import Scenario

SCENARIO = "scenario.json"
PREPARED = "prepared.json"
SECONDS = "seconds.json"
RESULT = "result.json"
REPORT = "report.html"
LOG = "run.log"
ROUNDED = "base"  # a base folder, if the scenario trains on the rounded base
MOST_THREADS = 4  # for torch: a phrase is too little work for more


@dataclass(slots=True)
class RunFolder:
    """The folder of a run: its scenario, and how long each stage has taken so far, resumes included."""

    path: Path
    scenario: Scenario
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def start(cls, path: Path, scenario: Scenario) -> Self:
        """Take a new or empty folder.

        Raises:
            ConfigError: There is something in it already.
        """
        path.mkdir(parents=True, exist_ok=True)
        if (path / SCENARIO).exists():
            raise ConfigError(f"{path} holds a run already: add --resume to go on with it, or choose another --out")
        if any(path.iterdir()):
            raise ConfigError(f"{path} is not empty: choose another --out")
        replace(path / SCENARIO, scenario.model_dump_json(indent=2).encode())
        return cls(path, scenario)

    @classmethod
    def resume(cls, path: Path, scenario: Scenario | None) -> Self:
        """Go on with the run in ``path``.

        Args:
            path: A folder that ``start`` took.
            scenario: What it must be a run of; nothing accepts any.

        Raises:
            ConfigError: There is no run, or it is one of another scenario.
        """
        try:
            stored = Scenario.parse(json.loads((path / SCENARIO).read_bytes()), str(path / SCENARIO))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ConfigError(f"{path} holds no run to resume") from error
        except ValueError as error:
            raise ConfigError(f"{path / SCENARIO} is damaged: {error}") from error
        if scenario is not None and scenario != stored:
            raise ConfigError(f"{path} is a run of another scenario or with other settings: choose another --out")
        times = path / SECONDS
        return cls(path, stored, json.loads(times.read_bytes()) if times.exists() else {})

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the wall time of the block to ``stage``, whether it ends well or not."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - begin)

    def add(self, stage: str, seconds: float) -> None:
        """Add ``seconds`` to ``stage`` and store the times."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
        replace(self.path / SECONDS, json.dumps(self.seconds).encode())


def run(folder: RunFolder, progress: RunProgress) -> RunResult:
    """Do what is still to do, and return the result.

    Raises:
        EdgeAdaptError: A stage failed; what the stages before it made stays in the folder.
    """
    scenario = folder.scenario
    torch.set_num_threads(min(MOST_THREADS, torch.get_num_threads()))
    with _logged(folder.path / LOG), folder.timed("total"):
        with folder.timed("prepare"), progress.stage("prepare"):
            base = _base(folder)
            population = sample_population(scenario.population, scenario.seed)
            _prepare(folder.path, scenario, population, base)
        _federate(folder, population, progress)
        with folder.timed("personal"):
            households = personalize_all(folder.path, scenario, population, base, progress)
        with folder.timed("export"), progress.stage("export"):
            published = publish(folder.path, scenario, population, base)
    result = collect(folder.path, scenario, base, households, published, folder.seconds, folder.path / REPORT)
    write_report(result, folder.path / REPORT, program())
    replace(folder.path / RESULT, json.dumps(result.to_json(), indent=2).encode())
    return result


def _base(folder: RunFolder) -> Base:
    """The base that everything is trained on: the scenario's, or a copy as the export will round it."""
    base, export = find_base(folder.scenario.base.model), folder.scenario.export
    if not export.train_on_dequantized:
        return base
    rounded = folder.path / ROUNDED
    return find_base(str(rounded)) if rounded.exists() else dequantized(base, Profile(export.profile), rounded)


@contextmanager
def _logged(path: Path) -> Iterator[None]:
    """Append what coordinator and devices log while the block runs, dropouts and their causes among it."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setLevel(logging.INFO)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    logger = logging.getLogger("edgeadapt")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


def _prepare(out: Path, scenario: Scenario, population: Population, base: Base) -> None:
    marker = out / PREPARED
    if marker.exists():
        found = json.loads(marker.read_bytes())
        if found != {"population": population.digest, "base": base.digest}:
            raise ConfigError(f"{out} was made from another population or base model: choose another --out")
        return
    for name in (provision.AUTHORITY, provision.COORDINATOR, provision.DEVICES):  # what a kill in the middle left
        shutil.rmtree(out / name, ignore_errors=True)
    provision.provision(out, scenario, population, base)
    replace(marker, json.dumps({"population": population.digest, "base": base.digest}).encode())


def _federate(folder: RunFolder, population: Population, progress: RunProgress) -> None:
    """The rounds: the real ServerApp and ClientApp, on the in-process grid."""
    state_dirs = provision.open_state_dirs(folder.path, population)
    for state_dir in state_dirs.values():
        read_examples(
            state_dir.examples, len(population.labels)
        )  # a household without data is found before the first round
    nodes = {
        number: str(state_dirs[household.name].folder)
        for number, household in enumerate(population.households, SERVER_NODE + 1)
        if not household.unseen
    }
    scenario = folder.scenario
    network, federation = scenario.network, scenario.federation
    steps = ROUND_STEPS if federation.aggregation.adversary == "active" else SHORT_ROUND_STEPS
    faults = FaultModel(scenario.seed, network.loss, network.delay, network.victims, steps)
    context = Context(RUN_ID, SERVER_NODE, {}, RecordDict(), {STATE: str(folder.path / provision.COORDINATOR)})
    trained = progress.training_seconds
    try:
        with folder.timed("rounds"), progress.rounds(len(provision.registry(folder.path).rounds()), federation.rounds):
            server_app(InProcessGrid(client_app, nodes, faults), context)
    finally:  # as "rounds", also where it is cut short: what is left of it is coordination
        folder.add("training", progress.training_seconds - trained)
