"""Run the jobs of a suite in processes of their own, until nothing is left. A job is the rounds of a trial, or what
comes after them. What is left is a function of the suite's settings and of what its folder already holds; a process
that is killed, or an interruption, loses at most the client or the round under way."""

import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from queue import SimpleQueue

from filelock import FileLock

from aggregation.errors import ConfigError, DataError, EdgeAdaptError
from edgeadapt.formats import storage
from edgeadapt.formats.cores import cores
from simulations.data import populate
from simulations.data.population import Population
from simulations.engine.groups import with_found
from simulations.engine.progress import RunProgress, SuiteProgress
from simulations.engine.provision import device_base, forget_states, training_base, with_shared_states
from simulations.engine.workers import Notify, Process, WorkerKilledError
from simulations.plan import Suite, Trial, digest_of, search
from simulations.report.formatting import aborted, duration
from simulations.report.map import MapSummary, write_map
from simulations.report.pages import markdown, write_suite_report
from simulations.report.summary import SuiteSummary, summarize
from simulations.result import TrialResult
from simulations.scenario import Scenario
from simulations.suite.run import REPORT, SCENARIO, RunFolder, federate, prepare
from simulations.suite.store import BASES, FINISHED, Store, failed, open_suite, results, taken
from simulations.suite.trial import Material, TrialRun

LOGS = "logs"
MOST_JOBS = 4  # by default; each holds a base in memory
Show = Callable[[float, float, list[str], str], None]  # work done, work left, a line a process, and what has ended


@dataclass(frozen=True, slots=True)
class Job:
    label: str  # the arm and the seed, for the screen
    trial: Trial
    rounds: bool  # whether the job is the rounds of the trial, or what comes after them
    ready: bool  # whether it can begin: its arm's constants are chosen, its rounds finished

    @property
    def key(self) -> str:
        """Return what is equal for jobs that write the same outcome."""
        return self.trial.federation if self.rounds else self.trial.digest

    @property
    def weight(self) -> float:
        return self.trial.rounds_weight if self.rounds else self.trial.weight


@dataclass(frozen=True, slots=True)
class SuiteReport:
    """A finished suite: figures of its arms, and their differences with intervals."""

    path: Path  # the folder of the suite
    summary: SuiteSummary | MapSummary
    failures: tuple[tuple[str, int, str], ...] = ()  # arms that failed: name, seed and reason

    @classmethod
    def of(cls, folder: Path) -> "SuiteReport":
        """Write the report of the finished suite in ``folder``. Raises as ``open_suite`` and ``results``."""
        suite, store = open_suite(folder), Store(folder)
        outcomes = {place: results(cell, store) for place, cell in suite.cells.items()}
        cells = {place: summarize(suite.cells[place].settings, found) for place, found in outcomes.items()}
        failures = tuple(failure for found in outcomes.values() for failure in failed(found))
        if not suite.settings.vary:
            write_suite_report(cells[()], folder)
            return cls(folder, cells[()], failures)
        summary = MapSummary.of(suite.settings, cells)
        write_map(summary, folder)
        return cls(folder, summary, failures)

    @property
    def report(self) -> Path:
        return self.path / REPORT

    def __str__(self) -> str:
        return self.summary.markdown() if isinstance(self.summary, MapSummary) else markdown(self.summary)

    _repr_markdown_ = __str__


def run_suite(
    suite: Suite, out: Path, *, jobs: int | None, resume: bool, quiet: bool, retry: bool = False
) -> SuiteReport:
    """Run what is left of a suite in ``out``, in ``jobs`` processes; by default one a core, at most ``MOST_JOBS``.
    ``retry``: continue it, and begin again with the rounds of arms of which some aborted. Raises as ``taken``,
    ``execute`` and ``SuiteReport.of``."""
    with taken(out, suite, resume=resume or retry, retry=retry) as store, SuiteProgress(quiet=quiet) as progress:
        execute(suite, store, jobs or min(cores(), MOST_JOBS), progress.show)
        forget_states(store.path)
    return SuiteReport.of(out)


def pending(suite: Suite, store: Store) -> list[Job]:
    """List the jobs that are left, in the order in which they should begin, each once. While an arm's search is not
    finished, its first candidate stands for the constants, so that the work that is left can be estimated; such jobs
    are not ready."""
    jobs: dict[str, Job] = {}
    for place, cell in suite.cells.items():
        for job in _jobs(cell, store):
            if job.key not in jobs or (job.ready and not jobs[job.key].ready):
                jobs[job.key] = replace(job, label=", ".join((*place, job.label)))
    return list(jobs.values())


def _jobs(suite: Suite, store: Store) -> Iterator[Job]:
    late: list[Job] = []
    for name, arm in suite.settings.arms.items():
        try:
            chosen = search(suite, name, store.get)
        except ConfigError:  # nothing can be chosen, which the report says of this arm
            continue
        if chosen is None:
            for number, candidate in enumerate(candidates := list(arm.candidates()), 1):
                for trial in suite.candidate(name, candidate):
                    label = f"{name}, candidate {number} of {len(candidates)}"
                    yield from _of_trial(trial, label, store, chosen=True)
        constants = next(arm.candidates()) if chosen is None else chosen.constants
        for seed, trial in suite.trials(name, constants):
            late += _of_trial(trial, f"{name}, seed {seed}", store, chosen=chosen is not None)
    yield from late


def _of_trial(trial: Trial, label: str, store: Store, *, chosen: bool) -> Iterator[Job]:
    if store.get(trial) is None:
        has_rounds = store.has_rounds(trial)
        if not has_rounds:
            yield Job(label, trial, rounds=True, ready=chosen)
        yield Job(label, trial, rounds=False, ready=chosen and has_rounds)


class Worker:
    def __init__(self, folder: Path, notify: Notify) -> None:
        print(f"process {os.getpid()}", flush=True)
        self._store, self._notify = Store(folder), notify

    def work(self, trial: Trial, rounds: bool) -> None:
        """Compute the rounds of a trial, or what comes after them, and keep the outcome. An error of the scenario, such
        as a training that diverges, is an outcome: it ends this trial only."""
        try:
            if rounds:
                compute_rounds(trial, self._store, self._notify)
            else:
                compute(trial, self._store, self._notify)
        except EdgeAdaptError as error:
            self._store.put(trial, str(error))


def compute_rounds(trial: Trial, store: Store, notify: Notify) -> None:
    """Run the rounds of a trial in their folder, from where they were interrupted, and keep what they cost."""
    path, scenario = store.federation(trial), trial.rounds
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        started = (path / SCENARIO).exists()
        folder = RunFolder.resume(path, scenario) if started else RunFolder.start(path, scenario)
        folder.retries = store.retries(trial)
        material, before = _material(trial, store), time.process_time()
        try:
            with RunProgress(quiet=True, notify=notify) as progress:
                population = prepare(folder, material.population, material.base, progress)
                federate(folder, population, material.base, progress)
        finally:  # an interrupted run has spent it as well
            folder.add("cpu", time.process_time() - before)
        storage.replace(path / FINISHED, json.dumps({"cpu_seconds": folder.seconds["cpu"]}).encode())


def compute(trial: Trial, store: Store, notify: Notify) -> TrialResult:
    """Raises as ``TrialRun.compute``."""
    with RunProgress(quiet=True, notify=notify) as progress:
        return TrialRun(trial, _material(trial, store), store).compute(progress, "client")


def _material(trial: Trial, store: Store) -> Material:
    """Return what a trial is computed from; a base or a bundle that has to be made is shared by all that need it."""
    scenario, finished = trial.scenario, store.federation(trial) / FINISHED
    population = _populated(scenario.model_dump_json(include={"seed", "population", "data"}))
    needs = {"seed", "population", "data", "base", "export"}
    with _shared(store, scenario, needs, made=scenario.base_is_made) as folder:
        base = training_base(folder, scenario, population)
    base = with_shared_states(store.path, scenario, population, base)
    with _shared(store, scenario, {*needs, "adapter"}, made=scenario.base.engine == "onnx") as folder:
        trained = device_base(folder, scenario, base, population)
    spent = json.loads(finished.read_bytes())["cpu_seconds"] if trial.kind.federated and finished.exists() else 0.0
    return Material(with_found(store.federation(trial), population), base, trained, store.federation(trial), spent)


@contextmanager
def _shared(store: Store, scenario: Scenario, needs: set[str], *, made: bool) -> Iterator[Path]:
    """Yield the folder of what depends on some tables of a scenario; that of the suite if nothing has to be made."""
    if not made:
        yield store.path
        return
    folder = store.path / BASES / digest_of(scenario.model_dump(mode="json", include=needs))
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        yield folder


@lru_cache(maxsize=2)
def _populated(tables: str) -> Population:
    """Return the population that these tables of a scenario, in JSON, describe; kept for the next trial."""
    scenario = Scenario.parse(json.loads(tables), "scenario")
    return populate(scenario.data, scenario.population, scenario.seed).population


@dataclass(slots=True)
class _Running:
    process: Process
    log: Path
    job: Job | None = None
    note: str = ""
    began: float = 0.0

    def line(self) -> str:
        what = "" if self.job is None else f"{self.job.label}: {'rounds ' if self.job.rounds else ''}{self.note}"
        return what.rstrip(": ")


def execute(suite: Suite, store: Store, processes: int, show: Show) -> None:
    """Run all jobs that are left, and call ``show`` after each change. An arm that fails does not end the others.
    Raises DataError if a process ended with an error."""
    workers, done, said = list[_Running](), 0.0, ""
    events: SimpleQueue[tuple[_Running, str | Future[None]]] = SimpleQueue()  # notes and outcomes

    def start() -> _Running:
        log = store.path / LOGS / f"worker-{len(workers) + 1}.log"
        log.parent.mkdir(exist_ok=True)
        workers.append(_Running(Process(partial(Worker, store.path), log), log))
        return workers[-1]

    def assign(worker: _Running, job: Job) -> None:
        worker.job, worker.note, worker.began = job, "", time.monotonic()
        outcome = worker.process.call(Worker.work, job.trial, job.rounds, note=lambda text: events.put((worker, text)))
        outcome.add_done_callback(lambda ended: events.put((worker, ended)))

    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes; this one only waits
    show(0.0, 1.0, ["processes start"], "")
    try:
        while True:
            left = pending(suite, store)
            running = {worker.job.key for worker in workers if worker.job is not None}
            waiting = [job for job in left if job.ready and job.key not in running]
            for job in waiting[: processes - len(running)]:
                assign(next((worker for worker in workers if worker.job is None), None) or start(), job)
            weight = sum(job.weight for job in left)
            ended: str | Future[None] = ""
            while isinstance(ended, str):
                busy = [worker for worker in workers if worker.job is not None]
                show(done, weight, [worker.line() for worker in busy], said)
                said = ""
                if not busy:
                    return
                worker, ended = events.get()
                worker.note = ended if isinstance(ended, str) else ""
            finished, seconds = worker.job, time.monotonic() - worker.began
            done += _finish(worker, ended)
            said = _ended(finished, seconds, store) if finished else ""
    finally:
        for worker in workers:
            worker.process.close()


def _ended(job: Job, seconds: float, store: Store) -> str:
    what, outcome = f"{job.label}{', rounds' if job.rounds else ''}", store.get(job.trial)
    if isinstance(outcome, str):
        return f"{what}: failed, {outcome}"
    note = aborted(outcome.round_tally) if outcome else ""
    return f"{what}: {duration(seconds)}{note and ', '}{note}"


def _finish(worker: _Running, outcome: "Future[None]") -> float:
    """Return the weight of the job that a process has finished. Raises DataError if it failed or was killed."""
    job, worker.job = worker.job, None
    assert job is not None  # noqa: S101  # it has reported it
    try:
        outcome.result()
    except (WorkerKilledError, Exception) as error:
        killed = isinstance(error, WorkerKilledError)
        reason = f"its process ended with code {worker.process.close()}" if killed else ""
        reason = reason or f"{type(error).__name__}: {error}"
        cause = error
    else:
        return job.weight
    text = f"{job.label}: {reason}; see {worker.log}, and continue with --resume (with fewer --jobs if memory is short)"
    raise DataError(text, about="--jobs") from cause
