"""What a suite has to do next: a function of its settings and of what its folder already holds."""

from collections.abc import Iterator
from dataclasses import dataclass

from aggregation.errors import DataError
from simulations.suite.outcome import TrialResult
from simulations.suite.plan import SearchOutcome, Suite, Trial, search
from simulations.suite.store import Store


@dataclass(frozen=True, slots=True)
class Job:
    """One piece of work for a process.

    Attributes:
        label: The arm and the seed, for the screen.
        trial: Of the arm.
        rounds: Whether the job is the rounds of the trial, or what comes after them.
    """

    label: str
    trial: Trial
    rounds: bool

    @property
    def key(self) -> str:
        """Equal for jobs that write the same outcome."""
        return self.trial.federation if self.rounds else self.trial.digest

    @property
    def weight(self) -> float:
        """Work, in epochs of a client."""
        return self.trial.rounds_weight if self.rounds else self.trial.weight


def pending(suite: Suite, store: Store) -> Iterator[Job]:
    """The jobs that are left, in the order in which they should begin, each once.

    While an arm's search is not finished, its first candidate stands for the constants, so that the work that is left
    can be estimated; ``ready`` leaves such jobs out.
    """
    seen = set()
    for job, _ in _jobs(suite, store):
        if job.key not in seen:
            seen.add(job.key)
            yield job


def ready(suite: Suite, store: Store) -> Iterator[Job]:
    """The jobs of ``pending`` that can begin now: rounds come before what follows them, a search before its arm."""
    seen = set()
    for job, searched in _jobs(suite, store):
        if searched and (job.rounds or store.has_rounds(job.trial)) and job.key not in seen:
            seen.add(job.key)
            yield job


def results(suite: Suite, store: Store) -> dict[str, tuple[SearchOutcome, dict[int, TrialResult]]]:
    """Arm → what its search found, and its result on each seed.

    Raises:
        DataError: A trial is missing, or it failed.
    """
    found = {}
    for name in suite.settings.arms:
        chosen = search(suite, name, store.get)
        trials = {} if chosen is None else {seed: store.get(t) for seed, t in suite.trials(name, chosen.constants)}
        whole = {seed: outcome for seed, outcome in trials.items() if isinstance(outcome, TrialResult)}
        for seed, outcome in trials.items():
            if isinstance(outcome, str):
                raise DataError(f"arm {name!r} failed with seed {seed}: {outcome}", about=name)
        if chosen is None or len(whole) < len(suite.settings.seeds):
            raise DataError(f"arm {name!r} is not finished: run the suite again with --resume", about=name)
        found[name] = chosen, whole
    return found


def _jobs(suite: Suite, store: Store) -> Iterator[tuple[Job, bool]]:
    """The jobs that are left, some of them several times, and whether their constants are known."""
    late: list[tuple[Job, bool]] = []
    for name, arm in suite.settings.arms.items():
        chosen = search(suite, name, store.get)
        if chosen is None:
            for constants in arm.candidates():
                for trial in suite.candidate(name, constants):
                    yield from _of_trial(trial, f"{name}, search", store)
        constants = next(arm.candidates()) if chosen is None else chosen.constants
        for seed, trial in suite.trials(name, constants):
            late += [(job, chosen is not None) for job, _ in _of_trial(trial, f"{name}, seed {seed}", store)]
    yield from late


def _of_trial(trial: Trial, label: str, store: Store) -> Iterator[tuple[Job, bool]]:
    if store.get(trial) is not None:
        return
    if not store.has_rounds(trial):
        yield Job(label, trial, rounds=True), True
    yield Job(label, trial, rounds=False), True
