"""A run: the rounds of a scenario in a folder, its default arms on one seed, the export, and the report.

Each stage leaves its outcome in the folder, and skips the work whose outcome it finds there: a kill loses at most the
current round, client or export. The ServerApp and the ClientApp are the real ones, on the in-process grid.

The fleet of a run can move to the base of another scenario, on the in-process grid: clients, coordinator and devices
stay, every device has both bases."""

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Literal, Self

import torch
from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp

from aggregation.errors import ConfigError, EdgeAdaptError
from client.node.app import register
from client.node.statedir import EXAMPLES, PERSONAL
from client.training.engine import classifier_trainer
from client.training.examples import encode_examples, parse_examples
from coordinator import lastsum
from coordinator.app import STATE, conduct
from coordinator.app import app as server_app
from coordinator.migration import MigrationResult, MigrationRound, Target, conclude, migrate
from coordinator.settings import SETTINGS
from coordinator.statedir import HEADER, CoordinatorStateDir
from coordinator.transport import RUN_ID, SERVER_NODE
from edgeadapt.bases.base import Base, OwnModel
from edgeadapt.bases.tasks import OwnTask, find_task
from edgeadapt.commandline import program
from edgeadapt.formats import files, jsontext
from edgeadapt.formats.cores import cores
from edgeadapt.formats.layout import Tensors
from edgeadapt.formats.registryfiles import SUMS, TRANSCRIPT
from edgeadapt.formats.settings import LONGEST
from edgeadapt.formats.storage import PUBLIC, kill_safe, read, replace
from edgeadapt.rounds.discovery import Cells
from simulations.data import populate
from simulations.data.population import Client, Population
from simulations.data.tables import Loaded
from simulations.engine import provision
from simulations.engine.canaries import audited
from simulations.engine.devices import LyingApp, MemoryDevices, attackers
from simulations.engine.grid import (
    ROUND_STEPS,
    SHORT_ROUND_STEPS,
    FaultModel,
    GridLog,
    InProcessGrid,
    Steps,
    read_trace,
    trace_digest,
)
from simulations.engine.groups import (
    DISCOVERY,
    FOUND,
    Group,
    Router,
    fleet_folders,
    grouped,
    spent_on_finding,
    with_found,
)
from simulations.engine.plain import is_plain, open_coordinator
from simulations.engine.progress import RunProgress
from simulations.engine.publish import export_all
from simulations.engine.workers import Fleet, WorkerGrid, Workers
from simulations.plan import default_trials
from simulations.report.pages import write_report
from simulations.result import CanaryBounds, ClientResult, ExportResult, GroupResult, RunResult, TrialResult, metric_of
from simulations.scenario import Scenario
from simulations.suite.store import RUNS, Store, check_fresh
from simulations.suite.trial import GRID_LOG, Material, TrialRun, rounds_of, tally_of, unfitted_rounds

SCENARIO = "scenario.json"
PREPARED = "prepared.json"
SECONDS = "seconds.json"
CANARIES = "canaries.json"
RESULT = "result.json"
REPORT = "report.html"
LOG = "run.log"
MOST_THREADS = 4  # one phrase does not keep more busy
MANY, RARE = 50, 0.1  # devices more than a run has, and rounds that abort, where advice is looked for
MOST_REPEATS = 5  # rounds of the analytic head, after those that were planned
MOST_AT_ONCE = 4  # clients; each holds a base in memory
EngineName = Literal["plain", "protocol"]
NEXT = "next"  # folder of the next base, in that of the run


@dataclass(frozen=True, slots=True)
class Engine:
    """Says where the devices work, and whether they mask. ``plain``: without masks (``simulations.engine.plain``).
    ``protocol``: with all of secure aggregation. None: as the rounds began, at first ``plain``."""

    workers: int = 1  # processes; 1: this one
    name: EngineName | None = None

    def masks(self, scenario: Scenario, coordinator: Path) -> bool:
        """Whether the rounds in a coordinator's state directory have masks, as they must if these are to be kept."""
        if scenario.federation.aggregation.keep_masked_inputs or self.name == "protocol":
            return True
        return self.name is None and (coordinator / TRANSCRIPT).exists()


HERE = Engine()


@dataclass(slots=True)
class RunFolder:
    """Manages the folder of a run: its scenario, and the seconds of each stage so far, over all resumes. ``retries``:
    how often its rounds began again from the first one; each time the grid has other faults."""

    path: Path
    scenario: Scenario
    seconds: dict[str, float] = field(default_factory=dict)
    retries: int = 0

    @classmethod
    def start(cls, path: Path, scenario: Scenario) -> Self:
        """Raises ConfigError unless ``path`` is new or empty."""
        path.mkdir(parents=True, exist_ok=True)
        check_fresh(path, SCENARIO, "a run")
        replace(path / SCENARIO, scenario.model_dump_json(indent=2).encode())
        return cls(path, scenario)

    @classmethod
    def resume(cls, path: Path, scenario: Scenario) -> Self:
        """Raises ConfigError if ``path`` has no run, or another scenario's."""
        stored = cls.stored(path)
        if scenario != stored:
            reason = f"{path} contains a run of another scenario or with other settings: choose another --out"
            raise ConfigError(reason, about="--out")
        times = path / SECONDS
        return cls(path, stored, json.loads(times.read_bytes()) if times.exists() else {})

    @staticmethod
    def stored(path: Path) -> Scenario:
        """Read the scenario of the run in ``path``. Raises ConfigError: there is none, or it is damaged."""
        stored_at = path / SCENARIO
        try:
            return Scenario.parse(jsontext.decode(read(stored_at, LONGEST)), str(stored_at))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ConfigError(f"{path} contains no run to resume: remove --resume", about="--resume") from error
        except ValueError as error:
            raise ConfigError(f"{stored_at} is damaged: {error}; choose another --out", about=SCENARIO) from error

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the wall time of the block to ``stage``, even if the block raises."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - begin)

    @property
    def log(self) -> Path:
        return self.path / LOG

    def add(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
        replace(self.path / SECONDS, json.dumps(self.seconds).encode())

    def of(self, group: Group) -> "RunFolder":
        """Return the folder of a group's federation, with the same times."""
        path = self.path / group.folder
        path.mkdir(parents=True, exist_ok=True)
        return RunFolder(path, self.scenario, self.seconds, self.retries)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run of a scenario will be, before anything is written."""

    scenario: Scenario
    engine: Engine
    loaded: Loaded
    base: Base
    groups: Sequence[Group]

    @classmethod
    def of(cls, scenario: Scenario, engine: Engine = HERE) -> Self:
        """Make the population, and find the base. Raises as ``populate`` and ``provision.uncentered_base``."""
        loaded = populate(scenario.data, scenario.population, scenario.seed)
        base = provision.uncentered_base(scenario)
        return cls(scenario, engine, loaded, base, grouped(loaded.population, scenario.groups))

    @property
    def devices(self) -> int:
        return min(group.devices for group in self.groups)

    @property
    def warning(self) -> str:
        """Say why rounds of this run will abort; empty if they need not."""
        return abort_warning(self.scenario, self.devices)

    def folder(self, out: Path | None = None, *, resume: bool = False) -> RunFolder:
        """Take a new or empty folder, or one with this run; by default a new one in ``RUNS``, or the newest there.
        Raises as ``RunFolder.start`` and ``resume``."""
        name = self.scenario.name
        if out is None and resume:
            runs = sorted(RUNS.glob(f"{name}-*/{SCENARIO}"))
            if not runs:
                reason = f"{RUNS}/ has no run of {name!r} to resume: name the run with --out"
                raise ConfigError(reason, about="--out")
            out = runs[-1].parent
        out = (out or RUNS / f"{name}-{datetime.now():%Y%m%d-%H%M%S}").resolve()
        return RunFolder.resume(out, self.scenario) if resume else RunFolder.start(out, self.scenario)

    def run(self, folder: RunFolder, progress: RunProgress) -> RunResult:
        return simulate(folder, self.loaded.population, progress, self.engine)


def simulate(folder: RunFolder, population: Population, progress: RunProgress, engine: Engine = HERE) -> RunResult:
    """Run the stages that are not finished. One that fails leaves the outcomes of those before it in the folder."""
    scenario = folder.scenario
    torch.set_num_threads(min(MOST_THREADS, torch.get_num_threads()))
    exported: ExportResult | None = None
    progress.metric = find_task(scenario.data.task).metric
    with _logged(folder.log), folder.timed("total"):
        with folder.timed("prepare"), progress.stage("prepare"):
            base = provision.training_base(folder.path, scenario, population)
            base = provision.with_shared_states(folder.path, scenario, population, base)
            population = prepare(folder, population, base, progress, engine)
        federate(folder, population, base, progress, engine)
        with folder.timed("personal"):
            evaluated = [(folder.of(group).path, chosen) for group, chosen in _evaluated(folder, population, base)]
            arms = _arms(folder, population, base, progress)
        if population.labels and not isinstance(base, OwnModel) and not isinstance(base.task, OwnTask):
            with folder.timed("export"), progress.stage("export"):
                exported = export_all(evaluated, scenario, base, str(folder.path / REPORT))
        with progress.stage("canaries"):
            canaries = _canary_bounds(folder, grouped(population, scenario.groups))
    result = _result(folder, population, base, arms, exported, canaries)
    if exported:
        write_report(result, folder.path / REPORT, program())
    replace(folder.path / RESULT, json.dumps(result.to_json(), indent=2).encode())
    provision.forget_states(folder.path)
    return result


class _RunLog(logging.FileHandler):
    """Loses a line if the disk is full; the run then ends with its own error, not with a traceback."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        ...


@contextmanager
def _logged(log: Path) -> Iterator[None]:
    """Append to a run's log what it, the coordinator and the devices log while the block runs, such as dropouts."""
    handler = _RunLog(log, encoding="utf-8")
    handler.setLevel(logging.INFO)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    logger = logging.getLogger("edgeadapt")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


def prepare(
    folder: RunFolder, population: Population, base: Base, progress: RunProgress, engine: Engine = HERE
) -> Population:
    """Make the fleets of a run, unless they are there; where groups are to be found, find them first. Returns the
    population, whose clients know their group. Raises ConfigError if they are of another population, base or trace, or
    as ``device_base``; DataError or ConfigError: no groups can be found."""
    if folder.scenario.groups.by == "discovered":
        population = _discovered(folder, population, base, progress, engine)
    for group in grouped(population, folder.scenario.groups):
        _prepare(folder.of(group), group.population, base)
    return population


def _prepare(folder: RunFolder, population: Population, base: Base) -> None:
    out, scenario = folder.path, folder.scenario
    marker, digests = out / PREPARED, {"population": population.digest, "base": base.digest}
    if scenario.network.trace:
        digests["trace"] = trace_digest(Path(scenario.network.trace))
    if not marker.exists():
        for name in (provision.AUTHORITY, provision.COORDINATOR, provision.DEVICES):  # what an interrupted run left
            shutil.rmtree(out / name, ignore_errors=True)
        provision.device_base(out, scenario, base, population)
        provision.provision(out, scenario, population, base)
        replace(marker, json.dumps(digests).encode())
    elif json.loads(marker.read_bytes()) != digests:
        reason = f"{out} contains a run with another population, base model or trace: choose another --out"
        raise ConfigError(reason, about="--out")


def _discovered(
    folder: RunFolder, population: Population, base: Base, progress: RunProgress, engine: Engine
) -> Population:
    """Let all clients find their groups, in a federation of one round."""
    stored, config = folder.path / DISCOVERY / FOUND, provision.peft_config(folder.scenario, base)
    if not stored.exists():
        mine = classifier_trainer(base, len(population.labels), config)
        asked = folder.scenario.federation.discovery
        cells = Cells.of(mine.embed([one.text for one in population.public]), asked.count)
        path = stored.parent
        path.mkdir(exist_ok=True)
        fleet = RunFolder(path, folder.scenario.discovering(cells.encode()), folder.seconds, folder.retries)
        _prepare(fleet, population, base)
        _federate(fleet, population, base, progress, _availability(folder, population), engine)
        router = Router.of(folder.path, folder.scenario.groups)
        own = {each.name: router.joined(mine.embed([one.text for one in each.train])) for each in population.clients}
        replace(stored, json.dumps(own).encode())
    return with_found(folder.path, population)


def _availability(folder: RunFolder, population: Population) -> Mapping[str, Steps]:
    trace = folder.scenario.network.trace
    return read_trace(Path(trace), population.clients) if trace else {}


def federate(
    folder: RunFolder, population: Population, base: Base, progress: RunProgress, engine: Engine = HERE
) -> None:
    """Run the rounds that are left, of one federation after the other, all of them prepared."""
    availability = _availability(folder, population)
    for group in grouped(population, folder.scenario.groups):
        _federate(folder.of(group), group.population, base, progress, availability, engine)


def _federate(
    folder: RunFolder,
    population: Population,
    base: Base,
    progress: RunProgress,
    availability: Mapping[str, Steps],
    engine: Engine,
) -> None:
    """Run the rounds of one fleet. ``availability``: client → when its device can be reached (``read_trace``)."""
    scenario, coordinator = folder.scenario, folder.path / provision.COORDINATOR
    masks = engine.masks(scenario, coordinator)
    _require_same_engine(coordinator, masks)
    enrolment = provision.Enrolment.of(folder.path, scenario, population, base)
    target = partial(base.task.target, outputs=population.labels) if isinstance(base.task, OwnTask) else None
    for client in population.clients:  # a client without data ends the run before the first round
        place = provision.device_folder(folder.path, client.name) / EXAMPLES
        parse_examples(encode_examples(provision.examples_of(client)), place, len(population.labels), target)
    nodes = {node: each.name for node, each in enumerate(population.clients, SERVER_NODE + 1) if not each.unseen}
    trained_on = provision.device_base(folder.path, scenario, base, population)
    liars = attackers(scenario, nodes.values())
    trace = {node: availability[name] for node, name in nodes.items() if name in availability}
    faults = faults_of(scenario, trace, folder.retries)
    trained, done, log = progress.training_seconds, len(provision.registry(folder.path).rounds()), _grid_log(folder)
    try:
        with folder.timed("rounds"), progress.rounds(done, scenario.federation.rounds), kill_safe():
            if engine.workers == 1:
                devices = MemoryDevices(enrolment.state_dir, trained_on, not masks)
                app = LyingApp(scenario.attack.kind, liars, devices.open)
                grid = InProcessGrid(app, nodes, faults, devices.before, log)
                _in_rounds(folder, log, lambda: _on_grid(grid, coordinator, devices))
            else:
                kept, lie = folder.path / provision.DEVICES, scenario.attack.kind
                fleet = Fleet(kept, trained_on, nodes, lie, liars, plain=not masks)
                with Workers(engine.workers, fleet, enrolment.enrol) as workers:
                    grid = WorkerGrid(workers, nodes, faults, log)
                    _in_rounds(folder, log, lambda: _on_grid(grid, coordinator, workers))
    finally:  # like "rounds", also if it is interrupted: the difference of the two is coordination
        folder.add("training", (progress.training_seconds - trained) / engine.workers)  # side by side


def _require_same_engine(coordinator: Path, masks: bool) -> None:
    """Let the rounds have masks or none, for good. Raises ConfigError: they began otherwise."""
    if masks == is_plain(coordinator) and (masks or (coordinator / TRANSCRIPT).exists()):
        began = "plain" if masks else "protocol"
        text = f"the rounds in {coordinator.parent} began on the engine {began}: add --engine {began}"
        raise ConfigError(text, about="--engine")
    if not masks:
        (coordinator / SUMS).mkdir(exist_ok=True)


def _grid_log(folder: RunFolder) -> GridLog:
    """Open the log of a grid whose rounds begin or go on. A run that goes on within a session has another session for
    the rounds that are left of it, in which devices order their examples otherwise. So does one whose round had named
    its survivors: these alone make it again. Otherwise it makes the same adapters as without the interruption."""
    settings, log = folder.scenario.federation, GridLog.open(folder.path / GRID_LOG)
    state_dir = open_coordinator(folder.path / provision.COORDINATOR)
    records, (_, adapter) = state_dir.registry.rounds(), state_dir.registry.head().newest
    done = len(records)
    within = done < settings.rounds and lastsum.find(state_dir.transcripts, adapter, records) is not None
    if 0 < done < settings.rounds and settings.kind_of(done + 1) is (kind := settings.kind_of(done)):
        first = next(record.round for record in records if record.offer == records[-1].offer)
        planned = sum(settings.kind_of(number) is kind for number in range(first, settings.rounds + 1))
        within |= done - first + 1 < min(planned, settings.aggregation.session_rounds)
    log.begin(done, within_session=within)
    return log


def _in_rounds(folder: RunFolder, log: GridLog, run: Callable[[], None]) -> None:
    """Run the rounds that are left, and repeat those of the analytic head that abort, ``MOST_REPEATS`` at most. As an
    operator would, who has one round more from the settings for each that aborted: without its sum the head is not that
    of the federation. A round of training that aborts costs one step of many, and is not repeated."""
    scenario, state_dir = folder.scenario, folder.path / provision.COORDINATOR
    planned, short = scenario.federation.rounds, True
    while short and not log.ended:
        records = provision.registry(folder.path).rounds()
        done = len(records)
        if planned <= done < planned + MOST_REPEATS and unfitted_rounds(scenario, records):
            _plan_rounds(state_dir, done + 1)
        try:
            run()
        except EdgeAdaptError as error:
            if done < planned or error.about not in ("privacy.epsilon", "session"):
                raise
            _plan_rounds(state_dir, done)  # what the sums may reveal is spent, or too few devices are there
            break
        records = provision.registry(folder.path).rounds()
        short = unfitted_rounds(scenario, records) > 0 and len(records) < planned + MOST_REPEATS
    if log.ended:
        run()
    log.ended = True  # what follows is made from these rounds, also after a resume
    log.write()


def _plan_rounds(state_dir: Path, rounds: int) -> None:
    settings = CoordinatorStateDir.open(state_dir).settings.model_copy(update={"rounds": rounds})
    replace(state_dir / SETTINGS, HEADER + settings.to_toml().encode(), PUBLIC)


def _on_grid(grid: InProcessGrid, coordinator: Path, devices: MemoryDevices | Workers) -> None:
    if is_plain(coordinator):
        with open_coordinator(coordinator).leading() as leader:
            conduct(leader, grid)
    else:
        server_app(grid, Context(RUN_ID, SERVER_NODE, {}, RecordDict(), {STATE: str(coordinator)}))
    grid.work()
    devices.write()


def abort_warning(scenario: Scenario, devices: int) -> str:
    """Warn that most rounds of a run must abort, in a federation of ``devices``; empty if they need not."""
    aborted, needed, cohort = _aborted(scenario, devices)
    if aborted < 0.5:
        return ""
    network, most = scenario.network, scenario.federation.cohort.size or devices + MANY
    key = "forced_dropouts" if network.forced_dropouts else "message_loss"
    unseen = scenario.data.unseen if scenario.data.given else scenario.population.unseen
    clients = "texts of {} clients" if scenario.data.given else "population.households = {}"
    enough = (n for n in range(devices + 1, most + 1) if _aborted(scenario, n)[0] < RARE)
    more = next((count for n in enough for count in range(n, 3 * n) if count - max(1, round(unseen * count)) >= n), 0)
    return (
        f"about {aborted:.0%} of the rounds will abort: {needed} of {cohort} devices must finish each, and "
        f"network.{key} is {getattr(network, key)}: lower it{', or take ' + clients.format(more) if more else ''}"
    )


def _aborted(scenario: Scenario, devices: int) -> tuple[float, int, int]:
    """Return the probability that a round of ``devices`` aborts, and how many of its cohort must finish it."""
    settings, cohort = scenario.federation.aggregation, min(devices, scenario.federation.cohort.size or devices)
    needed = settings.survivors(cohort, settings.masking_graph(cohort))
    return float(faults_of(scenario, {}, 0).dropout_probabilities(cohort)[cohort - needed + 1 :].sum()), needed, cohort


def faults_of(scenario: Scenario, trace: Mapping[int, Steps], retries: int) -> FaultModel:
    """Return the faults of the in-process grid. ``trace``: node → when it can be reached."""
    network = scenario.network
    return FaultModel(
        scenario.seed + 2**32 * retries,
        network.message_loss,
        network.mean_delay,
        network.forced_dropouts,
        ROUND_STEPS if scenario.federation.aggregation.adversary == "active" else SHORT_ROUND_STEPS,
        network.availability,
        trace,
    )


def _evaluated(folder: RunFolder, population: Population, base: Base) -> list[tuple[Group, Population]]:
    """Return the groups with those of their clients that are evaluated after the rounds, all of them enrolled."""
    scenario = folder.scenario
    names = {client.name for client in population.sampled(scenario.evaluation.clients, scenario.seed).clients}
    evaluated = []
    for group in grouped(population, scenario.groups):
        chosen = group.population.only(names)
        if chosen.clients:
            enrolment = provision.Enrolment.of(folder.of(group).path, scenario, group.population, base)
            enrolment.enrol(client.name for client in chosen.clients)
            evaluated.append((group, chosen))
    return evaluated


def _arms(folder: RunFolder, population: Population, base: Base, progress: RunProgress) -> dict[str, TrialResult]:
    scenario, store = folder.scenario, Store(folder.path)
    groups = grouped(population, scenario.groups)
    fleets = fleet_folders(folder.path, groups)

    def keep(client: Client, adapter: Tensors) -> None:
        replace(provision.device_folder(fleets[client.name], client.name) / PERSONAL, files.encode(adapter))

    trained = provision.device_base(folder.of(groups[0]).path, scenario, base, population)
    material = Material(population, base, trained, folder.path, folder.seconds["training"])
    results = {}
    for name, trial in default_trials(scenario).items():
        outcome = store.get(trial)
        if not isinstance(outcome, TrialResult):
            run = TrialRun(trial, material, store, min(cores(), MOST_AT_ONCE), thorough=False, keep=keep)
            outcome = run.compute(progress, f"{name} arm")
        results[name] = outcome
    return results


def _canary_bounds(folder: RunFolder, groups: Sequence[Group]) -> CanaryBounds | None:
    path = folder.path / CANARIES
    if path.exists():
        return CanaryBounds(**json.loads(path.read_bytes()))
    fleets, scenario = [folder.of(group).path for group in groups], folder.scenario
    if bounds := audited(fleets, scenario.federation.privacy.delta, scenario.evaluation.canaries):
        replace(path, json.dumps(asdict(bounds)).encode())
    return bounds


def _result(
    folder: RunFolder,
    population: Population,
    base: Base,
    arms: Mapping[str, TrialResult],
    exported: ExportResult | None,
    canaries: CanaryBounds | None,
) -> RunResult:
    scenario, metric = folder.scenario, metric_of(arms.values())
    groups = grouped(population, scenario.groups)
    registry = provision.registry(folder.of(groups[0]).path)
    last = (registry.latest() or registry.version(0)).manifest
    evaluated = population.sampled(scenario.evaluation.clients, scenario.seed).clients
    clients = tuple(
        ClientResult(
            name=client.name,
            language=client.language,
            unseen=client.unseen,
            examples=len(client.train),
            tests=len(client.test),
            arms={name: metric.of(result.clients[place].test) for name, result in arms.items()},
            choice=arms["personal"].clients[place].choice,
        )
        for place, client in enumerate(evaluated)
    )
    return RunResult(
        scenario=scenario.name,
        seed=scenario.seed,
        metric=metric.name,
        population=len(population.clients),
        clients=clients,
        rounds=rounds_of(folder.path, groups),
        delta=scenario.federation.privacy.delta if scenario.federation.privacy.noisy else None,
        adapter={
            "version": last.version,
            "sha256": last.sha256,
            "bytes": last.size,
            "elements": sum(tensor.size for tensor in registry.tensors(last.version).values()),
        },
        base={"digest": base.digest, "bytes": base.weight_bytes},
        seconds={**folder.seconds, "coordination": folder.seconds["rounds"] - folder.seconds["training"]},
        exported=exported,
        canaries=canaries,
        masked=not is_plain(folder.of(groups[0]).path / provision.COORDINATOR),
        attack=scenario.attack.kind,
        attackers=tuple(sorted(name for group in groups for name in attackers(scenario, group.names))),
        groups=tuple(_group_result(folder, group) for group in groups if group.name),
        round_tally=tally_of(folder.path, groups, scenario),
        finding=spent_on_finding(folder.path) if scenario.groups.by == "discovered" else None,
    )


def _group_result(folder: RunFolder, group: Group) -> GroupResult:
    registry = provision.registry(folder.of(group).path)
    last = (registry.latest() or registry.version(0)).manifest
    names = tuple(client.name for client in group.population.clients)
    aborted = sum(record.aborted is not None for record in registry.rounds())
    return GroupResult(group.name, str(group.folder), names, group.devices, aborted, last.sha256)


def migrate_run(
    folder: RunFolder, to: Scenario, rounds: int, margin: float, report: Callable[[MigrationRound], object]
) -> MigrationResult:
    """Migrate the fleet of a run, or go on with that. ``report`` gets each round once it is committed. Raises
    ConfigError: the run has several federations, or the base or its adapter is not for its texts; or as
    ``coordinator.migration.migrate``."""
    if folder.scenario.groups.by != "none":
        raise ConfigError("a migration is of one federation, and the run has groups", about="groups.by")
    stored = folder.scenario
    population, scenario = populate(stored.data, stored.population, stored.seed).population, _next(stored, to)
    first, place = provision.training_base(folder.path, stored, population), folder.path / NEXT
    place.mkdir(exist_ok=True)
    base = provision.training_base(place, scenario, population)
    old = provision.device_base(folder.path, stored, first, population)
    new = provision.device_base(place, scenario, base, population)
    leading = open_coordinator(coordinator := folder.path / provision.COORDINATOR)
    settings = leading.settings.model_copy(update={"training": to.federation.training})
    target = Target(*provision.first_adapter(scenario, population, base), settings, rounds, margin)
    enrolment = provision.Enrolment.of(folder.path, stored, population, first)
    devices = MemoryDevices(enrolment.state_dir, old, is_plain(coordinator), new)
    nodes = {n: each.name for n, each in enumerate(population.clients, SERVER_NODE + 1) if not each.unseen}
    register(app := ClientApp(), devices.open)
    with kill_safe(), leading.leading() as leader:
        done = len(leader.registry.rounds())  # other faults than those of the rounds before
        grid = InProcessGrid(app, nodes, faults_of(stored, {}, done), devices.before)
        for each in migrate(leader, grid, target):
            report(each)
        devices.write()
        return conclude(leader, target)


def _next(scenario: Scenario, to: Scenario) -> Scenario:
    federation = scenario.federation.model_copy(update={"training": to.federation.training})
    return scenario.model_copy(update={"base": to.base, "adapter": to.adapter, "federation": federation})
