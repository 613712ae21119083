"""Several runs of one scenario with different seeds in one table: mean and range of each accuracy."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aggregation.errors import ConfigError, DataError
from simulations.report.formatting import count
from simulations.report.result import ARMS

FIGURES = ("mean", "p10", "worst", "unseen")


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure's mean, lowest and highest value over the runs."""

    mean: float
    low: float
    high: float


def read_results(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """``result.json`` of each run.

    Raises:
        ConfigError: A folder holds no finished run, or two runs have one seed or different scenarios.
        DataError: A result is damaged.
    """
    results = [_read(folder) for folder in folders]
    if len({result["scenario"] for result in results}) > 1:
        raise ConfigError("the runs are of different scenarios: compare runs of one scenario", about="scenario")
    if len({result["seed"] for result in results}) < len(results):
        raise ConfigError("two runs have the same seed: compare runs with different seeds", about="seed")
    return results


def spreads(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, Spread]]:
    """Arm → figure → its spread over the runs, at least one; the figures are those of ``result.summary``."""
    return {arm: {figure: _spread([r["accuracy"][arm][figure] for r in results]) for figure in FIGURES} for arm in ARMS}


def markdown(results: Sequence[dict[str, Any]]) -> str:
    head = f"| {count(len(results), 'seed')}: mean (lowest – highest) | mean | 10th percentile | worst | unseen |"
    rows = [
        f"| {arm} | {' | '.join(_cell(figures[name]) for name in FIGURES)} |"
        for arm, figures in spreads(results).items()
    ]
    return "\n".join([head, "| --- | --- | --- | --- | --- |", *rows])


def _cell(spread: Spread) -> str:
    return f"{spread.mean:.3f} ({spread.low:.3f} – {spread.high:.3f})"


def _spread(values: Sequence[float]) -> Spread:
    return Spread(float(np.mean(values)), min(values), max(values))


def _read(folder: Path) -> dict[str, Any]:
    path = folder / "result.json"
    try:
        result: dict[str, Any] = json.loads(path.read_bytes())
        spreads([result])
        return {key: result[key] for key in ("scenario", "seed", "accuracy")}
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(f"{folder} contains no finished run: resume it first", about=path.name) from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged: resume the run to write it again", about=path.name) from error
