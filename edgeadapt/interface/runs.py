"""``edgeadapt.simulate`` and ``suite``: what a federation brought to each client, and comparisons on several seeds."""

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from html import escape
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from aggregation.errors import ConfigError, DataError
from client.node.statedir import PERSONAL
from client.training.engine import classifier_trainer
from client.training.personal import METHODS
from edgeadapt.bases.base import MODELS
from edgeadapt.bases.tasks import TASKS
from edgeadapt.formats import files
from edgeadapt.formats.storage import File, replace
from edgeadapt.interface.models import Classifier, LanguageModel, load
from edgeadapt.interface.names import check_choice, check_texts, in_python, overrides
from edgeadapt.rounds.optimizer import OPTIMIZERS, name_of, to_rule
from simulations.data.population import Population
from simulations.engine.progress import RunProgress
from simulations.engine.provision import registry as registry_of
from simulations.engine.provision import training_base
from simulations.report.formatting import headline
from simulations.result import ARMS, ClientResult, RunResult
from simulations.scenario import read_scenario
from simulations.suite.execute import SuiteReport, run_suite
from simulations.suite.run import REPORT, Engine, Plan, RunFolder
from simulations.suite.store import RUNS, failure, read_suite, suite_folder

ROWS = "rows.jsonl"  # the rows that were given, in the folder of the run
COLUMNS = {"mean": "mean", "p10": "10th pct.", "worst": "worst", "unseen": "unseen"}


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run."""

    path: Path  # its folder
    result: RunResult

    @property
    def accuracy(self) -> dict[str, dict[str, float]]:
        """Return by arm ``mean``, ``p10``, ``worst`` and ``unseen``; of a language model in bits per byte."""
        return {arm: self.result.summary(arm) for arm in ARMS}

    @property
    def clients(self) -> tuple[ClientResult, ...]:
        return self.result.clients

    @property
    def epsilon(self) -> float | None:
        """Return what all sums may have revealed of a device; None without differential privacy."""
        return self.result.epsilon

    @property
    def report(self) -> Path:
        return self.path / REPORT

    def bundle(self, client: str | None = None) -> Path:
        """Return the folder of the global bundle, or of a client's with its private adapter. Raises ConfigError: the
        run does not have it, as a run of a language model."""
        bundle = self.path / "bundle" if client is None else self.path / "devices" / client / "bundle"
        if not bundle.is_dir():
            whose = "a bundle" if client is None else f"a bundle of a client {client!r}"
            raise ConfigError(f"{self.path} does not have {whose}", about="bundle")
        return bundle

    def load(self, client: str | None = None) -> Classifier | LanguageModel:
        """Load a bundle of the run. Raises as ``bundle`` and ``edgeadapt.load``."""
        return load(self.bundle(client))

    def answer(self, texts: Sequence[str], client: str | None = None) -> list[Any]:
        """Answer texts with the last global adapter, or with a client's own, as the task of the run says: also without
        a bundle, which a task and a model of your own do not have. Raises ConfigError: the run is of a language model,
        or does not have this client's adapter."""
        check_texts("texts", texts)
        with in_python():
            scenario = RunFolder.stored(self.path)
            registry = registry_of(self.path)
            last = (registry.latest() or registry.version(0)).manifest
            own = self.path / "devices" / (client or "") / PERSONAL
            if not last.labels or (client is not None and not own.is_file()):
                whose = "labels to answer with" if client is None else f"an adapter of a client {client!r}"
                raise ConfigError(f"{self.path} does not have {whose}", about="client")
            tensors = registry.tensors(last.version) if client is None else files.decode(own.read_bytes())
            base = training_base(self.path, scenario, Population((), (), ()))
            outputs = classifier_trainer(base, len(last.labels), last.peft_config).logits(tensors, texts)
            return [base.task.answer(row, last.labels) for row in outputs]

    def compare(self, other: "Run") -> dict[str, dict[str, float]]:
        """Return by arm how much higher each figure of ``accuracy`` is than in ``other``; ``suite`` adds intervals.
        Raises ConfigError: one of the two is of a language model."""
        if self.result.metric != other.result.metric:
            reason = f"{self.path} has {self.result.metric}, and {other.path} {other.result.metric}: compare like runs"
            raise ConfigError(reason, about="other")
        theirs = other.accuracy
        return {arm: {key: row[key] - theirs[arm][key] for key in row} for arm, row in self.accuracy.items()}

    def __str__(self) -> str:
        rows = [["", *COLUMNS.values()]]
        rows += [[arm, *(f"{row[key]:.3f}" for key in COLUMNS)] for arm, row in self.accuracy.items()]
        table = "\n".join("  ".join(cell.rjust(9) for cell in row).rstrip() for row in rows)
        return f"{self._caption()}\n{table}"

    def _caption(self) -> str:
        about = f"{self.result.metric} of {len(self.clients)} clients"
        return f"{about}: {headline(self.result)}" if self.result.metric == "accuracy" else about

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{title}</th>" for title in ("", *COLUMNS.values()))
        cells = {arm: "".join(f"<td>{row[key]:.3f}</td>" for key in COLUMNS) for arm, row in self.accuracy.items()}
        body = "".join(f"<tr><th>{arm}</th>{row}</tr>" for arm, row in cells.items())
        caption = escape(f"{self.result.scenario}, {self._caption()}")
        return f"<table><caption>{caption}</caption><tr>{head}</tr>{body}</table>"


def simulate(
    source: File | Iterable[Mapping[str, Any]] | Any,
    *,
    client: str | None = None,
    out: File | None = None,
    resume: bool = False,
    workers: int = 1,
    engine: Literal["plain", "protocol"] | None = None,
    quiet: bool = False,
    **settings: Any,
) -> Run:
    """Simulate a federation: what does each client get alone, and what together?

    Args:
        source: A scenario (``.toml``, also the name of a shipped one); or texts: a table (``.csv``, ``.jsonl``,
            ``.parquet``), a folder, rows with the keys ``text`` and ``label``, or a ``pandas.DataFrame``.
        client: The column that names each text's client; without it, texts are dealt out.
        out: The folder of the run; by default a new one in ``runs/``.
        resume: Continue the run of the same source and settings in ``out``, or the newest one in ``runs/``.
        workers: Processes that the devices of the rounds share.
        engine: How the rounds run: with sums without masks, which make the same adapters and leave no transcript, by
            default; or with the protocol, as ``audit`` needs it.
        quiet: Show no progress.
        settings: Keys of the scenario, as in ``federation__rounds=20`` or ``**{"federation.rounds": 20}``. A task, a
            model, a server rule and a personal step may be your own, in place of a name (docs/how-to/extend.md).

    Raises:
        ConfigError: A setting is not valid, or ``out`` has another run.
        DataError: A text or a row is not valid.
    """
    if engine is not None:
        check_choice("engine", engine, ("plain", "protocol"))
    keys = {name.replace("__", "."): value for name, value in settings.items()}
    keys |= {} if client is None else {"data.client": client}
    _name_own(keys)
    if isinstance(source, (str, PathLike)):
        path = Path(source)
    else:
        out = RUNS / f"rows-{datetime.now():%Y%m%d-%H%M%S}" if out is None else Path(out)
        path = _written(source, out.with_name(f"{out.name}.{ROWS}"))
    with in_python():
        plan = Plan.of(read_scenario(path, overrides(keys)), Engine(workers, engine))
        if plan.warning:
            warnings.warn(plan.warning, stacklevel=2)
        folder = plan.folder(None if out is None else Path(out), resume=resume)
        with RunProgress(quiet=quiet) as progress:
            return Run(folder.path, plan.run(folder, progress))


def suite(
    file: File,
    *,
    seeds: int | None = None,
    arms: Sequence[str] = (),
    out: File | None = None,
    resume: bool = False,
    retry: bool = False,
    jobs: int | None = None,
    quiet: bool = False,
    **settings: Any,
) -> SuiteReport:
    """Compare arms on several seeds: which differences are more than noise?

    Args:
        file: A suite (``.toml``), also the name of a shipped one.
        seeds: Their number, from 0 on; by default those of the file.
        arms: Names of the arms to run; by default all.
        out: The folder of the suite; by default ``runs/suite-NAME``.
        resume: Continue the suite in ``out``; what is finished is kept.
        retry: Continue it, and run again the rounds of arms of which some aborted, with other faults.
        jobs: Processes at the same time; by default one a core, at most 4.
        quiet: Show no progress.
        settings: Keys of the scenario, for every arm, as for ``simulate``.

    Raises:
        ConfigError: A setting is not valid, or ``out`` has another suite.
        DataError: A text is not valid, or every arm failed. An arm that failed while others did not is a warning, and
            in ``failures`` of the report.
    """
    check_texts("arms", arms)
    with in_python():
        wanted = read_suite(Path(file), seeds=seeds, changes=overrides(settings), arms=arms)
        folder = suite_folder(wanted, None if out is None else Path(out))
        report = run_suite(wanted, folder, jobs=jobs, resume=resume, retry=retry, quiet=quiet)
        if report.failures:
            warnings.warn(str(failure(report.failures)), stacklevel=2)
        return report


def _name_own(keys: dict[str, Any]) -> None:
    """Let the process know what is given in place of a name, under the name that the scenario then has."""
    rule, step = keys.get("federation.server.optimizer", ""), keys.get("personal.method", "")
    if not isinstance(model := keys.get("base.model", ""), str):
        keys["base.model"] = MODELS.add(model.__name__.lower(), model)
    if not isinstance(task := keys.get("data.task", ""), str):
        keys["data.task"] = TASKS.add(task.__name__.lower(), task)
    if not isinstance(rule, str):
        keys["federation.server.optimizer"] = OPTIMIZERS.add(name_of(rule), type(rule))
        keys["federation.server.numbers"] = to_rule(rule).numbers
    if not isinstance(step, str):
        keys["personal.method"] = METHODS.add(step.__name__, step)


def _written(rows: Any, path: Path) -> Path:
    """Write rows or a DataFrame as a table of JSON lines beside the folder of the run, where a resumed run finds it.
    Raises DataError: a row is not a mapping, or a value is infinite."""
    lines = []
    for number, row in enumerate(rows.to_dict("records") if hasattr(rows, "to_dict") else rows, 1):
        if not isinstance(row, Mapping):
            reason = f"row {number} is a {type(row).__name__}: give dictionaries with a text and a label"
            raise DataError(reason, about="rows")
        known = {name: value for name, value in row.items() if value == value}  # pandas marks what is missing by NaN
        try:
            lines.append(json.dumps(known, ensure_ascii=False, default=str, allow_nan=False))
        except ValueError as error:
            raise DataError(f"row {number} has an infinite value: leave it out", about="rows") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, "".join(f"{line}\n" for line in lines).encode())
    return path
