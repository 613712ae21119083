"""Compute a trial: make each client's adapter or head as its arm does, and tally what it does on the client's texts."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Lock

import torch
from cachetools import LRUCache, cached

from client.node.statedir import DeviceStateDir
from client.training.logistic import logistic_head
from client.training.trainer import FrozenBase
from edgeadapt.bases.base import Base
from edgeadapt.bases.tasks import find_task
from edgeadapt.formats import files
from edgeadapt.formats.cores import ahead
from edgeadapt.formats.layout import Tensors
from edgeadapt.formats.manifest import RoundRecord
from edgeadapt.methods.lorasb import folded
from edgeadapt.methods.parts import Part
from simulations.data.population import Client, LabelledText, Population
from simulations.engine import provision
from simulations.engine.arms import (
    CENTRAL,
    ArmInputs,
    Arms,
    ClassifierArms,
    FitHead,
    Kept,
    Model,
    aggregation_error,
    arms_of,
    training_examples,
)
from simulations.engine.canaries import canary_bounds
from simulations.engine.grid import GridLog
from simulations.engine.progress import RunProgress
from simulations.engine.provision import Group, fleet_folders, grouped, ridge_head
from simulations.plan import Kind, Trial
from simulations.result import (
    ACCURACY,
    ClientScore,
    Cost,
    ReportedRound,
    RoundPoint,
    RoundTally,
    Tally,
    TrialResult,
    joined_rounds,
)
from simulations.scenario import Scenario
from simulations.suite.store import Store

MOST_PUBLIC = 200  # public texts that each client's classifier is asked
GRID_LOG = "grid.json"  # in the folder of a federation
LAST_ROUND = "/last round"  # name of a training, which orders its examples
# Of a kind: what fits its head, and the key of its penalty.
HEADS: dict[Kind, tuple[FitHead, str]] = {Kind.RIDGE: (ridge_head, "ridge"), Kind.LOGISTIC: (logistic_head, "logistic")}


# Each arm of a run begins with it.
_first_adapter = cached(
    LRUCache(maxsize=2),
    key=lambda scenario, people, base: (scenario.model_dump_json(), people.labels, tuple(people.public), base),
    lock=Lock(),
)(provision.first_adapter)


class _Stopped(Exception):  # noqa: N818  # no error: the run has ended
    """Ends the training of a client whose outcome nobody waits for any more."""


@dataclass(frozen=True, slots=True)
class Material:
    population: Population
    base: Base  # which the rounds train on
    trained: FrozenBase  # what devices train with: the base, or that of a bundle
    federation: Path  # the folder of the rounds, which are finished if the arm has any
    rounds_cpu: float = 0.0  # processor seconds of the rounds


@dataclass
class TrialRun:
    """Computes a trial. ``keep`` takes the adapter of each client's personal step."""

    trial: Trial
    material: Material
    store: Store
    at_once: int = 1  # clients that train at the same time, each on one thread, with a base in memory
    thorough: bool = True  # ask also the validation texts and the public ones, and measure the aggregation error
    keep: Callable[[Client, Tensors], object] = lambda client, adapter: None
    _stop: Event = field(default_factory=Event)
    _shared: dict[Path, Tensors] = field(default_factory=dict)  # folder of a federation → its last adapter

    def compute(self, progress: RunProgress, stage: str) -> TrialResult:
        """Compute the clients that are left, and keep the result. Raises EdgeAdaptError if a training diverged."""
        scenario, population = self.trial.scenario, self.material.population
        manifest, blob = _first_adapter(scenario, population, self.material.base)
        inputs = ArmInputs.of(scenario, manifest, files.decode(blob), population)
        arms = arms_of(self.material.trained, inputs, self.at_once, self._check)
        idle: SimpleQueue[Arms] = SimpleQueue()
        for free in arms:
            idle.put(free)
        before = time.thread_time()
        pooled = arms[0].pooled() if self.trial.kind.pooled else {}
        spent, scores = time.thread_time() - before, list[ClientScore]()
        clients = population.sampled(scenario.evaluation.clients, scenario.seed).clients

        def scored(client: Client) -> tuple[ClientScore, float]:
            mine = idle.get()
            try:
                return self.store.part(self.trial, client.name) or self._score(mine, client, pooled)
            finally:
                idle.put(mine)

        with progress.stage(stage, total=len(clients)) as advance, one_thread():
            for _, wait in ahead(scored, clients, self.at_once):
                try:
                    score, seconds = wait()
                except BaseException:
                    self._stop.set()  # or Ctrl-C waits until the clients under way are trained
                    raise
                scores.append(score)
                spent += seconds
                advance()
        result = self._result(arms[0], clients, scores, spent)
        self.store.put(self.trial, result)
        return result

    def _check(self) -> None:
        if self._stop.is_set():
            raise _Stopped

    def _score(self, mine: Arms, client: Client, pooled: Tensors) -> tuple[ClientScore, float]:
        """Return a client's score, and the processor seconds of its training."""
        before = time.thread_time()
        kept, saved = "", 0.0
        if self.trial.kind in HEADS and isinstance(mine, ClassifierArms):
            fit, penalty = HEADS[self.trial.kind]
            judged, model, saved = mine.head(client, fit, getattr(self.trial.scenario.head, penalty))
        elif self.trial.kind is Kind.SUMMED and isinstance(mine, ClassifierArms):
            judged, model, saved = mine.summed(client)
        else:
            own = self._adapter(mine, client, pooled)
            model, kept = mine.model(own.adapter), own.choice
            judged = model if own.judged is own.adapter else mine.model(own.judged)
            if self.trial.kind is Kind.PERSONAL:
                self.keep(client, own.adapter)
        seconds = time.thread_time() - before + saved
        validation, test, public = self._tallies(judged, model, client)
        score = ClientScore(client.name, client.unseen, validation, test, public, kept)
        self.store.put_part(self.trial, score, seconds)
        return score, seconds

    def _adapter(self, mine: Arms, client: Client, pooled: Tensors) -> Kept:
        match self.trial.kind:
            case Kind.LOCAL:
                return mine.local(client)
            case Kind.GLOBAL:
                return _unjudged(self._global(client))
            case Kind.PERSONAL:
                return mine.personal(client, self._after_the_rounds(mine, client))
            case Kind.CENTRAL:
                return _unjudged(pooled)
            case Kind.CENTRAL_PERSONAL:
                return mine.personal(client, pooled, CENTRAL)
            case _:
                return _unjudged(mine.inputs.seed_adapter)

    def _tallies(self, judged: Model, model: Model, client: Client) -> Sequence[Tally]:
        """Tally validation, test and public texts; ``judged`` has not learned the validation texts."""
        if not self.thorough:
            return model(((), client.test, ()))
        rest = client.test, asked(self.material.population.public)
        if judged is model:
            return model((client.validation, *rest))
        return [*judged((client.validation,)), *model(rest)]

    @cached_property
    def _groups(self) -> tuple[Group, ...]:
        return grouped(self.material.population, self.trial.scenario.groups)

    @cached_property
    def _fleets(self) -> dict[str, Path]:
        return fleet_folders(self.material.federation, self._groups)

    def _global(self, client: Client) -> Tensors:
        folder = self._fleets[client.name]
        if folder not in self._shared:
            registry = provision.registry(folder)
            last = registry.latest() or registry.version(0)
            self._shared[folder] = registry.tensors(last.manifest.version)
        return self._shared[folder]

    def _after_the_rounds(self, mine: Arms, client: Client) -> Tensors:
        folder = provision.device_folder(self._fleets[client.name], client.name)
        if not folder.exists():  # a device that no session asked has kept nothing
            return self._global(client)
        return mine.after_the_rounds(DeviceStateDir.open(folder), self._global(client))

    def _result(
        self, mine: Arms, clients: Sequence[Client], scores: Sequence[ClientScore], seconds: float
    ) -> TrialResult:
        epochs, steps = self._trained(mine, clients)
        cost, points, epsilon, tally = Cost(epochs, steps, seconds), list[RoundPoint](), None, RoundTally()
        data = self.trial.scenario.data
        metric = find_task(data.task).metric if data.own_task else ""
        if self.trial.kind.federated:
            for round_ in rounds_of(self.material.federation, self._groups):
                up, down = cost.bytes_up + round_.bytes_up, cost.bytes_down + round_.bytes_down
                cost = replace(cost, bytes_up=up, bytes_down=down)
                points.append(RoundPoint(round_.round, self._value(round_), up + down))
                epsilon = round_.epsilon
            cost = replace(cost, cpu_seconds=seconds + self.material.rounds_cpu)
            tally = tally_of(self.material.federation, self._groups, self.trial.scenario)
            tally = replace(tally, retries=self.store.retries(self.trial))
        result = TrialResult(tuple(scores), cost, tuple(points), None, epsilon, metric=metric, round_tally=tally)
        if self.trial.kind is not Kind.GLOBAL or not self.thorough:
            return result
        fleets = [self.material.federation / group.folder for group in self._groups]
        canaries = canary_bounds(self.trial.scenario, fleets)
        return replace(result, aggregation_error=self._error(mine), canaries=canaries)

    def _value(self, round_: ReportedRound) -> float | None:
        if not self.trial.scenario.data.for_language_model:
            return round_.metrics.get(ACCURACY.key)
        return round_.metrics["loss"] / math.log(2) if "loss" in round_.metrics else None

    def _trained(self, mine: Arms, clients: Sequence[Client]) -> tuple[int, int]:
        """Return the epochs of a client that is not unseen, and optimizer steps of all, dropouts not subtracted.

        After the rounds, only the ``clients`` that are evaluated train.
        """
        scenario = self.trial.scenario
        trainings = self.trial.kind.training(scenario.round_epochs, scenario.personal.training_epochs)
        seen = [len(client.train) for client in self.material.population.clients if not client.unseen]
        sizes: dict[str, Callable[[], list[int]]] = {
            "seen": lambda: seen,
            "pooled": lambda: [sum(seen)],
            "everyone": lambda: [len(client.train) for client in clients],
            "step": lambda: [mine.rehearsed(client) for client in clients],
        }
        batch = scenario.federation.training.batch_size
        steps = sum(epochs * sum(-(-size // batch) for size in sizes[who]()) for who, epochs in trainings if epochs)
        return sum(epochs for _, epochs in trainings), steps

    def _error(self, mine: Arms) -> float | None:
        """Return the aggregation error of the last round of training, which all its clients repeat, without dropouts.

        None where there is no such mean: no round trained LoRA's factors, they stay on the devices, there are groups.
        """
        if self.trial.scenario.groups.by != "none":
            return None
        federation, registry = self.trial.scenario.federation, provision.registry(self.material.federation)
        last = registry.latest() or registry.version(0)
        begin = min(last.manifest.version, federation.training_rounds) - 1
        if begin < 0:
            return None
        task, start = federation.task(registry.version(begin).manifest), registry.tensors(begin)
        if task.private & {Part.A, Part.B}:
            return None

        def trained() -> Iterator[tuple[Tensors, float]]:
            for client in self.material.population.clients:
                if not client.unseen:
                    examples = training_examples(client)
                    tensors = mine.train(start, examples, task, task.epochs, client.name, LAST_ROUND)
                    yield folded(tensors), min(len(examples), federation.aggregation.weight_cap)

        error = aggregation_error(trained())
        return error if math.isfinite(error) else None


def _unjudged(adapter: Tensors) -> Kept:
    return Kept("", adapter, adapter)


def asked(public: Sequence[LabelledText]) -> Sequence[LabelledText]:
    """Pick the public texts that each client's model is asked."""
    return public[:: max(1, -(-len(public) // MOST_PUBLIC))]


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on one thread for each thread that calls it, while the block runs.

    Cores are busier than with one small batch spread over them, and any number of cores makes the same adapters.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def rounds_of(out: Path, groups: Sequence[Group]) -> tuple[ReportedRound, ...]:
    """Read the rounds of a run; a federation that repeated some has more of them than another one."""
    rows = []
    for folder in (out / group.folder for group in groups):
        log = GridLog.open(folder / GRID_LOG)
        rows.append([_reported(record, log) for record in provision.registry(folder).rounds()])
    return tuple(joined_rounds([each for each in same if each is not None]) for same in zip_longest(*rows))


def _reported(record: RoundRecord, log: GridLog) -> ReportedRound:
    devices = log.devices.get(record.round) or len({*record.survivors, *record.dropped}) or 1
    return ReportedRound(
        round=record.round,
        survivors=record.survivors,
        dropped=record.dropped,
        aborted=record.aborted,
        bytes_up=round(max(record.bytes_up, log.sent[record.round]) / devices),
        bytes_down=round(record.bytes_down / devices),
        seconds=record.seconds,
        metrics=record.metrics,
        version=record.version,
        epsilon=record.epsilon,
    )


def tally_of(out: Path, groups: Sequence[Group], scenario: Scenario) -> RoundTally:
    total = RoundTally()
    for group in groups:
        folder = out / group.folder
        records = provision.registry(folder).rounds()
        fitting = analytic_rounds(scenario, records)
        missing = unfitted_rounds(scenario, records)
        aborted = sum(record.aborted is not None for record in fitting)
        total = RoundTally(
            rounds=total.rounds + len(records),
            aborted=total.aborted + sum(record.aborted is not None for record in records),
            repeated=total.repeated + (0 if missing else aborted),
            unfitted=total.unfitted or 0 < scenario.federation.analytic.rounds == missing,
            resumed=tuple(sorted({*total.resumed, *GridLog.open(folder / GRID_LOG).resumed})),
        )
    return total


def analytic_rounds(scenario: Scenario, records: Sequence[RoundRecord]) -> list[RoundRecord]:
    """Pick the rounds of the analytic head, with those that repeat one after all that were planned."""
    federation = scenario.federation
    first, planned = federation.training_rounds, federation.rounds
    return [*records[first : first + federation.analytic.rounds], *records[planned:]]


def unfitted_rounds(scenario: Scenario, records: Sequence[RoundRecord]) -> int:
    """Count the rounds of the analytic head that are planned and have no sum."""
    fitted = sum(record.aborted is None for record in analytic_rounds(scenario, records))
    return scenario.federation.analytic.rounds - fitted
