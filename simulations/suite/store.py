"""The folder of a suite or a run: outcomes of trials, one file each, complete or absent; federations; bases.
``results/DIGEST.json`` is the outcome of a trial; while one is computed, ``parts/DIGEST/`` has a file for each client
that is done."""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout
from pydantic import TypeAdapter, ValidationError

from aggregation.errors import ConfigError, DataError
from edgeadapt.bases.base import find_base, with_task
from edgeadapt.formats import jsontext
from edgeadapt.formats.storage import PUBLIC, file_sha256, read, replace
from simulations.plan import SearchOutcome, Suite, SuiteSettings, Trial, digest_of, search
from simulations.result import ClientScore, Outcome, TrialResult
from simulations.scenario import Scenario
from simulations.shipped import SCENARIOS, SUITES, find

RUNS = Path("runs")  # the folder of runs and suites, by default
SUITE = "suite.json"
LARGEST_SUITE, LARGEST = 2**20, 2**26  # bytes; an outcome has a character for each answer
RESULTS, PARTS, FEDERATIONS, BASES = "results", "parts", "federations", "bases"  # folders
FINISHED = "finished.json"  # in the folder of a federation: what its rounds cost
T = TypeVar("T")
_OUTCOME: TypeAdapter[Outcome] = TypeAdapter(Outcome)
_PART: TypeAdapter[tuple[ClientScore, float]] = TypeAdapter(tuple[ClientScore, float])


class Store:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._outcomes: dict[str, Outcome] = {}

    def get(self, trial: Trial) -> Outcome | None:
        """Read the outcome of a trial; None if it is not finished. Raises DataError if its file is damaged."""
        if trial.digest not in self._outcomes:
            outcome = _stored(self._file(trial), _OUTCOME)
            if outcome is None:
                return None
            self._outcomes[trial.digest] = outcome
        return self._outcomes[trial.digest]

    def put(self, trial: Trial, outcome: Outcome) -> None:
        value = outcome if isinstance(outcome, str) else asdict(outcome)
        self._file(trial).parent.mkdir(exist_ok=True)
        replace(self._file(trial), json.dumps(value, separators=(",", ":")).encode(), PUBLIC)
        shutil.rmtree(self._parts(trial), ignore_errors=True)

    def part(self, trial: Trial, client: str) -> tuple[ClientScore, float] | None:
        """Read what ``put_part`` kept of a client; None if it is not done. Raises as ``get``."""
        return _stored(self._parts(trial) / f"{client}.json", _PART)

    def put_part(self, trial: Trial, score: ClientScore, cpu_seconds: float) -> None:
        """Keep the score of one client of a trial until ``put``, and the processor seconds of its training."""
        self._parts(trial).mkdir(parents=True, exist_ok=True)
        replace(self._parts(trial) / f"{score.name}.json", json.dumps([asdict(score), cpu_seconds]).encode(), PUBLIC)

    def forget(self, trial: Trial) -> None:
        self._outcomes.pop(trial.digest, None)
        self._file(trial).unlink(missing_ok=True)

    def federation(self, trial: Trial) -> Path:
        return self.path / FEDERATIONS / trial.federation

    def retries(self, trial: Trial) -> int:
        file = self._retries(trial)
        return int(file.read_text()) if file.exists() else 0

    def retry(self, trials: Iterable[Trial]) -> None:
        """Remove outcomes whose rounds lack a sum or failed, and these rounds: they begin again with other faults."""
        short = [trial for trial in trials if self._is_short(trial)]
        for trial in short:
            self.forget(trial)
        for trial in {trial.federation: trial for trial in short}.values():
            folder = self.federation(trial)
            if not folder.exists():
                continue
            replace(self._retries(trial), str(self.retries(trial) + 1).encode())
            gone = folder.with_name(f"{folder.name}.gone")
            shutil.rmtree(gone, ignore_errors=True)
            folder.rename(gone)  # at once: no rounds are left that lack a part of their folder
            shutil.rmtree(gone)

    def _is_short(self, trial: Trial) -> bool:
        outcome = self.get(trial)
        if isinstance(outcome, TrialResult):
            return outcome.round_tally.is_short
        return outcome is not None and not self.has_rounds(trial)

    def has_rounds(self, trial: Trial) -> bool:
        """Check whether the rounds of a trial are finished, or it has none."""
        return not trial.kind.federated or (self.federation(trial) / FINISHED).exists()

    def _retries(self, trial: Trial) -> Path:
        return self.path / FEDERATIONS / f"{trial.federation}.retries"

    def _file(self, trial: Trial) -> Path:
        return self.path / RESULTS / f"{trial.digest}.json"

    def _parts(self, trial: Trial) -> Path:
        return self.path / PARTS / trial.digest


def _stored(file: Path, kind: TypeAdapter[T]) -> T | None:
    try:
        return kind.validate_json(read(file, LARGEST), strict=True)
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise DataError(f"{file} is damaged: delete it, and continue with --resume", about=file.name) from error


def results(suite: Suite, store: Store) -> dict[str, tuple[SearchOutcome, Mapping[int, Outcome]]]:
    """Map each arm to its search's outcome and its outcome by seed, which is a sentence where it failed. Raises
    DataError if one is missing, or no arm has a result with every seed."""
    finished: dict[str, tuple[SearchOutcome, Mapping[int, Outcome]]] = {}
    for name in suite.settings.arms:
        try:
            chosen = search(suite, name, store.get)
        except ConfigError as error:
            finished[name] = SearchOutcome({}, (), 0.0), dict.fromkeys(suite.settings.seeds, str(error))
            continue
        trials = {} if chosen is None else {seed: store.get(t) for seed, t in suite.trials(name, chosen.constants)}
        outcomes = {seed: outcome for seed, outcome in trials.items() if outcome is not None}
        if chosen is None or len(outcomes) < len(suite.settings.seeds):
            raise DataError(f"arm {name!r} is not finished: run the suite again with --resume", about=name)
        finished[name] = chosen, outcomes
    failures = failed(finished)
    if {name for name, _, _ in failures} == set(finished):
        raise failure(failures)
    return finished


def failed(outcomes: Mapping[str, tuple[SearchOutcome, Mapping[int, Outcome]]]) -> list[tuple[str, int, str]]:
    return [
        (name, seed, outcome)
        for name, (_, by_seed) in outcomes.items()
        for seed, outcome in by_seed.items()
        if isinstance(outcome, str)
    ]


def failure(failures: Sequence[tuple[str, int, str]]) -> DataError:
    """Make the error of a suite in which arms failed: it names the first, and how many more there are."""
    name, seed, reason = failures[0]
    more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
    return DataError(f"arm {name!r} failed with seed {seed}{more}: {reason}", about=name)


def read_suite(path: Path, *, seeds: int | None = None, changes: Sequence[str] = (), arms: Sequence[str] = ()) -> Suite:
    """Read the suite in a file, or one that is shipped under this name. ``seeds``: their number, from 0 on, instead of
    the file's; ``changes``: ``KEY=VALUE`` for every arm, after those of the suite; ``arms``: only these of its arms."""
    path = find(path, SUITES)
    settings = SuiteSettings.read(path).with_overrides(changes)
    settings = settings.with_arms(arms) if arms else settings
    named = find(path.parent / settings.scenario, SCENARIOS)
    scenario = Scenario.read(named).located(named.parent).model_dump(mode="json")
    suite = Suite(settings if seeds is None else settings.with_seeds(seeds), scenario, named.parent)
    suite.check()
    return suite


def open_suite(out: Path) -> Suite:
    """Read the suite that was run in a folder. Raises ConfigError if it is missing or damaged."""
    file = out / SUITE
    try:
        stored = jsontext.decode(read(file, LARGEST_SUITE))
        settings, scenario = stored["settings"], Scenario.parse(stored["scenario"], str(file))
        return Suite(SuiteSettings.parse(settings, str(file)), scenario.model_dump(mode="json"), Path(stored["folder"]))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(f"{out} contains no suite: run one with 'edgeadapt simulate suite'", about="DIR") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{file} is damaged: run the suite again with --resume", about=SUITE) from error


def suite_folder(suite: Suite, out: Path | None) -> Path:
    return out or RUNS / f"suite-{suite.settings.name}"


def check_fresh(out: Path, marker: str, what: str) -> None:
    """Check that a run or a suite can begin in a folder, which has ``marker`` if there is one. Raises ConfigError."""
    if (out / marker).exists():
        text = f"{out} already contains {what}: add --resume to continue it, or choose another --out"
        raise ConfigError(text, about="--out")
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty: choose another --out", about="--out")


@contextmanager
def taken(out: Path, suite: Suite, *, resume: bool, retry: bool = False) -> Iterator[Store]:
    """Hold the folder of a suite for the duration of the block. It is new or empty or, with ``resume``, that of a
    suite, of which outcomes are kept; what failed is tried again, and with ``retry`` also rounds of which some
    aborted."""
    started = resume and (out / SUITE).exists()
    if not started:
        check_fresh(out, SUITE, "a suite")
    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / ".lock", timeout=0):
            content = _same_content(out / SUITE, suite) if started else _content(suite)
            table = {"settings": suite.settings.model_dump(mode="json"), "scenario": suite.scenario, "content": content}
            replace(out / SUITE, json.dumps({**table, "folder": str(suite.folder)}, indent=2).encode(), PUBLIC)
            store = Store(out)
            if retry:
                store.retry(suite.reported())
            for trial in suite.reported():
                if isinstance(store.get(trial), str):
                    store.forget(trial)
            yield store
    except Timeout as error:
        raise ConfigError(f"another process runs a suite in {out}: wait for it, or choose another --out") from error


def _same_content(file: Path, suite: Suite) -> dict[str, str]:
    """Check that the suite in ``file`` names the same content, and return it. Raises ConfigError."""
    try:
        before: dict[str, str] = jsontext.decode(read(file, LARGEST_SUITE))["content"]
        now = _content(suite)
        changed = [name for name, digest in now.items() if before.get(name, digest) != digest]
    except (KeyError, AttributeError, ValueError) as error:
        raise ConfigError(f"{file} is damaged: choose another --out", about=SUITE) from error
    if changed:
        raise ConfigError(f"{changed[0]} is not what it was when this suite began: choose another --out", about="--out")
    return before | now


def _content(suite: Suite) -> dict[str, str]:
    digests: dict[str, str] = {}
    for trial in suite.reported():
        scenario = trial.scenario
        model, task = scenario.base.model, scenario.data.task
        named = f"{model} for {task}" if scenario.data.own_task else model
        if named not in digests:
            found = find_base(model)  # marks are made with the run
            digests[named] = (with_task(found, task) if scenario.data.own_task else found).digest
        for place in (*scenario.data.files, *scenario.data.public, scenario.network.trace):
            if place and place not in digests:
                digests[place] = _digest(Path(place))
    return digests


def _digest(place: Path) -> str:
    if not place.is_dir():
        return file_sha256(place)
    files = sorted(file for file in place.rglob("*") if file.is_file())
    return digest_of({file.relative_to(place).as_posix(): file_sha256(file) for file in files})
