"""Several runs of a scenario, one a seed, side by side: what held and how much of it was luck."""

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
    """A figure over the runs."""

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
        raise ConfigError("the runs are of different scenarios: compare runs of one")
    if len({result["seed"] for result in results}) < len(results):
        raise ConfigError("two runs have the same seed: they say the same thing twice")
    return results


def spreads(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, Spread]]:
    """Arm → figure → its mean, least and greatest value over the runs."""
    return {arm: {figure: _spread([r["accuracy"][arm][figure] for r in results]) for figure in FIGURES} for arm in ARMS}


def markdown(results: Sequence[dict[str, Any]]) -> str:
    """The table as a document would show it."""
    head = f"| {count(len(results), 'seed')}: mean (least – greatest) | mean | 10th percentile | worst | unseen |"
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
        raise ConfigError(f"{folder} holds no finished run") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged") from error
