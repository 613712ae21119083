"""The figure of the households: the accuracy of each arm, household by household."""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from simulations.report.formatting import count, share
from simulations.report.plots import ARM_COLOURS, CHARACTER, LINE, MUTED, PAPER, WIDTH, axes, short, svg
from simulations.report.result import ARMS, HouseholdResult, RunResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROW = 17.0  # units a household
MARKS = {"base": ("o", 26), "local": ("D", 26), "global": ("s", 20), "personal": ("o", 44)}  # shape, square points


def households(result: RunResult) -> str:
    """Accuracy by household: base → personal, with local and global; the unseen households below."""

    def rank(household: HouseholdResult) -> tuple[bool, float, str]:
        accuracy = household.accuracy["personal"]
        return household.unseen, -accuracy if math.isfinite(accuracy) else 2.0, household.name

    rows = sorted(result.households, key=rank)
    seen = sum(not h.unseen for h in rows)
    better = sum(h.accuracy["personal"] > h.accuracy["base"] for h in rows)
    text = (
        f"personal answers more test phrases right than base in {better} of {count(len(rows), 'household')}; "
        "the table of households has the numbers."
    )
    gap = 1.6 if 0 < seen < len(rows) else 0.0
    height = 84 + ROW * (len(rows) + gap)
    places = [i + (gap if h.unseen else 0.0) for i, h in enumerate(rows)]
    return svg(
        "households", "Accuracy by household", text, height, lambda figure: _dumbbells(figure, rows, places, height)
    )


def _dumbbells(figure: "Figure", rows: Sequence[HouseholdResult], places: Sequence[float], height: float) -> None:
    labels = [_label(h) for h in rows]
    left = 12 + CHARACTER * max(map(len, labels))
    ax = axes(figure, left=left, top=42, width=WIDTH - left - 40, height=height - 84)
    values = {arm: np.array([h.accuracy[arm] for h in rows]) for arm in ARMS}
    finite = np.concatenate([v[np.isfinite(v)] for v in values.values()])
    lowest = max(0.0, math.floor(10 * (finite.min() if finite.size else 0.0) - 0.3) / 10)
    ax.set_xlim(lowest - 0.015, 1.015)
    ax.set_ylim(max(places) + 0.8, -0.8)
    ax.hlines(places, values["base"], values["personal"], color=LINE, linewidth=3, zorder=1)
    for arm in ARMS:
        _marks(ax, arm, values[arm], places)
    ax.set_yticks(places, labels)
    ax.xaxis.set_major_formatter(lambda value, _: share(value, 1))
    ax.grid(axis="x")
    ax.set_axisbelow(True)
    ax.set_xlabel("share of its own test phrases answered right")
    for place, value in zip(places, values["personal"], strict=True):
        ax.annotate(
            share(value, 2), (1, place), (34, 0), ("axes fraction", "data"), "offset points",
            ha="right", va="center", color=ARM_COLOURS["personal"],
        )  # fmt: skip
    first = next((place for place, h in zip(places, rows, strict=True) if h.unseen), None)
    if first is not None:
        ax.annotate(
            "took no part in training", (0, first - 1), (2, 0), ("axes fraction", "data"), "offset points",
            va="center", color=MUTED, style="italic",
        )  # fmt: skip
    _key(figure, height)


def _label(household: HouseholdResult) -> str:
    name = short(household.name)
    return name if household.name.startswith(household.language) else f"{name} · {short(household.language)}"


def _marks(ax: "Axes", arm: str, x: Iterable[float], y: Iterable[float]) -> None:
    marker, area = MARKS[arm]
    face = PAPER if arm in ("base", "local") else ARM_COLOURS[arm]
    face = "none" if arm == "local" else face
    order = {"base": 2, "personal": 3, "global": 4, "local": 5}[arm]
    ax.scatter(
        list(x), list(y), s=area, marker=marker, facecolor=face, edgecolor=ARM_COLOURS[arm], linewidth=1.4,
        zorder=order, clip_on=False,
    )  # fmt: skip


def _key(figure: "Figure", height: float) -> None:
    """The four marks with their names, in a line above the plot."""
    ax = axes(figure, left=0, top=6, width=WIDTH, height=20)
    ax.set_axis_off()
    ax.set(xlim=(0, WIDTH), ylim=(-1, 1))
    for place, arm in zip((14, 100, 190, 290), ARMS, strict=True):
        _marks(ax, arm, [place], [0])
        ax.text(place + 10, 0, arm, va="center", color=ARM_COLOURS[arm])
