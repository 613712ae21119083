"""One run of a scenario, from the population to the report, in a folder from which it can be resumed.

Each stage leaves its outcome in the folder, and skips the work whose outcome it finds there: a kill loses at most the
current round, client or export. The ServerApp and the ClientApp are the real ones, on the in-process grid.
"""

import json
import logging
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from dataclasses import replace as replace_fields
from pathlib import Path
from typing import Self

import torch
from flwr.app import Context, RecordDict

from adapters import jsontext
from adapters.base import Base
from adapters.roundrecord import RoundRecord
from adapters.settings import LONGEST
from adapters.storage import kill_safe, read, replace
from aggregation.errors import ConfigError
from client.node.statedir import EXAMPLES
from client.training.examples import encode_examples, parse_examples
from coordinator.app import STATE
from coordinator.app import app as server_app
from coordinator.registry import Registry
from simulations.data.population import Population
from simulations.engine import provision
from simulations.engine.attackers import LyingApp, attackers
from simulations.engine.bases import device_base, training_base
from simulations.engine.canaries import audited
from simulations.engine.devices import MemoryDevices
from simulations.engine.flowerengine import federate_on_ray
from simulations.engine.grid import ROUND_STEPS, RUN_ID, SERVER_NODE, SHORT_ROUND_STEPS, FaultModel, InProcessGrid
from simulations.engine.groups import Group, grouped
from simulations.engine.personal import personalize_all
from simulations.engine.progress import RunProgress
from simulations.engine.provision import Enrolment
from simulations.engine.publish import ExportOutcome, joined, publish
from simulations.engine.trace import Steps, read_trace, trace_digest
from simulations.engine.workers import Fleet, WorkerGrid, Workers
from simulations.report.formatting import program
from simulations.report.page import write_report
from simulations.report.result import CanaryBounds, ClientResult, GroupResult, ReportedRound, RunResult, joined_rounds
from simulations.scenario import Scenario

SCENARIO = "scenario.json"
PREPARED = "prepared.json"
SECONDS = "seconds.json"
CANARIES = "canaries.json"
RESULT = "result.json"
REPORT = "report.html"
LOG = "run.log"
MOST_THREADS = 4  # of torch: one phrase does not keep more busy


@dataclass(frozen=True, slots=True)
class Engine:
    """Where the devices of the rounds work.

    Attributes:
        workers: Processes; 1: this one.
        ray: On Flower's simulation engine, which has processes of its own and no faults, not on the in-process grid.
    """

    workers: int = 1
    ray: bool = False


HERE = Engine()


@dataclass(slots=True)
class RunFolder:
    """The folder of a run: its scenario, and the seconds of each stage so far, over all resumes."""

    path: Path
    scenario: Scenario
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def start(cls, path: Path, scenario: Scenario) -> Self:
        """Take a new or empty folder.

        Raises:
            ConfigError: The folder is not empty.
        """
        path.mkdir(parents=True, exist_ok=True)
        if (path / SCENARIO).exists():
            raise ConfigError(
                f"{path} already contains a run: add --resume to continue it, or choose another --out", about="--out"
            )
        if any(path.iterdir()):
            raise ConfigError(f"{path} is not empty: choose another --out", about="--out")
        replace(path / SCENARIO, scenario.model_dump_json(indent=2).encode())
        return cls(path, scenario)

    @classmethod
    def resume(cls, path: Path, scenario: Scenario | None) -> Self:
        """Continue the run in ``path``.

        Args:
            path: A folder that ``start`` took.
            scenario: The scenario that the run must have; None accepts any.

        Raises:
            ConfigError: The folder has no run, or a run of another scenario.
        """
        stored_at = path / SCENARIO
        try:
            stored = Scenario.parse(jsontext.decode(read(stored_at, LONGEST)), str(stored_at))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ConfigError(f"{path} contains no run to resume: remove --resume", about="--resume") from error
        except ValueError as error:
            raise ConfigError(f"{stored_at} is damaged: {error}; choose another --out", about=SCENARIO) from error
        if scenario is not None and scenario != stored:
            raise ConfigError(
                f"{path} contains a run of another scenario or with other settings: choose another --out", about="--out"
            )
        times = path / SECONDS
        return cls(path, stored, json.loads(times.read_bytes()) if times.exists() else {})

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the wall time of the block to ``stage``, even if the block raises."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - begin)

    def add(self, stage: str, seconds: float) -> None:
        """Add ``seconds`` to ``stage`` and store the times."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
        replace(self.path / SECONDS, json.dumps(self.seconds).encode())

    def of(self, group: Group) -> "RunFolder":
        """The folder of a group's federation, with the same times."""
        path = self.path / group.folder
        path.mkdir(parents=True, exist_ok=True)
        return RunFolder(path, self.scenario, self.seconds)


def run(folder: RunFolder, population: Population, progress: RunProgress, engine: Engine = HERE) -> RunResult:
    """Run the stages that are not finished, and return the result.

    Args:
        folder: Of the run.
        population: The scenario's.
        progress: Shows the stages.
        engine: Of the rounds.

    Raises:
        EdgeAdaptError: A stage failed; the outcomes of the stages before it stay in the folder.
    """
    scenario, groups = folder.scenario, grouped(population, folder.scenario.groups)
    torch.set_num_threads(min(MOST_THREADS, torch.get_num_threads()))
    with logged(folder.path), folder.timed("total"):
        with folder.timed("prepare"), progress.stage("prepare"):
            base = training_base(folder.path, scenario, population)
            for group in groups:
                prepare(folder.of(group).path, scenario, group.population, base)
        federate_groups(folder, population, groups, base, progress, engine)
        with folder.timed("personal"):
            chosen = population.sampled(scenario.evaluation.clients, scenario.seed)
            evaluated = [
                (path, evaluated_of(path, scenario, group.population, base, chosen))
                for path, group in ((folder.of(group).path, group) for group in groups)
            ]
            evaluated = [(path, found) for path, found in evaluated if found.clients]
            clients = [
                client
                for path, found in evaluated
                for client in personalize_all(path, scenario, found, device_base(path, scenario, base, found), progress)
            ]
        with folder.timed("export"), progress.stage("export"):
            exported = joined([publish(path, scenario, found, base) for path, found in evaluated])
        with progress.stage("canaries"):
            canaries = canary_bounds(folder, groups)
    result = replace_fields(_result(folder, population, groups, base, clients, exported), canaries=canaries)
    write_report(result, folder.path / REPORT, program())
    replace(folder.path / RESULT, json.dumps(result.to_json(), indent=2).encode())
    return result


class _RunLog(logging.FileHandler):
    """A log that loses a line if the disk is full; the run then ends with its own error, not with a traceback."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        ...


@contextmanager
def logged(out: Path) -> Iterator[None]:
    """Append to a run's log what coordinator and devices log while the block runs, such as dropouts."""
    handler = _RunLog(out / LOG, encoding="utf-8")
    handler.setLevel(logging.INFO)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    logger = logging.getLogger("edgeadapt")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


def prepare(out: Path, scenario: Scenario, population: Population, base: Base) -> None:
    """Make the fleet of a run in ``out``, unless it is there.

    Raises:
        ConfigError: There is one of another population, base or trace, or as ``device_base``.
    """
    marker, digests = out / PREPARED, {"population": population.digest, "base": base.digest}
    if scenario.network.trace:
        digests["trace"] = trace_digest(Path(scenario.network.trace))
    if marker.exists():
        if json.loads(marker.read_bytes()) != digests:
            raise ConfigError(
                f"{out} contains a run with another population, base model or trace: choose another --out",
                about="--out",
            )
        return
    for name in (provision.AUTHORITY, provision.COORDINATOR, provision.DEVICES):  # what an interrupted run left
        shutil.rmtree(out / name, ignore_errors=True)
    device_base(out, scenario, base, population)
    provision.provision(out, scenario, population, base)
    replace(marker, json.dumps(digests).encode())


def evaluated_of(out: Path, scenario: Scenario, population: Population, base: Base, chosen: Population) -> Population:
    """The clients of ``population`` that are evaluated after the rounds, all of them enrolled in the fleet in ``out``.

    Args:
        out: Of the fleet.
        scenario: Of the run.
        population: Of the fleet.
        base: Of the run.
        chosen: The clients that are evaluated; those of other fleets as well.
    """
    names = {client.name for client in chosen.clients}
    found = replace_fields(population, clients=tuple(c for c in population.clients if c.name in names))
    Enrolment.of(out, scenario, population, base).enrol(client.name for client in found.clients)
    return found


def federate_groups(
    folder: RunFolder,
    population: Population,
    groups: Sequence[Group],
    base: Base,
    progress: RunProgress,
    engine: Engine = HERE,
) -> None:
    """The rounds that are left, of one federation after the other.

    Args:
        folder: Of the run.
        population: Of the run.
        groups: Of the population.
        base: Of the run.
        progress: Shows the rounds.
        engine: Where the devices work.
    """
    trace = folder.scenario.network.trace
    found = read_trace(Path(trace), population.clients) if trace else {}
    for group in groups:
        federate(folder.of(group), group.population, base, progress, found, engine)


def federate(
    folder: RunFolder,
    population: Population,
    base: Base,
    progress: RunProgress,
    trace: Mapping[str, Steps],
    engine: Engine,
) -> None:
    """The rounds that are left of one fleet, which is prepared: the real ServerApp and ClientApp.

    Args:
        folder: Of the fleet.
        population: Of the fleet.
        base: Of the run.
        progress: Shows the rounds.
        trace: Client → when its device can be reached, as ``read_trace`` gives it.
        engine: Where the devices work.
    """
    enrolment = Enrolment.of(folder.path, folder.scenario, population, base)
    for client in population.clients:  # a client without data ends the run before the first round
        place = provision.device_folder(folder.path, client.name) / EXAMPLES
        parse_examples(encode_examples(provision.examples_of(client)), place, len(population.labels))
    nodes = {
        number: client.name for number, client in enumerate(population.clients, SERVER_NODE + 1) if not client.unseen
    }
    trained_on = device_base(folder.path, folder.scenario, base, population)
    liars = attackers(folder.scenario, nodes.values())
    faults = _faults(folder.scenario, {node: trace[name] for node, name in nodes.items() if name in trace})
    coordinator = folder.path / provision.COORDINATOR
    context = Context(RUN_ID, SERVER_NODE, {}, RecordDict(), {STATE: str(coordinator)})
    trained, done = progress.training_seconds, len(provision.registry(folder.path).rounds())
    try:
        with folder.timed("rounds"), progress.rounds(done, folder.scenario.federation.rounds), kill_safe():
            if engine.ray:
                enrolment.enrol(nodes.values())
                federate_on_ray(coordinator, [provision.device_folder(folder.path, name) for name in nodes.values()])
            elif engine.workers == 1:
                devices = MemoryDevices(enrolment.state_dir, trained_on)
                app = LyingApp(folder.scenario.attack.kind, liars, devices.open)
                _in_rounds(InProcessGrid(app, nodes, faults, devices.before), context, devices)
            else:
                fleet = Fleet(folder.path / provision.DEVICES, trained_on, nodes, folder.scenario.attack.kind, liars)
                with Workers(engine.workers, fleet, enrolment.enrol) as workers:
                    _in_rounds(WorkerGrid(workers, nodes, faults), context, workers)
    finally:  # like "rounds", also if it is interrupted: the difference of the two is coordination
        folder.add("training", (progress.training_seconds - trained) / engine.workers)  # side by side


def _in_rounds(grid: InProcessGrid, context: Context, devices: MemoryDevices | Workers) -> None:
    server_app(grid, context)
    grid.work()
    devices.write()


def abort_warning(scenario: Scenario, devices: int) -> str:
    """A line on a run of which most rounds must abort, in a federation of so many devices; empty of any other."""
    settings, faults = scenario.federation.aggregation, _faults(scenario, {})
    cohort = min(devices, scenario.federation.cohort.size or devices)
    needed = settings.survivors(cohort, settings.masking_graph(cohort))
    aborted = float(faults.dropout_probabilities(cohort)[cohort - needed + 1 :].sum())
    if aborted < 0.5:
        return ""
    key = "forced_dropouts" if faults.forced_dropouts else "message_loss"
    return (
        f"about {aborted:.0%} of the rounds will abort: {needed} of {cohort} devices must finish each, and "
        f"network.{key} is {getattr(faults, key)}: lower it, or take more devices"
    )


def _faults(scenario: Scenario, trace: Mapping[int, Steps]) -> FaultModel:
    """The faults of the in-process grid. ``trace``: node → when it can be reached."""
    network = scenario.network
    return FaultModel(
        scenario.seed,
        network.message_loss,
        network.mean_delay,
        network.forced_dropouts,
        ROUND_STEPS if scenario.federation.aggregation.adversary == "active" else SHORT_ROUND_STEPS,
        network.availability,
        trace,
    )


def canary_bounds(folder: RunFolder, groups: Sequence[Group]) -> CanaryBounds | None:
    """What the scenario's canaries find in sums as those of its rounds, once; None if it has none, or no noise."""
    scenario, path = folder.scenario, folder.path / CANARIES
    if not scenario.evaluation.canaries or not scenario.federation.privacy.noisy:
        return None
    if path.exists():
        return CanaryBounds(**json.loads(path.read_bytes()))
    fleets = [folder.of(group).path for group in groups]
    found = audited(fleets, scenario.federation.privacy.delta, scenario.evaluation.canaries)
    if found:
        replace(path, json.dumps(asdict(found)).encode())
    return found


def _result(
    folder: RunFolder,
    population: Population,
    groups: Sequence[Group],
    base: Base,
    clients: Sequence[ClientResult],
    exported: ExportOutcome,
) -> RunResult:
    parity, scenario = exported.parity, folder.scenario
    liars = [attackers(scenario, group.names) for group in groups]
    registries = [provision.registry(folder.of(group).path) for group in groups]
    registry, rounds = registries[0], [each.rounds() for each in registries]
    last = (registry.latest() or registry.version(0)).manifest
    return RunResult(
        scenario=scenario.name,
        seed=scenario.seed,
        population=len(population.clients),
        clients=tuple(clients),
        rounds=tuple(joined_rounds([reported(record) for record in same]) for same in zip(*rounds, strict=True)),
        delta=scenario.federation.privacy.delta if scenario.federation.privacy.noisy else None,
        adapter={
            "version": last.version,
            "sha256": last.sha256,
            "bytes": last.size,
            "elements": sum(tensor.size for tensor in registry.tensors(last.version).values()),
        },
        base={"digest": base.digest, "bytes": base.weight_bytes},
        attack=scenario.attack.kind,
        attackers=tuple(sorted(frozenset().union(*liars))),
        groups=tuple(_group_result(*each) for each in zip(groups, registries, rounds, strict=True) if each[0].name),
        bundle=str(exported.bundle),
        phrase="a text of your own" if scenario.data.given else "turn on the kitchen lights",
        report=str(folder.path / REPORT),
        parity={
            "agreement": parity.agreement,
            "max_abs_diff": parity.max_abs_diff,
            "count": parity.count,
            "accuracy": parity.accuracy or 0.0,
            "torch_accuracy": parity.torch_accuracy or 0.0,
        },
        reliability=exported.reliability,
        plain={name: asdict(answers) for name, answers in exported.plain.items()},
        seconds={**folder.seconds, "coordination": folder.seconds["rounds"] - folder.seconds["training"]},
    )


def _group_result(group: Group, registry: Registry, rounds: Sequence[RoundRecord]) -> GroupResult:
    last = (registry.latest() or registry.version(0)).manifest
    names = tuple(client.name for client in group.population.clients)
    return GroupResult(
        group.name, str(group.folder), names, group.devices, sum(r.aborted is not None for r in rounds), last.sha256
    )


def reported(record: RoundRecord) -> ReportedRound:
    """A round as the report has it, from the coordinator's record."""
    up, down = record.bytes_of_one
    return ReportedRound(
        round=record.round,
        survivors=record.survivors,
        dropped=record.dropped,
        aborted=record.aborted,
        bytes_up=round(up),
        bytes_down=round(down),
        seconds=record.seconds,
        metrics=record.metrics,
        version=record.version,
        epsilon=record.epsilon,
    )
