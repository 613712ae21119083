"""Send what a suite found to the experiment tracker that a team uses: MLflow or TensorBoard.

An arm with a seed is a run: its constants, its figures, its costs and its rounds. Nothing leaves the machine,
unless ``MLFLOW_TRACKING_URI`` names a server.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from aggregation.errors import ConfigError
from simulations.plan import SuiteSettings
from simulations.report.summary import FIGURES, STATISTICS, Found, Whole, compared_by, figure, samples_of
from simulations.result import TrialResult

MLFLOW_FILE = "mlflow.db"  # SQLite, in the folder of the suite
TENSORBOARD_FOLDER = "tensorboard"
SERVER = "MLFLOW_TRACKING_URI"


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """Holds one arm with one seed, as a tracker takes it; ``by_round`` has what rounds published of adapters."""

    name: str  # such as ``personal-seed-0``
    settings: dict[str, str]  # arm, kind, seed, and the keys that the arm sets or its search chose
    metrics: dict[str, float]  # figures that are finite
    by_round: tuple[str, dict[int, float]]


def tracked_runs(settings: SuiteSettings, outcomes: Found) -> Iterator[TrackedRun]:
    """Yield the runs of a finished suite, arm by arm; a seed that failed is none."""
    for name, (chosen, by_seed) in outcomes.items():
        arm = settings.arms[name]
        keys = {**settings.set, **arm.set, **chosen.constants}
        for seed, result in by_seed.items():
            if isinstance(result, str):
                continue
            alone: Whole = {name: (chosen, {seed: result})}
            key = compared_by(alone).name.replace(" ", "_")
            yield TrackedRun(
                f"{name}-seed-{seed}",
                {"arm": name, "kind": arm.kind.value, "seed": str(seed), **{k: str(v) for k, v in keys.items()}},
                _metrics(alone, key, seed, result),
                (f"round_{key}", {point.round: point.value for point in result.rounds if point.value is not None}),
            )


def _metrics(outcomes: Whole, key: str, seed: int, result: TrialResult) -> dict[str, float]:
    figures, sign = {}, compared_by(outcomes).sign
    for title in FIGURES:
        if samples := samples_of(outcomes, [seed], unseen=title == "unseen"):
            statistic = STATISTICS["mean" if title == "unseen" else title]
            figures[f"{key}_{title}"] = sign * float(figure(samples, statistic)[0])
    cost = result.cost
    spent = {"epochs": cost.epochs, "steps": cost.steps, "cpu_seconds": cost.cpu_seconds}
    aborted = {"rounds_aborted": result.round_tally.aborted}
    traffic = {"bytes_up": cost.bytes_up, "bytes_down": cost.bytes_down, **aborted} if result.rounds else {}
    return {name: value for name, value in {**figures, **spent, **traffic}.items() if math.isfinite(value)}


def to_mlflow(name: str, runs: Iterator[TrackedRun], folder: Path) -> str:
    """Log the runs in MLflow's experiment ``name``, and return the server or the database that they are in.

    Raises ConfigError if MLflow is not installed, or does not take the runs.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    try:
        import mlflow
        from mlflow.exceptions import MlflowException
    except ModuleNotFoundError as error:
        raise _missing("mlflow") from error
    place = os.environ.get(SERVER) or f"sqlite:///{(folder / MLFLOW_FILE).resolve()}"
    try:
        mlflow.set_tracking_uri(place)
        mlflow.set_experiment(name)
        for run in runs:
            with mlflow.start_run(run_name=run.name):
                mlflow.log_params(run.settings)
                mlflow.log_metrics(run.metrics)
                key, values = run.by_round
                for number, value in values.items():
                    mlflow.log_metric(key, value, step=number)
    except MlflowException as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"MLflow at {place} did not take the runs: {reason}", about=SERVER) from error
    return place


def to_tensorboard(name: str, runs: Iterator[TrackedRun], folder: Path) -> str:
    """Write the runs as event files, each in its own folder, and return the folder for ``tensorboard --logdir``."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise _missing("tensorboard") from error
    place = folder / TENSORBOARD_FOLDER / name
    for run in runs:
        with SummaryWriter(str(place / run.name)) as writer:
            text = "\n".join(f"- {key}: {value}" for key, value in run.settings.items())
            writer.add_text("settings", text)
            for key, value in run.metrics.items():
                writer.add_scalar(key, value, 0)
            name_of_round, values = run.by_round
            for number, value in values.items():
                writer.add_scalar(name_of_round, value, number)
    return str(place)


TRACKERS: Mapping[str, Callable[[str, Iterator[TrackedRun], Path], str]] = {
    "mlflow": to_mlflow,
    "tensorboard": to_tensorboard,
}


def _missing(extra: str) -> ConfigError:
    return ConfigError(f"--track {extra} needs a package: pip install 'edgeadapt[{extra}]'", about="--track")
